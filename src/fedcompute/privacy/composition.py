"""Epsilon of everything that was released about a population: tasks of any kind under their own assumptions."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedcompute.privacy import sensitivity
from fedcompute.privacy.accounting import (
    fixed_size_epsilon,
    fixed_size_event,
    gaussian_epsilon,
    loss_interval,
    poisson_epsilon,
    tree_epsilon,
)
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.mechanisms import Correlated, Mechanisms, Run, mechanisms_of
from fedcompute.privacy.participation import Assumption, Participation


@dataclass(frozen=True)
class TaskReleases:
    """What one task released, round by round in order, and who is assumed to have taken part.

    `rounds`: the events of each round number, empty for a round that released nothing (separation counts it). Events
    of one round are about the same devices.
    """

    rounds: Sequence[Sequence[Event]]
    assumption: Assumption


@dataclass(frozen=True)
class Poisson:
    """`rounds` Gaussian releases over Poisson samples."""

    sampling_probability: float
    noise_multiplier: float
    rounds: int


@dataclass(frozen=True)
class FixedSize:
    """`rounds` Gaussian releases over samples of fixed size."""

    sample_size: int
    population: int
    noise_multiplier: float
    rounds: int


@dataclass(frozen=True)
class OneEpoch:
    """Trees of a task under the reference's claim: a device takes part in one of its `rounds`.

    `metrics`: squared inverse multiplier of the Gaussian sums that this one participation is in besides.
    """

    noise_multiplier: float
    rounds: int
    metrics: float

    @property
    def square(self) -> float:
        """Squared sensitivity over noise of one participation."""
        return self.rounds.bit_length() * inverse_square(self.noise_multiplier) + self.metrics


@dataclass(frozen=True)
class Parts:
    """The releases about a population in normal form. Sampled parts are merged where they are alike, and sorted.

    `square`: squared sensitivity over noise of all that is not amplified; one Gaussian release of multiplier
    `square` ** -0.5 is as private. Infinite if any release has no noise.
    """

    poisson: tuple[Poisson, ...] = ()
    fixed_size: tuple[FixedSize, ...] = ()
    one_epoch: tuple[OneEpoch, ...] = ()
    square: float = 0.0


def epsilon(tasks: Sequence[TaskReleases], delta: float) -> float:
    """Epsilon at `delta` of all releases of `tasks` together. Infinite where one has no noise, 0 where there is none.

    Exact values come from dp-accounting: a task of sampled Gaussian releases gives `poisson_epsilon` or
    `fixed_size_epsilon`, a tree under the reference's claim `tree_epsilon`, unsampled releases `gaussian_epsilon`;
    mixtures compose in one PLD accountant, or under replace-one in one RDP accountant if a sample has fixed size. May
    take a minute for little noise; remembered within the process.

    Formal guarantees: unit a device, in every task of the population. Adjacency add-or-remove-one; replace-one, with
    all sensitivities doubled and only the samples of fixed size amplified, if a task claims FIXED_SIZE. Holds if each
    task's `assumption` does: see `parts_of`. Tasks may depend on what others released.
    """
    return parts_epsilon(parts_of(tasks), delta)


def unamplified_epsilon(tasks: Sequence[TaskReleases], delta: float) -> float:
    """Epsilon at `delta` of the same releases for a device that was in every round, sampled by nobody.

    Formal guarantees: adjacency add-or-remove-one device; no assumption on who takes part when, whatever the tasks
    claim.
    """
    return epsilon([assuming(task, Participation.NO_AMPLIFICATION) for task in tasks], delta)


def assuming(task: TaskReleases, participation: Participation, minimum_separation: int = 0) -> TaskReleases:
    """The same releases under another assumption.

    Formal guarantees: none of its own; what is computed from the result holds if the given assumption does.
    """
    changed = replace(task.assumption, participation=participation, minimum_separation=minimum_separation)
    return replace(task, assumption=changed)


def parts_of(tasks: Iterable[TaskReleases]) -> Parts:
    """The normal form of `tasks`.

    Formal guarantees: POISSON amplifies rounds that released Gaussian sums alone, and takes trees for the reference's
    claim, one participation in the whole task; FIXED_SIZE amplifies Gaussian sums alone. What neither covers (trees
    and banded matrices otherwise) counts as unamplified, for a device that comes whenever the assumption's minimum
    separation lets it: Gaussian sums exactly, trees and banded matrices by the bounds in `sensitivity`.
    """
    poisson: Counter[tuple[float, float]] = Counter()
    fixed_size: Counter[tuple[int, int, float]] = Counter()
    one_epoch: list[OneEpoch] = []
    squares: list[float] = []
    for task in tasks:
        assumption, mechanisms = task.assumption, mechanisms_of(task.rounds)
        if mechanisms.noiseless:
            return Parts(square=math.inf)
        # No population is smaller than a sample of it.
        goal = max(1, assumption.report_goal)
        population = max(goal, assumption.population)
        match assumption.participation:
            case Participation.POISSON:
                for run in mechanisms.sums:
                    poisson[goal / population, run.noise_multiplier] += run.rounds
                mechanisms, claimed = _one_epoch(mechanisms)
                one_epoch += claimed
                mechanisms = replace(mechanisms, sums=())
            case Participation.FIXED_SIZE:
                for run in mechanisms.sums:
                    fixed_size[goal, population, run.noise_multiplier] += run.rounds
                mechanisms = replace(mechanisms, sums=())
        unbounded = assumption.participation == Participation.NO_AMPLIFICATION
        squares.append(unamplified_square(mechanisms, 1 if unbounded else max(1, assumption.minimum_separation)))
    return Parts(
        tuple(Poisson(*key, rounds) for key, rounds in sorted(poisson.items())),
        tuple(FixedSize(*key, rounds) for key, rounds in sorted(fixed_size.items())),
        tuple(sorted(one_epoch, key=lambda one: (one.noise_multiplier, one.rounds, one.metrics))),
        math.fsum(squares),
    )


def unamplified_square(mechanisms: Mechanisms, separation: int) -> float:
    """Squared sensitivity over noise of `mechanisms`, for a device that comes as often as `separation` lets it.

    Formal guarantees: one Gaussian release with multiplier square ** -0.5 is at least as revealing, also when the
    device chooses its rounds and contributions after earlier releases (arXiv 2210.17520, Gaussian differential
    privacy composes fully adaptively).
    """
    total = [_sums_square(mechanisms.sums, separation), _sums_square(mechanisms.beside, separation)]
    trees = [one for one in mechanisms.correlated if not one.bands]
    last = max((run.first + run.rounds for one in trees for run in one.runs), default=0)
    first = min((run.first for one in trees for run in one.runs), default=0)
    once = separation > last - 1 - first and all(one.repeats == 1 for one in trees)
    squares = [_correlated_square(one, separation) for one in mechanisms.correlated]
    if once and trees:
        # One participation lies in one tree.
        total.append(max(square for one, square in zip(mechanisms.correlated, squares, strict=True) if not one.bands))
        squares = [square for one, square in zip(mechanisms.correlated, squares, strict=True) if one.bands]
    return math.fsum(total + squares)


@lru_cache(maxsize=1024)
def parts_epsilon(parts: Parts, delta: float) -> float:
    """Epsilon of a normal form; see `epsilon`.

    Formal guarantees: as `epsilon`.
    """
    if math.isinf(parts.square):
        return math.inf
    if parts.fixed_size:
        return _replace_one_epsilon(parts, delta)
    alone = parts.square == 0 and len(parts.poisson) + len(parts.one_epoch) == 1
    if alone and parts.poisson:
        (one,) = parts.poisson
        return poisson_epsilon(one.noise_multiplier, one.rounds, one.sampling_probability, delta)
    if alone:
        return _one_epoch_epsilon(parts.one_epoch[0], delta)
    square = parts.square + math.fsum(one.square for one in parts.one_epoch)
    if not parts.poisson:
        return gaussian_epsilon(multiplier(square), delta)
    import dp_accounting
    from dp_accounting import pld

    smallest = min(one.noise_multiplier for one in parts.poisson)
    accountant = pld.PLDAccountant(
        value_discretization_interval=loss_interval(min(smallest, multiplier(square)) if square else smallest)
    )
    for one in parts.poisson:
        gaussian = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(one.sampling_probability, gaussian), one.rounds)
    if square:
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier(square)))
    return float(accountant.get_epsilon(delta))


def inverse_square(noise_multiplier: float) -> float:
    """Squared sensitivity over noise of one Gaussian release.

    Formal guarantees: these squares add up under composition (see `ledger.composed_noise_multiplier`).
    """
    return math.inf if noise_multiplier < 1e-150 else noise_multiplier**-2


def multiplier(square: float) -> float:
    """The multiplier of the Gaussian release with this squared sensitivity over noise.

    Formal guarantees: as private as the releases whose squares were added.
    """
    return math.inf if square == 0 else square**-0.5


def _one_epoch(mechanisms: Mechanisms) -> tuple[Mechanisms, list[OneEpoch]]:
    """Takes the trees, and what was released beside them, out of `mechanisms`."""
    trees = [one for one in mechanisms.correlated if not one.bands]
    if not trees:
        return mechanisms, []
    rest = tuple(one for one in mechanisms.correlated if one.bands)
    weakest = min(one.noise_multiplier for one in trees)
    metrics = max((inverse_square(run.noise_multiplier) for run in mechanisms.beside), default=0.0)
    claim = OneEpoch(weakest, sum(one.rounds * one.repeats for one in trees), metrics)
    return Mechanisms(mechanisms.sums, mechanisms.beside if rest else (), rest), [claim]


def _one_epoch_epsilon(claim: OneEpoch, delta: float) -> float:
    if not claim.metrics:
        return tree_epsilon(claim.noise_multiplier, (claim.rounds,), delta)
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(claim.noise_multiplier, (claim.rounds,)))
    accountant.compose(dp_accounting.GaussianDpEvent(multiplier(claim.metrics)))
    return float(accountant.get_epsilon(delta))


def _replace_one_epsilon(parts: Parts, delta: float) -> float:
    whole = [one.square for one in parts.one_epoch]
    whole += [one.rounds * inverse_square(one.noise_multiplier) for one in parts.poisson]
    square = parts.square + math.fsum(whole)
    if square == 0 and len(parts.fixed_size) == 1:
        (one,) = parts.fixed_size
        return fixed_size_epsilon(one.noise_multiplier, one.rounds, one.sample_size, one.population, delta)
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    for one in parts.fixed_size:
        accountant.compose(fixed_size_event(one.noise_multiplier, one.rounds, one.sample_size, one.population))
    if square:
        # Replacing a device moves a sum twice as far as removing it.
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier(square) / 2))
    return float(accountant.get_epsilon(delta))


def _sums_square(runs: Sequence[Run], separation: int) -> float:
    if separation <= 1:
        return math.fsum(run.rounds * inverse_square(run.noise_multiplier) for run in runs)
    if len({run.noise_multiplier for run in runs}) <= 1:
        return _participations(runs, separation) * inverse_square(runs[0].noise_multiplier) if runs else 0.0
    weights = np.concatenate([np.full(run.rounds, inverse_square(run.noise_multiplier)) for run in runs])
    return sensitivity.heaviest_participation(_positions(runs), weights, separation)


def _correlated_square(one: Correlated, separation: int) -> float:
    participations = _participations(one.runs, separation)
    # In steps of the mechanism, between which there may be rounds without a release.
    steps = separation if _gapless(one.runs) else sensitivity.separation_in_steps(_positions(one.runs), separation)
    square = (
        sensitivity.squared_banded_sensitivity(participations, steps, one.bands)
        if one.bands
        else sensitivity.squared_tree_sensitivity(one.rounds, participations, steps)
    )
    return one.repeats * square * inverse_square(one.noise_multiplier)


def _participations(runs: Sequence[Run], separation: int) -> int:
    if _gapless(runs):
        return -(-sum(run.rounds for run in runs) // separation)
    return sensitivity.most_participations(_positions(runs), separation)


def _gapless(runs: Sequence[Run]) -> bool:
    return all(run.first + run.rounds == after.first for run, after in itertools.pairwise(runs))


def _positions(runs: Sequence[Run]) -> Any:
    return sensitivity.positions_of([(run.first, run.rounds) for run in runs])
