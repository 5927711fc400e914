"""What a finished or running task has spent, in numbers and in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedcompute.privacy.bounds import parts_bounds
from fedcompute.privacy.composition import (
    TaskReleases,
    assuming,
    epsilon,
    parts_epsilon,
    parts_of,
    unamplified_epsilon,
)
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.mechanisms import Mechanisms, mechanisms_of
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.sensitivity import positions_of

# Below so many devices the noise of a small epsilon drowns any model.
_FEW = 1000
_LARGE_FLEET_GOAL = 2000
# An assumption that makes epsilon so many times smaller deserves a warning.
_WARNING_RATIO = 2.0
# Points of a series, and cells of the bounds that it is made of.
_POINTS = 20
_CELLS = 1 << 14

_MECHANISMS = {
    "sums": "independent Gaussian noise",
    "trees": "tree noise (DP-FTRL)",
    "banded": "banded correlated noise (DP-FTRL)",
}


@dataclass(frozen=True)
class Spent:
    """Epsilons after `rounds` rounds."""

    rounds: int
    epsilon: float
    unamplified_epsilon: float


@dataclass(frozen=True)
class PrivacyReport:
    """What one task's releases amount to at `delta`. Epsilons are infinite where a release had no noise.

    `epsilon` holds under `assumption`; `unamplified_epsilon` for a device in every round, whoever decided when;
    `separated_epsilon` for one that comes as often as the minimum separation lets it (None: there is none).
    `unprotected`: what was released without noise and outside epsilon, and how often.
    """

    assumption: Assumption
    delta: float
    mechanism: str
    rounds: int  # that released something with noise
    participations: int  # of one device, at most
    trees: int
    noise_multiplier: float  # of the round with least noise, metrics included
    clip_norm: float
    epsilon: float
    unamplified_epsilon: float
    separated_epsilon: float | None = None
    claimed_epsilon: float | None = None
    unprotected: Mapping[str, int] = field(default_factory=dict)
    series: tuple[Spent, ...] = ()

    @property
    def warning(self) -> str | None:
        """A sentence, where the assumption makes epsilon more than twice smaller than without it."""
        if not self.unamplified_epsilon > _WARNING_RATIO * self.epsilon:
            return None
        return (
            f"Epsilon depends on the assumption: without it, it is {_shown(self.unamplified_epsilon)} instead "
            f"of {_shown(self.epsilon)}."
        )


def privacy_report(
    releases: Sequence[Sequence[Event]],
    assumption: Assumption,
    *,
    clip_norm: float,
    delta: float,
    claimed_epsilon: float | None = None,
    unprotected: Mapping[str, int] | None = None,
    with_series: bool = False,
) -> PrivacyReport:
    """Recomputes what a task's `releases` add up to, one sequence of events per round, as `TaskReleases` has them.

    May take seconds where noise is weak: the accountant's exact value is part of it.

    Formal guarantees: unit a device; `epsilon` as `composition.epsilon` under `assumption`; `unamplified_epsilon`
    assumes nothing about when devices come; `separated_epsilon` that every device obeys the minimum separation
    (devices enforce it). Adjacency add-or-remove-one, replace-one for `epsilon` under FIXED_SIZE.
    """
    task = TaskReleases(releases, assumption)
    mechanisms = mechanisms_of(releases)
    spans = sorted({(run.first, run.rounds) for run in mechanisms.runs})
    separation = max(1, assumption.minimum_separation)
    rounds = len(set(positions_of(spans).tolist())) if spans else 0
    participations = -(-len(releases) // separation) if rounds else 0
    separated = assuming(task, Participation.MIN_SEPARATION, separation)
    return PrivacyReport(
        assumption=assumption,
        delta=delta,
        mechanism=_mechanism(mechanisms),
        rounds=rounds,
        participations=min(participations, rounds),
        trees=sum(one.repeats for one in mechanisms.correlated if not one.bands),
        noise_multiplier=min((run.noise_multiplier for run in mechanisms.runs), default=math.inf),
        clip_norm=clip_norm,
        epsilon=epsilon([task], delta),
        unamplified_epsilon=unamplified_epsilon([task], delta),
        separated_epsilon=epsilon([separated], delta) if separation > 1 else None,
        claimed_epsilon=claimed_epsilon,
        unprotected=dict(unprotected or {}),
        series=epsilon_series(task, delta) if with_series else (),
    )


def epsilon_series(task: TaskReleases, delta: float, points: int = _POINTS) -> tuple[Spent, ...]:
    """Epsilon after about `points` evenly spaced numbers of rounds, the last being all of them; for a plot.

    Formal guarantees: each value is a proven upper bound as `bounds.parts_bounds`; the last is the exact value.
    """
    total = len(task.rounds)
    counts = sorted({-(-total * step // points) for step in range(1, points + 1)} - {0})
    found = []
    for count in counts:
        until = TaskReleases(task.rounds[:count], task.assumption)
        parts = parts_of([until])
        value = parts_epsilon(parts, delta) if count == total else parts_bounds(parts, delta, _CELLS).upper
        found.append(Spent(count, value, unamplified_epsilon([until], delta)))
    return tuple(found)


def privacy_sentences(report: PrivacyReport) -> list[str]:
    """The report in plain words, for the end of a quickstart or a reviewer's first look.

    Formal guarantees: none of its own; each epsilon stands beside the assumption that it needs.
    """
    outside = _outside(report)
    if report.rounds == 0:
        return ["Nothing was released under differential privacy.", *outside]
    if math.isinf(report.epsilon):
        return ["No noise was added to some release: this run makes no privacy promise at all.", *outside]
    sentences = [
        f"{report.rounds} rounds added {report.mechanism} of {report.noise_multiplier:g} times the clip norm "
        f"{report.clip_norm:g} to sums over {report.assumption.report_goal} devices.",
        f"Epsilon: {_shown(report.epsilon)} at delta {report.delta:g}, {_condition(report)}.",
    ]
    claims_nothing = report.assumption.participation == Participation.NO_AMPLIFICATION
    if not claims_nothing:
        sentences.append(
            f"Without that assumption: {_shown(report.unamplified_epsilon)}, for a device that took part in all "
            f"{report.rounds} rounds, whoever decided when."
        )
    if report.separated_epsilon is not None and report.assumption.participation != Participation.MIN_SEPARATION:
        sentences.append(
            f"With the minimum separation of {report.assumption.minimum_separation} rounds, which devices keep: "
            f"{_shown(report.separated_epsilon)}, for a device that took part in {report.participations} rounds."
        )
    if report.warning is not None:
        sentences.append(report.warning)
    if report.claimed_epsilon is not None:
        sentences.append(f"The plan promises {_shown(report.claimed_epsilon)} for all of its rounds.")
    sentences += outside
    if report.assumption.population <= _FEW:
        goal = max(1, report.assumption.report_goal)
        sentences.append(
            f"With {report.assumption.population} devices noise strong enough for a small epsilon would drown the "
            f"model: the same noise over {_LARGE_FLEET_GOAL:,} reports a round protects as much per round and "
            f"disturbs the mean {_LARGE_FLEET_GOAL / goal:.0f} times less, so real fleets choose far larger "
            "multipliers."
        )
    return sentences


def _shown(epsilon: float) -> str:
    return f"{epsilon:,.2f}" if epsilon >= 0.1 or epsilon == 0 else f"{epsilon:.2g}"


def _condition(report: PrivacyReport) -> str:
    """Whom epsilon is true for."""
    assumption = report.assumption
    drawn = f"{assumption.report_goal} of {assumption.population:,} devices"
    match assumption.participation:
        case Participation.POISSON if report.trees:
            return "for a device that took part in one round of the task (the reference's claim for trees)"
        case Participation.POISSON:
            return (
                f"if every round were a fresh random sample of about {drawn}; devices that come when they like are none"
            )
        case Participation.FIXED_SIZE:
            return f"if every round were a fresh random sample of {drawn}; devices that come when they like are none"
        case Participation.MIN_SEPARATION:
            return (
                f"for a device that took part once in {max(1, assumption.minimum_separation)} rounds and so in "
                f"{report.participations}, whoever decided when"
            )
    return f"for a device that took part in all {report.rounds} rounds, whoever decided when"


def _outside(report: PrivacyReport) -> list[str]:
    if not report.unprotected:
        return []
    names = ", ".join(f"{name} ({count})" for name, count in sorted(report.unprotected.items()))
    return [f"Released without noise, outside epsilon: {names}."]


def _mechanism(mechanisms: Mechanisms) -> str:
    if any(not one.bands for one in mechanisms.correlated):
        return _MECHANISMS["trees"]
    return _MECHANISMS["banded" if mechanisms.correlated else "sums"]
