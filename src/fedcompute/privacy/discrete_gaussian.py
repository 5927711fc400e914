"""Gaussian noise on the integers: the sampler of Canonne, Kamath and Steinke over arrays (arXiv 2004.00010)."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Above it squares of draws would leave float64's exact integers.
MAX_DEVIATION = 2.0**50
# Candidates at a time: what stays in a processor's cache.
_BATCH = 1 << 16
# exp(-1) in units of 2**-64, rounded down.
_INVERSE_E = np.uint64(0x5E2D58D8B3BCDF1A)

Words = Callable[[int], NDArray[np.uint64]]


def discrete_gaussian(deviation: float, count: int, words: Words) -> NDArray[np.int64]:
    """`count` independent draws x with probability proportional to exp(-x**2 / (2 * deviation**2)), integers.

    `deviation`: in lattice steps, 0 for no noise; `words(n)`: n independent uniform 64-bit words. Raises ValueError for
    a deviation that is negative, not finite or above `MAX_DEVIATION`.

    Formal guarantees: adding one draw per element to an integer vector of L2 sensitivity D (add-or-remove-one device)
    satisfies (D / deviation)**2 / 2 concentrated DP (theorem 4 of the paper), and no floating-point number leaves: the
    attack of Mironov 2012 has nothing to work on. Candidates, their tests for exp(-1) and signs are exact to 2**-62;
    the other acceptance probabilities are float64 exponentials of arguments with an error below 2**-45, so that each
    probability of a value within 10 deviations is exact to a factor 1 +- 2**-43. A release of n elements is thereby at
    most n * 2**-42 away in epsilon from the ideal one (3e-7 for a million), and a value beyond 10 deviations adds
    2**-75 per element to delta. Accounting uses the continuous Gaussian: rounded to the lattice, which is
    post-processing, it differs from the discrete one within 10 deviations by a factor of 1 +- 4.2 / deviation**2. From
    2**23 steps on, as noise multipliers from 0.01 on have, that is no more than 2**-43 again; it is 2**-37 for a
    multiplier of 0.001, and 2**-29 for the one bit per round of a report goal of 1.
    """
    if not 0 <= deviation <= MAX_DEVIATION:
        raise ValueError(f"a deviation of {deviation} lattice steps is not between 0 and {MAX_DEVIATION:g}")
    if deviation == 0:
        return np.zeros(count, np.int64)
    result = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        # Between two and three candidates make a draw.
        drawn = _accepted(deviation, min(_BATCH, 3 * (count - filled) + 16), words)[: count - filled]
        result[filled : filled + drawn.size] = drawn
        filled += drawn.size
    return result


def _accepted(deviation: float, candidates: int, words: Words) -> NDArray[np.int64]:
    """The accepted ones of so many candidates from a two-sided geometric distribution of scale t."""
    # A power of two near the deviation: any scale is right, this one makes uniform integers and their ratios exact.
    scale_bits = max(0, round(math.log2(deviation)))
    word = words(candidates)
    remainder = word & np.uint64((1 << scale_bits) - 1)
    kept = _exponential_coin(remainder.astype(np.float64) * 2.0**-scale_bits, words)
    word, remainder = word[kept], remainder[kept]
    magnitude = (remainder + (_successes(word.size, words) << np.uint64(scale_bits))).astype(np.int64)
    negative = word >> np.uint64(63) == 1
    # Zero has one sign.
    kept = ~(negative & (magnitude == 0))
    magnitude, negative = magnitude[kept], negative[kept]
    centre = deviation * (deviation * 2.0**-scale_bits)
    exponent = ((magnitude - centre) / deviation) ** 2 / 2
    whole = np.floor(exponent)
    kept = _successes(magnitude.size, words) >= whole
    kept[kept] = _exponential_coin((exponent - whole)[kept], words)
    drawn: NDArray[np.int64] = np.where(negative, -magnitude, magnitude)[kept]
    return drawn


def _exponential_coin(exponent: NDArray[np.float64], words: Words) -> NDArray[np.bool_]:
    """True with probability exp(-exponent), for exponents between 0 and 1."""
    return (words(exponent.size) >> np.uint64(1)) < (np.exp(-exponent) * 2.0**63).astype(np.uint64)


def _successes(count: int, words: Words) -> NDArray[np.uint64]:
    """How many coins of probability exp(-1) fall true before the first that does not."""
    successes = np.zeros(count, np.uint64)
    active = np.arange(count)
    while active.size:
        active = active[words(active.size) < _INVERSE_E]
        successes[active] += np.uint64(1)
    return successes
