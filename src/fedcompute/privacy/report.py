"""What a finished or running task has spent, in numbers and in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedcompute.privacy.accounting import gaussian_epsilon, poisson_epsilon
from fedcompute.privacy.ledger import GaussianEvent, composed_noise_multiplier


@dataclass(frozen=True)
class PrivacyReport:
    """Epsilons at `delta` after `rounds` releases.

    `epsilon` holds for a device that took part in up to `participations` rounds, whoever chose when;
    `sampled_epsilon` is the reference's claim, Poisson sampling of `report_goal` out of `population` devices.
    Both are infinite where a release had no noise.
    """

    rounds: int
    participations: int
    noise_multiplier: float
    clip_norm: float
    report_goal: int
    population: int
    delta: float
    epsilon: float
    sampled_epsilon: float


def privacy_report(
    events: Sequence[GaussianEvent],
    *,
    clip_norm: float,
    report_goal: int,
    population: int,
    delta: float,
    minimum_separation: int = 0,
) -> PrivacyReport:
    """Recomputes what the ledger's `events` of one task add up to.

    With a minimum separation s a device takes part at most once in s rounds.

    Formal guarantees: `epsilon` needs no assumption on when devices come, only that every device obeys the minimum
    separation (devices enforce it; 0 or 1 assumes nothing). `sampled_epsilon` holds only if each round were a fresh
    Poisson sample of the population, which a server of volunteers does not have.
    """
    noisiest_last = sorted(events, key=lambda event: event.noise_multiplier)
    participations = math.ceil(len(events) / max(1, minimum_separation))
    weakest = noisiest_last[0].noise_multiplier if noisiest_last else math.inf
    return PrivacyReport(
        rounds=len(events),
        participations=participations,
        noise_multiplier=weakest,
        clip_norm=clip_norm,
        report_goal=report_goal,
        population=population,
        delta=delta,
        epsilon=gaussian_epsilon(composed_noise_multiplier(noisiest_last[:participations]), delta),
        sampled_epsilon=poisson_epsilon(weakest, len(events), min(1.0, report_goal / population), delta)
        if events
        else 0.0,
    )


def privacy_sentences(report: PrivacyReport) -> list[str]:
    """The report in plain words, for the end of a quickstart or a reviewer's first look."""
    if math.isinf(report.epsilon):
        return ["No noise was added: this run makes no privacy promise at all."]
    return [
        f"Each of {report.rounds} releases added Gaussian noise of {report.noise_multiplier:g} times the clip norm "
        f"{report.clip_norm:g} to a sum over {report.report_goal} devices.",
        f"Honest epsilon: {report.epsilon:.2f} at delta {report.delta:g}, for a device that took part in "
        f"{report.participations} rounds, whoever decided when (no amplification by sampling).",
        f"If every round were a random sample of {report.population} devices it would be "
        f"{report.sampled_epsilon:.2f}; devices that come when they like are no such sample.",
        f"With {report.population} devices noise strong enough for a small epsilon would drown the model: the same "
        "noise over 2,000 reports a round protects as much per round and disturbs the mean "
        f"{2000 / max(1, report.report_goal):.0f} times less, so real fleets choose far larger multipliers.",
    ]
