"""Privacy loss distributions that are proven to lie above or below the true one, fast because they may be coarse.

A distribution here is the probability of each privacy loss log(P(output) / Q(output)) of an output drawn from P; what
counts is its hockey-stick curve H(epsilon) = E[(1 - exp(epsilon - loss))+], the least delta for each epsilon. If one
pair (P, Q) has the higher curve everywhere, so has every composition with it (arXiv 2106.08567, theorem 10).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Logarithms of the least and the greatest order of the exponential moments that bound tails.
_LOG_ORDERS = (math.log(1e-9), math.log(1e5))
# Whose exponential is beyond floating point.
_OVERFLOW = 709.0
# Floating point must not lift a loss onto the grid point above it; in intervals.
_MARGIN = 1e-5


@dataclass(frozen=True)
class SampledGaussian:
    """`rounds` Gaussian releases, each with the device in it with probability `sampling_probability` (1: always)."""

    sampling_probability: float
    noise_multiplier: float
    rounds: int

    def highest_loss(self, tail: float) -> float:
        """A loss that one release exceeds with probability at most `tail`."""
        from scipy import special

        z, q = self.noise_multiplier, self.sampling_probability
        exponent = (0.5 - float(special.ndtri(tail)) * z) / z**2
        return exponent + math.log(q) if exponent > 500 else math.log1p(q * math.expm1(exponent))

    def lowest_loss(self, tail: float) -> float:
        """A loss that one release that has the device falls short of with probability at most `tail`."""
        q = self.sampling_probability
        return math.log1p(-q) if q < 1 else -self.highest_loss(tail)


@dataclass(frozen=True)
class Losses:
    """Probabilities `masses[i]` of losses `lowest` + i * `interval`, `infinite` of an infinite one, `times` over."""

    lowest: float
    interval: float
    masses: Floats
    infinite: float
    times: int


@lru_cache(maxsize=32)
def upper_losses(release: SampledGaussian, interval: float, tail: float, *, removed: bool) -> Losses:
    """Losses above those of one release, on multiples of `interval`: connect-the-dots; the last few are remembered.

    Formal guarantees: adjacency add-or-remove-one device, `removed` says which. H equals the true curve at multiples
    of `interval` and is linear in exp(epsilon) between them, where the true curve is convex and so nowhere above; past
    the last multiple H keeps its value, while the true curve falls (arXiv 2207.04380). Hence H on a multiple of the
    interval, or cut off earlier, is higher still.
    """
    high, low = release.highest_loss(tail), release.lowest_loss(tail)
    if not removed:
        high, low = -low, -high
    bottom, top = math.floor(low / interval), math.ceil(high / interval)
    epsilons: Floats = np.arange(bottom, top + 1, dtype=np.float64) * interval
    deltas = _deltas(release, epsilons, removed=removed)
    steps = np.diff(deltas)
    # Beyond floating point it leaves nothing on the lower point.
    growth = math.expm1(interval) if interval < _OVERFLOW else math.inf
    masses = np.zeros_like(deltas)
    masses[0] = 1 - deltas[0]
    masses[:-1] += steps / growth
    masses[1:] += steps / math.expm1(-interval)
    return Losses(bottom * interval, interval, np.maximum(masses, 0.0), float(deltas[-1]), release.rounds)


def lower_losses(release: SampledGaussian, interval: float, tail: float) -> Losses:
    """Losses below those of one release whose device is removed, `interval` apart from an origin of their own.

    Formal guarantees: outputs are gathered into cells, which is post-processing and so lowers H; then the loss of each
    cell is rounded down to the grid by a higher probability under Q, which lowers H and that of every composition.
    Any choice of cells will do; this one makes the loss of a cell land just above the grid.
    """
    bottom, top = release.lowest_loss(tail), release.highest_loss(tail)
    first = _first_edge(release, bottom, top, interval)
    origin = float(_cell_losses(release, np.array([first]))[1][0])
    grid = origin + interval * np.arange(max(2, math.ceil((top - origin) / interval) + 1))
    edges = np.concatenate([[first], grid[1:-1] + 0.5 * interval])
    # A cell's mean loss is not its middle: shift its edges by what is missing, and half of that again.
    missing = np.maximum(0.0, grid[1:-1] - _cell_losses(release, edges)[1][1:-1])
    shift = np.zeros(len(edges))
    shift[1:] = missing
    shift[1:-1] = np.maximum(shift[1:-1], missing[1:])
    edges[1:] += np.minimum(1.5 * shift[1:] + 1e-4 * interval, 0.4 * interval)
    edges = np.maximum.accumulate(edges)
    masses, losses = _cell_losses(release, edges)
    origin = float(losses[0])
    steps = np.floor((losses - origin) / interval - _MARGIN)
    steps[0] = 0
    usable = (masses > 0) & (steps >= 0)
    gathered = np.bincount(steps[usable].astype(np.int64), weights=masses[usable])
    return Losses(origin, interval, gathered.astype(np.float64), 0.0, release.rounds)


@dataclass(frozen=True)
class Composed:
    """Losses of a composition: `masses` at rising `losses`, and `infinite`."""

    losses: Floats
    masses: Floats
    infinite: float

    def delta(self, epsilon: float) -> float:
        """H(epsilon)."""
        first = int(np.searchsorted(self.losses, epsilon, side="right"))
        return self.infinite - float((np.expm1(epsilon - self.losses[first:]) * self.masses[first:]).sum())

    def epsilon(self, delta: float) -> float:
        """The least epsilon >= 0 with H(epsilon) <= delta, to 1e-9 relative; infinite if there is none."""
        from scipy import optimize

        if self.infinite > delta:
            return math.inf
        if self.delta(0.0) <= delta:
            return 0.0
        high = float(self.losses[-1])
        return float(optimize.brentq(lambda epsilon: self.delta(epsilon) - delta, 0.0, high, xtol=1e-10, rtol=1e-9))


def window(parts: Sequence[Losses], tail: float) -> tuple[float, float]:
    """Losses between which the sum over all `parts` lies, but for probability `tail` on either side.

    Formal guarantees: Chernoff's bound, which holds with moments of any order; a search finds a good one.
    """
    low = math.fsum(one.lowest * one.times for one in parts)
    high = math.fsum((one.lowest + one.interval * (len(one.masses) - 1)) * one.times for one in parts)
    above, below = (_chernoff(parts, sign, tail) for sign in (1.0, -1.0))
    return max(low, -below), min(high, above)


def composed(parts: Sequence[Losses], within: tuple[float, float]) -> Composed:
    """The composition of all `parts`, which share their interval, over losses `within` a `window` of theirs.

    Formal guarantees: exact but for rounding and for the mass outside the window, which comes to lie somewhere inside:
    it is not taken off here, and not added to `infinite`.
    """
    from scipy import fft

    interval, (low, high) = parts[0].interval, within
    offset = sum(one.lowest * one.times for one in parts)
    first = math.floor((low - offset) / interval)
    length = fft.next_fast_len(max(2, math.ceil((high - offset) / interval) - first + 2), real=True)
    spectrum: NDArray[np.complex128] | None = None
    log_finite = 0.0
    for one in parts:
        folded = np.zeros(length)
        for start in range(0, len(one.masses), length):
            piece = one.masses[start : start + length]
            folded[: len(piece)] += piece
        own = fft.rfft(folded) ** one.times
        spectrum = own if spectrum is None else spectrum * own
        log_finite += one.times * math.log1p(-one.infinite)
    masses = np.roll(fft.irfft(spectrum, length), -(first % length))
    return Composed(offset + interval * (first + np.arange(length)), masses, -math.expm1(log_finite))


def _chernoff(parts: Sequence[Losses], sign: float, tail: float) -> float:
    """A number that `sign` times the sum over all `parts` exceeds with probability at most `tail`."""
    from scipy import optimize

    def bound(log_order: float) -> float:
        order = sign * math.exp(log_order)
        moments = math.fsum(one.times * _log_moment(one, order) for one in parts)
        return (moments - math.log(tail)) / abs(order)

    # It falls, then rises, with the order; a tenth beside the best one costs a hundredth of the distance to the mean.
    found = optimize.minimize_scalar(bound, bounds=_LOG_ORDERS, method="bounded", options={"xatol": 0.1})
    return float(found.fun)


def _log_moment(one: Losses, order: float) -> float:
    """log E[exp(order * loss)] of the finite losses."""
    exponents = order * (one.lowest + one.interval * np.arange(len(one.masses)))
    highest = float(max(exponents[0], exponents[-1]))
    return highest + math.log(float((np.exp(exponents - highest) * one.masses).sum()) + np.finfo(float).tiny)


def _first_edge(release: SampledGaussian, bottom: float, top: float, interval: float) -> float:
    """An edge half an `interval` above the mean loss of the cell below it; near that, or `top`, where there is none.

    That cell, which nearly every round may fall into where sampling is thin, sets the grid's origin and costs nothing.
    """
    low, high = bottom, top
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(_cell_losses(release, np.array([middle]))[1][0])
        # An empty cell has no mean.
        low, high = (low, middle) if math.isfinite(mean) and middle - mean > 0.5 * interval else (middle, high)
    return high


def _thresholds(release: SampledGaussian, losses: Floats) -> Floats:
    """Noise x at which the loss of a removed device is each of `losses`, for outputs -1 (with it) and 0 (without)."""
    q, z = release.sampling_probability, release.noise_multiplier
    if q == 1:
        return -0.5 - z**2 * losses
    with np.errstate(divide="ignore", invalid="ignore"):
        # log(1 + expm1(loss) / q), also where exp(loss) is beyond floating point; without a noise that has less loss.
        whole = np.where(losses > 30, losses - math.log(q), np.log1p(np.expm1(np.minimum(losses, 30.0)) / q))
        exact = np.where(losses > 30, np.log1p(-(1 - q) * np.exp(-np.maximum(losses, 30.0))), 0.0)
    thresholds: Floats = np.where(np.isnan(whole), np.inf, -0.5 - z**2 * (whole + exact))
    return thresholds


def _deltas(release: SampledGaussian, epsilons: Floats, *, removed: bool) -> Floats:
    """The true H at `epsilons`, made non-increasing against rounding."""
    from scipy import special

    q, z = release.sampling_probability, release.noise_multiplier
    if removed:
        x = _thresholds(release, epsilons)
        with_device = (1 - q) * special.ndtr(x / z) + q * special.ndtr((x + 1) / z)
        deltas = with_device - np.exp(epsilons + special.log_ndtr(x / z))
        deltas = np.where(np.isposinf(x), -np.expm1(np.minimum(epsilons, 0.0)), deltas)
    else:
        # An added device's losses are those of a removed one, turned around.
        x = -_thresholds(release, -epsilons)
        first, second = special.log_ndtr(x / z), special.log_ndtr((x - 1) / z)
        with np.errstate(divide="ignore"):
            without = np.logaddexp(np.log1p(-q) + first, math.log(q) + second)
        deltas = np.where(np.isneginf(x), 0.0, special.ndtr(x / z) - np.exp(epsilons + without))
    clipped: Floats = np.minimum.accumulate(np.clip(deltas, 0.0, 1.0))
    return clipped


def _cell_losses(release: SampledGaussian, edges: Floats) -> tuple[Floats, Floats]:
    """Probability and loss, device removed, of each cell between rising loss `edges`, and of the two beyond them."""
    from scipy import special

    q, z = release.sampling_probability, release.noise_multiplier
    x = np.concatenate([[np.inf], _thresholds(release, edges), [-np.inf]])

    def between(points: Floats) -> Floats:
        # Logarithms of differences of small numbers, on either side of the middle.
        below, above = special.log_ndtr(points / z), special.log_ndtr(-points / z)
        right = points[1:] > 0
        more, less = np.where(right, above[1:], below[:-1]), np.where(right, above[:-1], below[1:])
        logs: Floats = more + np.log1p(-np.exp(less - more))
        return np.where(np.isnan(logs), -np.inf, logs)

    with np.errstate(divide="ignore", invalid="ignore"):
        without = between(x)
        present = np.logaddexp(np.log1p(-q) + without, math.log(q) + between(x + 1))
        # What is too improbable for floating point is left out.
        losses = np.where(np.isneginf(without), -np.inf, present - without)
    return np.exp(present), losses
