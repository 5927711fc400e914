"""Proven bounds on epsilon in a moment, where the accountant's own answer takes up to a minute."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedcompute.privacy import losses
from fedcompute.privacy.accounting import gaussian_epsilon, loss_interval
from fedcompute.privacy.composition import Parts, TaskReleases, inverse_square, multiplier, parts_epsilon, parts_of
from fedcompute.privacy.losses import SampledGaussian

# Cells of one release, and for each of them of a composition: what the time goes into. So many parts have them each;
# more parts share as many, down to so few, and still more are not sampled parts any longer.
_CELLS = 1 << 17
_COMPOSED = 4
_SHARING, _FEWEST_CELLS = 16, 1 << 12
_MOST_PARTS = 4096
# Of delta: what is left to rounding errors, and what is cut off the ends of distributions.
_SLACK = 1e-3
_TAIL = 1e-5
# Less is without protection to the exact call. What shows how little it protects is more noise, and so many rounds.
_LITTLE_NOISE = 1e-3
_MORE_NOISE = 1e-2
# So much tells nothing, and nothing is told with so little probability, in floating point.
_MUCH_NOISE = 1e9
_LEAST_DELTA = 1e-200
# Beyond it exp(-loss) is 0 to the library, which then answers with more than epsilon.
_FAR = 700.0
# Rounding errors in probability: five times what transforms and powers lose, against numbers of 64 bits of mantissa.
_ROUNDING = 1e-12
_ROUNDING_PER_ROUND = 1e-15
# Of how many rounds a lower bound is tried besides that of all.
_FEWER_ROUNDS = (10**7, 10**6, 10**5)
# More rounds are bounded by moments as well, unless the parts are too many for their 10 ms each.
_MANY_ROUNDS = 10_000
_MOMENT_PARTS = 256
_LOW_ORDERS, _ORDERS = (1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75), (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)
_THIN = 0.1


@dataclass(frozen=True)
class Bounds:
    """`lower` <= epsilon <= `upper`; equal where the exact value is as fast.

    Up to 10,000 rounds, where delta is above 1e-8, `composition.epsilon` lies between them too; beyond, it may lie
    above `upper`.
    """

    lower: float
    upper: float


def epsilon_bounds(tasks: Sequence[TaskReleases], delta: float) -> Bounds:
    """Bounds on the epsilon at `delta` of all releases of `tasks` together, within two seconds; remembered.

    Formal guarantees: see `parts_bounds`; adjacency and assumptions as `composition.epsilon`.
    """
    return parts_bounds(parts_of(tasks), delta)


def within(tasks: Sequence[TaskReleases], epsilon: float, delta: float) -> bool:
    """Whether `composition.epsilon` is at most `epsilon`: by the bounds where they decide, else by the exact value.

    Formal guarantees: if true, the true epsilon is at most `epsilon`; if false, the exact call's value is above it.
    """
    parts = parts_of(tasks)
    bounds = parts_bounds(parts, delta)
    if bounds.upper <= epsilon:
        return True
    return bounds.lower <= epsilon and parts_epsilon(parts, delta) <= epsilon


def parts_bounds(parts: Parts, delta: float, cells: int = _CELLS) -> Bounds:
    """Bounds on `composition.parts_epsilon`; the exact value twice where that has a closed form or comes by RDP.

    `cells` per release: with fewer it takes less time and the bounds lie further apart. So they do for 10**6 rounds
    and more, and for a delta below 1e-8.

    Formal guarantees: both hold for the true epsilon of Poisson samples and Gaussian releases, add-or-remove-one
    device; see `parts_upper` and `parts_lower`.
    """
    upper = parts_upper(parts, delta, cells)
    return Bounds(min(upper, parts_lower(parts, delta, cells)), upper)


@lru_cache(maxsize=4096)
def parts_upper(parts: Parts, delta: float, cells: int = _CELLS) -> float:
    """The upper bound of `parts_bounds`; infinite where the exact call takes noise for none.

    Formal guarantees: a composition of distributions each above the true one (`losses.upper_losses`) on a multiple of
    the interval of the exact call, hence also above what that call composes; their cut-off tails, and twice the mass
    that the composition's window misses, count as infinite loss. A thousandth of delta is left for rounding errors and
    the exact call's own truncation (1e-15 per step), more for many rounds. Where that would leave less than half of
    delta, only two others count, which also decide beyond 10,000 rounds if they are smaller: Renyi moments (add or
    remove one, arXiv 1908.10530) and the Gaussian release that is as private without sampling, which amplifies.
    """
    if not _sampled(parts):
        return parts_epsilon(parts, delta)
    if min(one.noise_multiplier for one in parts.poisson) <= _LITTLE_NOISE:
        return math.inf
    releases = _releases(parts)
    rounds = sum(one.rounds for one in releases)
    slack = max(_SLACK * delta, _rounding(rounds))
    fine = slack <= delta / 2 and len(releases) <= _MOST_PARTS
    uppers = []
    if fine:
        # Always in the data, a device tells as much by coming as by going.
        directions = (True,) if all(one.sampling_probability == 1 for one in releases) else (True, False)
        # The next power of two: a ledger asks for one number of rounds after the other, which may share distributions.
        tail, target = _TAIL * delta / (1 << (rounds - 1).bit_length()), delta * (1 - 2 * _TAIL) - slack
        shared = _shared(cells, releases)
        uppers.append(max(_upper(releases, target, tail, shared, removed=removed) for removed in directions))
    if not fine or rounds > _MANY_ROUNDS:
        square = math.fsum(one.rounds * inverse_square(one.noise_multiplier) for one in releases)
        uppers.append(gaussian_epsilon(multiplier(square), delta))
        if len(releases) <= _MOMENT_PARTS:
            uppers.append(_moments_epsilon(releases, delta))
    return min(uppers)


@lru_cache(maxsize=4096)
def parts_lower(parts: Parts, delta: float, cells: int = _CELLS) -> float:
    """The lower bound of `parts_bounds`.

    Formal guarantees: distributions each below the true one (`losses.lower_losses`), the misplaced mass of the window
    taken off, and what rounding errors need, at least a thousandth of delta; the true epsilon is at most the exact
    call's. Fewer rounds are a part of what was released: where the grid's losses add up, a part of the rounds may show
    more than all. Too little noise is replaced by more: the releases made noisier.
    """
    if not _sampled(parts):
        return parts_epsilon(parts, delta)
    releases = [one for one in _releases(parts) if one.noise_multiplier < _MUCH_NOISE]
    if not 0 < len(releases) <= _MOST_PARTS:
        return 0.0
    delta = max(delta, _LEAST_DELTA)
    if min(one.noise_multiplier for one in releases) <= _LITTLE_NOISE:
        releases = [replace(one, noise_multiplier=max(one.noise_multiplier, _MORE_NOISE)) for one in releases]
    rounds, shared = sum(one.rounds for one in releases), _shared(cells, releases)
    lowers = [_lower(releases, delta, shared)]
    for fewer in _FEWER_ROUNDS:
        some = [replace(one, rounds=one.rounds * fewer // rounds) for one in releases]
        if fewer < rounds and (some := [one for one in some if one.rounds]):
            lowers.append(_lower(some, delta, shared))
    return max(lowers)


def _sampled(parts: Parts) -> bool:
    """Whether the exact value takes convolutions."""
    return bool(parts.poisson) and not parts.fixed_size and not math.isinf(parts.square)


def _releases(parts: Parts) -> list[SampledGaussian]:
    releases = [SampledGaussian(one.sampling_probability, one.noise_multiplier, one.rounds) for one in parts.poisson]
    square = parts.square + math.fsum(one.square for one in parts.one_epoch)
    return [*releases, SampledGaussian(1.0, multiplier(square), 1)] if square else releases


def _rounding(rounds: int) -> float:
    return _ROUNDING + rounds * _ROUNDING_PER_ROUND


def _shared(cells: int, releases: Sequence[SampledGaussian]) -> int:
    return max(min(cells, _FEWEST_CELLS), cells // -(-len(releases) // _SHARING))


def _moments_epsilon(releases: Sequence[SampledGaussian], delta: float) -> float:
    """An upper bound by Renyi moments."""
    import dp_accounting
    from dp_accounting import rdp

    # Its series for orders between whole ones converges for thin samples.
    thin = all(one.sampling_probability <= _THIN for one in releases)
    accountant = rdp.RdpAccountant(orders=[*(_LOW_ORDERS if thin else ()), *_ORDERS])
    for one in releases:
        gaussian = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(one.sampling_probability, gaussian), one.rounds)
    return float(accountant.get_epsilon(delta))


def _upper(releases: Sequence[SampledGaussian], target: float, tail: float, cells: int, *, removed: bool) -> float:
    """The upper bound at delta `target`, of one direction; `tail` of each round is cut off, and of all together."""
    interval = loss_interval(min(one.noise_multiplier for one in releases))
    width = max(one.highest_loss(tail) - one.lowest_loss(tail) for one in releases)
    interval *= max(1, math.ceil(width / interval / cells))
    outside = tail * sum(one.rounds for one in releases)
    parts = _uppers(releases, interval, tail, removed=removed)
    window = losses.window(parts, outside)
    if (coarser := math.ceil((window[1] - window[0]) / interval / (_COMPOSED * cells))) > 1:
        interval *= coarser
        parts = _uppers(releases, interval, tail, removed=removed)
        window = losses.window(parts, outside)
    composed = losses.composed(parts, window)
    upper = composed.epsilon(target)
    if upper < _FAR:
        return upper
    # P(loss >= l) <= H(l - c) / (1 - exp(-c)), and the library answers with a loss that still has probability delta.
    return min(c + composed.epsilon(-target * math.expm1(-c)) for c in (0.5, 1.0, 2.0, 4.0))


def _uppers(releases: Sequence[SampledGaussian], interval: float, tail: float, *, removed: bool) -> list[losses.Losses]:
    once = [losses.upper_losses(replace(one, rounds=1), interval, tail, removed=removed) for one in releases]
    return [replace(found, times=one.rounds) for found, one in zip(once, releases, strict=True)]


def _lower(releases: Sequence[SampledGaussian], delta: float, cells: int) -> float:
    """The lower bound at `delta`."""
    rounds = sum(one.rounds for one in releases)
    tail = _TAIL * delta / rounds
    width = max(one.highest_loss(tail) - one.lowest_loss(tail) for one in releases)
    interval = width / cells
    parts = [losses.lower_losses(one, interval, tail) for one in releases]
    window = losses.window(parts, _TAIL * delta)
    if (coarser := (window[1] - window[0]) / interval / (_COMPOSED * cells)) > 1:
        interval *= coarser
        parts = [losses.lower_losses(one, interval, tail) for one in releases]
        window = losses.window(parts, _TAIL * delta)
    return losses.composed(parts, window).epsilon(delta * (1 + 2 * _TAIL) + max(_SLACK * delta, _rounding(rounds)))
