"""Banded matrix factorization (DP-FTRL): correlated noise from a banded Toeplitz matrix (arXiv 2306.08153).

With S the sums of T rounds and C a lower triangular banded Toeplitz matrix, the mechanism noises C S and returns
C^-1 (C S + z) = S + C^-1 z. Small coefficients below C's diagonal make the noise of later rounds take back what
earlier rounds added.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.lattice import rounded_division
from fedcompute.privacy.noise import NoiseSource

# Coefficients are multiples of 1 / SCALE with 1 on the diagonal, so that noise stays in integers.
SCALE = 1 << 12
# Rounds that the search for coefficients looks at; longer tasks get the coefficients of so many.
_HORIZON = 1 << 14
# Of one round: 100 bands of it, and the draws of every deviation that there is, fit an int64 together.
_LARGEST_NOISE = 1 << 56


def optimal_coefficients(rounds: int, bands: int) -> tuple[float, ...]:
    """C's first column, diagonal first, that makes the released prefix sums of `rounds` rounds least noisy.

    Minimises the mean squared error of prefix sums at equal sensitivity over Toeplitz matrices with so many `bands`
    (equation 3 and section 4 of the paper), then rounds to multiples of 1 / `SCALE`. Raises ValueError for fewer than
    one band or round.

    Formal guarantees: none needed; whatever coefficients come out, `column_norm` gives the sensitivity of their matrix.
    """
    if min(rounds, bands) < 1:
        raise ValueError(f"{bands} bands over {rounds} rounds")
    horizon, bands = min(rounds, _HORIZON), min(rounds, bands)
    if bands == 1:
        return (1.0,)
    from scipy.optimize import minimize

    # Without bands the best matrix is close to the square root of the prefix sums: the series of (1 - x)^-1/2.
    start = np.cumprod(np.concatenate([[1.0], (np.arange(1, bands) - 0.5) / np.arange(1, bands)]))
    found = minimize(lambda tail: _logarithm_of_error(tail, horizon), start[1:], jac=True, method="L-BFGS-B")
    return (1.0, *(float(value) for value in np.rint(found.x * SCALE) / SCALE))


def prefix_error(coefficients: Sequence[float], rounds: int) -> float:
    """The mean, over `rounds` prefix sums, of their noise variance for a noise multiplier and clip norm of 1.

    In units of squared clip norms per element; 1 band gives (rounds + 1) / 2.

    Formal guarantees: none; it speaks of usefulness.
    """
    error, _ = _error(np.asarray(coefficients, np.float64), rounds)
    return error * column_norm(coefficients) ** 2


def column_norm(coefficients: Sequence[float]) -> float:
    """The L2 norm of C's column: what one participation with a sum of norm 1 adds to C S.

    Formal guarantees: for devices whose participations lie at least as many rounds apart as C has bands, the columns
    that one device touches have no row in common, so that k participations of norm at most the clip norm move C S by
    at most sqrt(k) * column_norm * clip norm in L2 (add-or-remove-one device; arXiv 2306.08153, theorem 2). Columns
    that the end of the task cuts short are shorter.
    """
    return math.sqrt(math.fsum(value * value for value in coefficients))


def are_usable(coefficients: Sequence[float]) -> bool:
    """Whether a matrix with this column has the form that `next_noise` needs.

    Formal guarantees: what passes has 1 on the diagonal and multiples of 1 / `SCALE` of at most 1 below it.
    """
    return (
        len(coefficients) > 0
        and coefficients[0] == 1
        and all(abs(value) <= 1 and float(value * SCALE).is_integer() for value in coefficients)
    )


def rounding_bound(elements: int, bands: int) -> float:
    """What rounding adds to the sensitivity of one participation, in lattice steps, for sums of so many elements.

    Formal guarantees: rounding moves each element by less than one step in each of the `bands` rounds in which one
    participation moves C S, and nothing elsewhere, so that their L2 norm together is below this; see `next_noise`.
    """
    return math.sqrt(elements * bands)


def next_noise(
    coefficients: Sequence[float], history: NDArray[np.int64], deviation: float, noise: NoiseSource
) -> NDArray[np.int64]:
    """The noise of a round for one leaf, in lattice steps, given that of the rounds before it.

    `history`: [bands - 1, ...shape], newest first, zeros before the first round; `deviation`: of z, lattice steps.
    Raises ValueError for noise that leaves the range in which this is exact.

    Formal guarantees: with noise y_t = round(z_t - sum_j c_j y_(t-j)), the release S_t + y_t equals z_t + round((C S)_t
    - sum_j c_j (S + y)_(t-j)): a function of earlier releases and of an integer with integer noise, in which a device
    moves that integer by less than one step more than (C S)_t, in elements where it moves it at all. That is the
    Gaussian mechanism over C S with the L2 sensitivity of `column_norm` plus `rounding_bound` (add-or-remove-one
    device), exactly, because all of it is computed in integers that do not overflow. Holds also when later sums
    depend on earlier releases (arXiv 2202.08312, theorem 2.1).
    """
    drawn = noise.gaussian(deviation, math.prod(history.shape[1:])).reshape(history.shape[1:])
    rest = np.zeros_like(drawn)
    for coefficient, earlier in zip(coefficients[1:], history, strict=True):
        factor = round(coefficient * SCALE)
        # Whole multiples of SCALE apart: their product with the factor would leave int64.
        drawn = drawn - factor * (earlier // SCALE)
        rest -= factor * (earlier % SCALE)
    result = drawn + rounded_division(rest, SCALE)
    if result.size and max(int(result.max()), -int(result.min())) > _LARGEST_NOISE:
        raise ValueError(f"correlated noise of more than {_LARGEST_NOISE} lattice steps")
    return result


def _logarithm_of_error(tail: NDArray[np.float64], rounds: int) -> tuple[float, NDArray[np.float64]]:
    coefficients = np.concatenate([[1.0], tail])
    error, slope = _error(coefficients, rounds)
    squared_norm = float(np.dot(coefficients, coefficients))
    gradient = slope / error + 2 * coefficients / squared_norm
    return math.log(error * squared_norm), gradient[1:]


def _error(coefficients: NDArray[np.float64], rounds: int) -> tuple[float, NDArray[np.float64]]:
    """The mean squared error of prefix sums for independent z of variance 1, and its gradient."""
    from scipy.signal import lfilter

    ones = np.ones(rounds)
    # Series of 1 / ((1 - x) c(x)): how z_s appears in the prefix sum s rounds later; and once more divided by c(x).
    response = lfilter([1.0], coefficients, ones)
    second = lfilter([1.0], coefficients, response)
    weights = np.arange(rounds, 0, -1) / rounds
    error = float(np.dot(weights, response**2))
    weighted = weights * response
    slope = np.array([-2 * np.dot(weighted[j:], second[: rounds - j]) for j in range(len(coefficients))])
    return error, slope
