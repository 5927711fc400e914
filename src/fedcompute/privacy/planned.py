"""The events that the rounds of a mechanism will emit, before any of them ran; and the noise that meets a target."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

from fedcompute.privacy import accounting, composition
from fedcompute.privacy.adaptive import BIT, split_noise
from fedcompute.privacy.composition import TaskReleases, inverse_square
from fedcompute.privacy.ledger import BandedEvent, Event, GaussianEvent, TreeEvent
from fedcompute.privacy.mechanisms import Correlated, Mechanisms, Run
from fedcompute.privacy.participation import Assumption

# The reference's restart rule, in rounds (spec/artifacts.md 9.4).
RESTART_PERIOD, RESTART_OFFSET = 1024, 128

KINDS = ("fixed_gaussian", "adaptive_gaussian", "tree_aggregation", "adaptive_tree", "banded_mf")


@dataclass(frozen=True)
class PlannedRounds(Sequence[Sequence[Event]]):
    """`rounds` rounds of one mechanism, as a sequence that takes no memory; see `planned_rounds`."""

    kind: str
    noise_multiplier: float
    rounds: int
    report_goal: int
    bands: int = 1
    metrics_noise_multiplier: float = 0.0
    restart_period: int = RESTART_PERIOD
    restart_offset: int = RESTART_OFFSET

    def __len__(self) -> int:
        return self.rounds

    @overload
    def __getitem__(self, index: int) -> Sequence[Event]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[Event]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[Event] | Sequence[Sequence[Event]]:
        if isinstance(index, slice):
            start, stop, stride = index.indices(self.rounds)
            if (start, stride) == (0, 1):
                return replace(self, rounds=max(0, stop))
            return [self._release(position) for position in range(start, stop, stride)]
        position = index + self.rounds if index < 0 else index
        if not 0 <= position < self.rounds:
            raise IndexError(index)
        return self._release(position)

    @property
    def mechanisms(self) -> Mechanisms:
        """What `mechanisms.mechanisms_of` finds in these rounds.

        Adaptive types count with the whole noise, which value and bits compose to (`adaptive.split_noise`).
        """
        if not self.rounds:
            return Mechanisms()
        everything = (Run(0, self.rounds, self.noise_multiplier),)
        metrics = (Run(0, self.rounds, self.metrics_noise_multiplier),) if self.metrics_noise_multiplier else ()
        if self.kind in ("fixed_gaussian", "adaptive_gaussian"):
            square = inverse_square(self.noise_multiplier) + inverse_square(self.metrics_noise_multiplier or math.inf)
            both = self.noise_multiplier if not metrics else composition.multiplier(square)
            return Mechanisms(sums=(Run(0, self.rounds, 0.0 if math.isinf(square) else both),))
        if self.kind == "banded_mf":
            return Mechanisms(beside=metrics, correlated=(Correlated(everything, self.bands),))
        if self.kind == "tree_aggregation":
            return Mechanisms(beside=metrics, correlated=(Correlated(everything),))
        return Mechanisms(beside=metrics, correlated=tuple(self._restarting()))

    def _release(self, position: int) -> Sequence[Event]:
        events: tuple[Event, ...]
        z = self.noise_multiplier
        match self.kind:
            case "fixed_gaussian":
                events = (GaussianEvent(z),)
            case "adaptive_gaussian":
                split = split_noise(z, self.report_goal)
                events = (GaussianEvent(split.value_multiplier), GaussianEvent(split.bit_deviation / BIT))
            case "tree_aggregation":
                events = (TreeEvent(z, position + 1),)
            case "banded_mf":
                events = (BandedEvent(z, self.bands, position + 1),)
            case _:
                split, step = split_noise(z, self.report_goal), self._step(position)
                events = (TreeEvent(split.value_multiplier, step), TreeEvent(split.bit_deviation / BIT, step))
        return (*events, GaussianEvent(self.metrics_noise_multiplier)) if self.metrics_noise_multiplier else events

    def _first(self) -> int:
        """Rounds of the first tree, if there is a second."""
        return self.restart_offset % self.restart_period or self.restart_period

    def _step(self, position: int) -> int:
        first = self._first()
        return position + 1 if position < first else (position - first) % self.restart_period + 1

    def _restarting(self) -> list[Correlated]:
        z, first = self.noise_multiplier, min(self._first(), self.rounds)
        full, last = divmod(self.rounds - first, self.restart_period)
        trees = [Correlated((Run(0, first, z),))]
        if full:
            trees.append(Correlated((Run(first, self.restart_period, z),), repeats=full))
        if last:
            trees.append(Correlated((Run(self.rounds - last, last, z),)))
        return trees


def planned_rounds(
    kind: str,
    noise_multiplier: float,
    rounds: int,
    *,
    report_goal: int,
    bands: int = 1,
    metrics_noise_multiplier: float = 0.0,
    restart_period: int = RESTART_PERIOD,
    restart_offset: int = RESTART_OFFSET,
) -> PlannedRounds:
    """The events of `rounds` rounds of a mechanism of `KINDS`; `metrics_noise_multiplier` 0: metrics leave un-noised.

    For `composition.TaskReleases`; costs nothing for any number of rounds. Raises ValueError for another kind.

    Formal guarantees: what the mechanism's releases put into the ledger, up to the rounding of noise multipliers to
    float32 (1e-7 relative).
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
    return PlannedRounds(
        kind, noise_multiplier, rounds, report_goal, bands, metrics_noise_multiplier, restart_period, restart_offset
    )


def calibrated_noise(planned: PlannedRounds, assumption: Assumption, target_epsilon: float, delta: float) -> float:
    """The smallest noise multiplier (to 1e-6, on the safe side) with which `planned` rounds meet the target.

    The multiplier within `planned` is not read; noise on metrics stays as it is. Raises ValueError if the metrics
    alone exceed the target.

    Formal guarantees: `composition.epsilon` of the rounds with the result is at most `target_epsilon`, for the
    adjacency and under the assumptions that it names.
    """

    def epsilon(noise_multiplier: float) -> float:
        rounds = replace(planned, noise_multiplier=noise_multiplier)
        return composition.epsilon([TaskReleases(rounds, assumption)], delta)

    if planned.metrics_noise_multiplier and epsilon(math.inf) > target_epsilon:
        raise ValueError("the metrics alone exceed the target: raise their noise multiplier")
    noise = _closed_form(planned, assumption, target_epsilon, delta)
    if noise is None:
        noise = _bisected(epsilon, target_epsilon)
    # Floating point may leave a closed form a trace above the target.
    step = 1e-9
    while epsilon(noise) > target_epsilon:
        noise *= 1 + step
        step *= 4
    return noise


def _closed_form(planned: PlannedRounds, assumption: Assumption, target: float, delta: float) -> float | None:
    """The multiplier, where one accountant's calibration gives it; None elsewhere."""
    parts = composition.parts_of([TaskReleases(replace(planned, noise_multiplier=1.0), assumption)])
    metrics = inverse_square(planned.metrics_noise_multiplier or math.inf)
    if parts.poisson and parts.square == 0:
        (one,) = parts.poisson
        whole = accounting.calibrate_noise(target, one.rounds, one.sampling_probability, delta)
    elif parts.fixed_size and parts.square == 0:
        (fixed,) = parts.fixed_size
        arguments = (fixed.rounds, fixed.sample_size, fixed.population, delta)
        whole = accounting.calibrate_fixed_size_noise(target, *arguments)
    elif parts.one_epoch and parts.square == 0 and not metrics:
        return accounting.calibrate_tree_noise(target, parts.one_epoch[0].rounds, delta)
    elif parts.one_epoch or not parts.square:
        return None
    else:
        beside = composition.parts_of([TaskReleases(replace(planned, noise_multiplier=math.inf), assumption)]).square
        own = parts.square - beside
        rest = accounting.calibrate_gaussian_noise(target, delta) ** -2 - beside
        return math.sqrt(own / rest) if rest > 0 else None
    rest = whole**-2 - metrics
    return rest**-0.5 if rest > 0 else None


def _bisected(epsilon: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    while epsilon(high) > target:
        low, high = high, 2 * high
        if high > 1e12:
            raise ValueError("no noise multiplier meets the target")
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon(middle) > target else (low, middle)
    return high
