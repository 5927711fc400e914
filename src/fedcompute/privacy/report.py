"""What a finished or running task has spent, in numbers and in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedcompute.privacy.accounting import gaussian_epsilon, poisson_epsilon, tree_epsilon
from fedcompute.privacy.ledger import Event, GaussianEvent, TreeEvent, composed_noise_multiplier

# Below so many devices the noise of a small epsilon drowns any model.
_FEW = 1000

Releases = Sequence[Sequence[Event]]


@dataclass(frozen=True)
class PrivacyReport:
    """Epsilons at `delta` after `rounds` releases.

    `epsilon` holds for a device that took part in up to `participations` rounds, whoever chose when; for tree types
    (`trees` > 0) it holds for one that took part once in each tree. `sampled_epsilon` is the reference's claim:
    Poisson sampling of `report_goal` out of `population` devices, and nothing else than `epsilon` for tree types.
    Both are infinite where a release had no noise.
    """

    rounds: int
    participations: int
    trees: int
    noise_multiplier: float
    clip_norm: float
    report_goal: int
    population: int
    delta: float
    epsilon: float
    sampled_epsilon: float


def privacy_report(
    releases: Releases,
    *,
    clip_norm: float,
    report_goal: int,
    population: int,
    delta: float,
    minimum_separation: int = 0,
) -> PrivacyReport:
    """Recomputes what the ledger's `releases` of one task add up to: one sequence of events per round, in order.

    With a minimum separation s a device takes part at most once in s rounds.

    Formal guarantees: for Gaussian types `epsilon` needs no assumption on when devices come, only that every device
    obeys the minimum separation (devices enforce it; 0 or 1 assumes nothing). For tree types it assumes one
    participation per tree. `sampled_epsilon` holds only if each round were a fresh Poisson sample of the population,
    which a server of volunteers does not have.
    """
    # The events of one round are as private as one Gaussian event, for the tree's nodes as for plain releases.
    multipliers = [
        composed_noise_multiplier(GaussianEvent(event.noise_multiplier) for event in release) for release in releases
    ]
    weakest = min(multipliers, default=math.inf)
    trees = _trees(releases)
    participations = len(trees) if trees else math.ceil(len(releases) / max(1, minimum_separation))
    if trees:
        epsilon = sampled = tree_epsilon(weakest, trees, delta)
    else:
        worst = sorted(multipliers)[:participations]
        epsilon = gaussian_epsilon(composed_noise_multiplier(map(GaussianEvent, worst)), delta)
        share = min(1.0, report_goal / population)
        sampled = poisson_epsilon(weakest, len(releases), share, delta) if releases else 0.0
    return PrivacyReport(
        rounds=len(releases),
        participations=participations,
        trees=len(trees),
        noise_multiplier=weakest,
        clip_norm=clip_norm,
        report_goal=report_goal,
        population=population,
        delta=delta,
        epsilon=epsilon,
        sampled_epsilon=sampled,
    )


def privacy_sentences(report: PrivacyReport) -> list[str]:
    """The report in plain words, for the end of a quickstart or a reviewer's first look."""
    if math.isinf(report.epsilon):
        return ["No noise was added: this run makes no privacy promise at all."]
    noise = (
        f"Each of {report.rounds} releases added Gaussian noise of {report.noise_multiplier:g} times the clip norm "
        f"{report.clip_norm:g} to a sum over {report.report_goal} devices."
    )
    if report.trees:
        return [
            noise,
            f"Epsilon: {report.epsilon:.2f} at delta {report.delta:g}, for a device that took part once in each of "
            f"{report.trees} noise trees; one that took part more often is protected less.",
        ]
    sentences = [
        noise,
        f"Honest epsilon: {report.epsilon:.2f} at delta {report.delta:g}, for a device that took part in "
        f"{report.participations} rounds, whoever decided when (no amplification by sampling).",
        f"If every round were a random sample of {report.population} devices it would be "
        f"{report.sampled_epsilon:.2f}; devices that come when they like are no such sample.",
    ]
    if report.population <= _FEW:
        sentences.append(
            f"With {report.population} devices noise strong enough for a small epsilon would drown the model: the same "
            "noise over 2,000 reports a round protects as much per round and disturbs the mean "
            f"{2000 / max(1, report.report_goal):.0f} times less, so real fleets choose far larger multipliers."
        )
    return sentences


def _trees(releases: Releases) -> tuple[int, ...]:
    """Rounds of each noise tree, in order; empty for releases without one."""
    counts: list[int] = []
    for release in releases:
        steps = [event.step for event in release if isinstance(event, TreeEvent)]
        if steps and (min(steps) == 1 or not counts):
            counts.append(0)
        if steps:
            counts[-1] += 1
    return tuple(counts)
