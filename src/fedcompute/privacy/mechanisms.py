"""The releases of a task, gathered into mechanisms: what stands alone, and what is one mechanism over many rounds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedcompute.privacy.ledger import (
    BandedEvent,
    Event,
    GaussianEvent,
    TreeEvent,
    composed_noise_multiplier,
)


@dataclass(frozen=True)
class Run:
    """Consecutive rounds from number `first` on (0 for a task's first), each as private as one Gaussian release."""

    first: int
    rounds: int
    noise_multiplier: float  # deviation over L2 sensitivity of one contribution; 0: no protection


@dataclass(frozen=True)
class Correlated:
    """A mechanism over many rounds, with the noise of each: a tree (`bands` 0) or a banded matrix factorization.

    `repeats`: so many of them, one after the other, with the same numbers of rounds.
    """

    runs: tuple[Run, ...]
    bands: int = 0
    repeats: int = 1

    @property
    def rounds(self) -> int:
        return sum(run.rounds for run in self.runs)

    @property
    def noise_multiplier(self) -> float:
        """Of the round with least noise."""
        return min(run.noise_multiplier for run in self.runs)


@dataclass(frozen=True)
class Mechanisms:
    """`sums`: rounds that released Gaussian sums and nothing else. `beside`: the Gaussian sums of other rounds."""

    sums: tuple[Run, ...] = ()
    beside: tuple[Run, ...] = ()
    correlated: tuple[Correlated, ...] = ()

    @property
    def runs(self) -> Iterable[Run]:
        yield from self.sums
        yield from self.beside
        for one in self.correlated:
            yield from one.runs

    @property
    def noiseless(self) -> bool:
        """Whether some release has no noise at all."""
        return any(run.noise_multiplier == 0 for run in self.runs)


def mechanisms_of(rounds: Sequence[Sequence[Event]]) -> Mechanisms:
    """Gathers a task's rounds, in order; a round that released nothing is empty and counts as time that passes.

    Linear in the number of rounds; rounds that bring a property `mechanisms` along (`planned.PlannedRounds`,
    `charges.ChargedRounds`) cost nothing.

    Formal guarantees: releases of one round about the same devices compose to one Gaussian release (see
    `ledger.composed_noise_multiplier`), trees node by node.
    """
    known = getattr(rounds, "mechanisms", None)
    return known if isinstance(known, Mechanisms) else gathered((release, 1) for release in rounds)


def gathered(spans: Iterable[tuple[Sequence[Event], int]]) -> Mechanisms:
    """`mechanisms_of` rounds in spans: the events of the first round, and how many rounds are alike but for steps.

    Formal guarantees: as `mechanisms_of` with every round written out.
    """
    sums: list[Run] = []
    beside: list[Run] = []
    trees: list[list[Run]] = []
    banded: dict[int, list[Run]] = {}
    compose = lru_cache(maxsize=1024)(_composed)
    position = 0
    for release, rounds in spans:
        kinds: dict[type, list[float]] = {}
        for event in release:
            kinds.setdefault(type(event), []).append(event.noise_multiplier)
        composed = {kind: compose(tuple(multipliers)) for kind, multipliers in kinds.items()}
        if TreeEvent in composed:
            if not trees or any(isinstance(event, TreeEvent) and event.step == 1 for event in release):
                trees.append([])
            _extend(trees[-1], position, rounds, composed[TreeEvent])
        if BandedEvent in composed:
            bands = max(event.bands for event in release if isinstance(event, BandedEvent))
            _extend(banded.setdefault(bands, []), position, rounds, composed[BandedEvent])
        if GaussianEvent in composed:
            _extend(sums if len(composed) == 1 else beside, position, rounds, composed[GaussianEvent])
        position += rounds
    correlated = [Correlated(tuple(runs)) for runs in trees]
    correlated += [Correlated(tuple(runs), bands) for bands, runs in banded.items()]
    return Mechanisms(tuple(sums), tuple(beside), tuple(correlated))


def _composed(multipliers: tuple[float, ...]) -> float:
    # One release keeps its own number, which squaring and a root would round.
    return multipliers[0] if len(multipliers) == 1 else composed_noise_multiplier(map(GaussianEvent, multipliers))


def _extend(runs: list[Run], position: int, rounds: int, noise_multiplier: float) -> None:
    if runs and runs[-1].first + runs[-1].rounds == position and runs[-1].noise_multiplier == noise_multiplier:
        runs[-1] = Run(runs[-1].first, runs[-1].rounds + rounds, noise_multiplier)
    else:
        runs.append(Run(position, rounds, noise_multiplier))
