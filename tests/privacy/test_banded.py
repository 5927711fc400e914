import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from fedcompute.privacy.banded import (
    SCALE,
    are_usable,
    column_norm,
    next_noise,
    optimal_coefficients,
    prefix_error,
    rounding_bound,
)
from fedcompute.privacy.noise import SeededNoise


def matrix(coefficients, rounds):
    return sum(np.diag(np.full(rounds - i, c), -i) for i, c in enumerate(coefficients) if i < rounds)


def noise_of(coefficients, rounds, size=1, deviation=3e9, seed=5):
    source, history, released = SeededNoise(seed), np.zeros((len(coefficients) - 1, size), np.int64), []
    for _ in range(rounds):
        released.append(next_noise(coefficients, history, deviation, source))
        history = np.concatenate([released[-1][np.newaxis], history])[: len(coefficients) - 1]
    return np.stack(released)


@pytest.mark.parametrize(("rounds", "bands"), [(64, 4), (256, 8), (1000, 16), (10, 10)])
def test_coefficients_are_as_good_as_those_of_jax_privacy(rounds, bands):
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz", reason="jax-privacy is not installed")
    theirs = toeplitz.optimize_banded_toeplitz(rounds, bands)
    ours = optimal_coefficients(rounds, bands)
    assert len(ours) == bands
    # Rounding to multiples of 1/4096 costs less than a millionth.
    assert prefix_error(ours, rounds) <= prefix_error([float(c / theirs[0]) for c in theirs], rounds) * (1 + 1e-6)
    # Their error speaks of the same matrix: the mean over prefix sums, float32 on their side.
    error = float(toeplitz.loss(np.array(ours), n=rounds))
    assert error == pytest.approx(prefix_error(ours, rounds), rel=1e-4)


@pytest.mark.parametrize(("rounds", "bands", "separation"), [(12, 3, 3), (12, 3, 5), (20, 4, 4)])
def test_one_device_moves_the_noised_product_by_at_most_the_stated_sensitivity(rounds, bands, separation):
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz", reason="jax-privacy is not installed")
    coefficients = optimal_coefficients(rounds, bands)
    product = matrix(coefficients, rounds)
    participations = math.ceil(rounds / separation)
    stated = math.sqrt(participations) * column_norm(coefficients)
    worst = 0.0
    for start in range(rounds):
        for gaps in itertools.product([separation, separation + 1, 2 * separation], repeat=participations - 1):
            at = [start, *(start + np.cumsum(gaps))]
            at = [int(index) for index in at if index < rounds]
            worst = max(worst, float(np.linalg.norm(product[:, at].sum(axis=1))))
    assert worst <= stated + 1e-12
    # Not loose either: columns at the end of the task are cut short, the others are not.
    assert worst >= 0.9 * stated
    theirs = toeplitz.minsep_sensitivity_squared(
        np.array(coefficients), min_sep=separation, max_participations=participations, n=rounds
    )
    assert stated**2 >= float(theirs) * (1 - 1e-6)


def test_the_recurrence_is_the_inverse_matrix_times_independent_draws():
    coefficients, rounds = optimal_coefficients(40, 5), 40
    released = noise_of(coefficients, rounds, size=3)
    source = SeededNoise(5)
    drawn = np.stack([source.gaussian(3e9, 3) for _ in range(rounds)])
    np.testing.assert_allclose(released, np.linalg.solve(matrix(coefficients, rounds), drawn), atol=rounds)


def test_each_release_is_a_function_of_the_noised_product_and_of_earlier_releases():
    coefficients, rounds = optimal_coefficients(12, 4), 12
    released = [int(value) for value in noise_of(coefficients, rounds)[:, 0]]
    source = SeededNoise(5)
    drawn = [int(source.gaussian(3e9, 1)[0]) for _ in range(rounds)]
    sums = [int(value) for value in np.random.default_rng(1).integers(-(2**32), 2**32, rounds)]
    exact = [Fraction(c) for c in coefficients]
    for t in range(rounds):
        noised = sum(exact[j] * sums[t - j] for j in range(min(4, t + 1))) + drawn[t]
        earlier = sum(exact[j] * (sums[t - j] + released[t - j]) for j in range(1, min(4, t + 1)))
        # Nearest integer, halves up.
        assert math.floor(noised - earlier + Fraction(1, 2)) == sums[t] + released[t]


def test_a_device_moves_what_the_integer_noise_hides_by_no_more_than_the_product_and_the_rounding_bound():
    rounds, bands, elements = 12, 4, 5
    coefficients = optimal_coefficients(rounds, bands)
    factors = [round(c * SCALE) for c in coefficients]
    generator = np.random.default_rng(3)
    releases = generator.integers(-(2**32), 2**32, (rounds, elements)).astype(object)
    sums = generator.integers(-(2**32), 2**32, (rounds, elements)).astype(object)
    for _ in range(200):
        own = np.trunc(generator.normal(size=elements) * generator.choice([1.0, 50.0, 1e6])).astype(int).astype(object)
        without = sums.copy()
        without[3] = without[3] - own

        def hidden(given):
            # S_t + y_t - z_t, from the sums and what was released before: what one more draw is added to.
            return np.array(
                [
                    given[t]
                    - (
                        sum(factors[j] * (releases[t - j] - given[t - j]) for j in range(1, min(bands, t + 1))) * 2
                        - SCALE
                    )
                    // (2 * SCALE)
                    if t
                    else given[t]
                    for t in range(rounds)
                ],
                dtype=object,
            )

        moved = float(np.sqrt(float(((hidden(sums) - hidden(without)) ** 2).sum())))
        size = math.sqrt(float((own**2).sum()))
        assert moved <= column_norm(coefficients) * size + rounding_bound(elements, bands)


def test_the_largest_noise_that_may_be_drawn_is_exact():
    coefficients, rounds = optimal_coefficients(64, 8), 64
    deviation = 2.0**50
    released = noise_of(coefficients, rounds, size=2000, deviation=deviation).astype(object)
    source, factors = SeededNoise(5), [round(c * SCALE) for c in coefficients]
    for t in range(rounds):
        drawn = source.gaussian(deviation, 2000).astype(object)
        total = drawn * SCALE - sum(factors[j] * released[t - j] for j in range(1, min(8, t + 1)))
        assert ((total + SCALE // 2) // SCALE == released[t]).all()


def test_noise_that_grows_without_bound_is_refused_before_it_leaves_int64():
    # The inverse of this matrix holds the numbers of Fibonacci.
    with pytest.raises(ValueError, match="lattice steps"):
        noise_of((1.0, -1.0, -1.0), 100)


def test_prefix_sums_are_far_less_noisy_than_with_independent_noise():
    rounds, bands = 400, 16
    coefficients = optimal_coefficients(rounds, bands)
    deviation = 3e9
    sums = np.cumsum(noise_of(coefficients, rounds, size=4000, deviation=deviation), axis=0) / deviation
    measured = float((sums**2).mean()) * column_norm(coefficients) ** 2
    assert measured == pytest.approx(prefix_error(coefficients, rounds), rel=0.05)
    assert measured < 0.2 * (rounds + 1) / 2


def test_one_band_is_independent_noise():
    assert optimal_coefficients(500, 1) == (1.0,)
    assert prefix_error((1.0,), 9) == pytest.approx(5.0)
    source = SeededNoise(9)
    np.testing.assert_array_equal(noise_of((1.0,), 3, seed=9), [source.gaussian(3e9, 1) for _ in range(3)])


def test_more_bands_never_hurt_and_coefficients_have_the_form_that_integers_need():
    errors = [prefix_error(optimal_coefficients(300, bands), 300) for bands in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    for bands in (1, 2, 33):
        coefficients = optimal_coefficients(300, bands)
        assert are_usable(coefficients)
        assert all(float(c * SCALE).is_integer() for c in coefficients)


@pytest.mark.parametrize("coefficients", [(), (0.5, 0.1), (1.0, 1e-9), (1.0, 2.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_matrix_of_another_form_is_not_usable(coefficients):
    assert not are_usable(coefficients)


@pytest.mark.parametrize(("rounds", "bands"), [(0, 1), (1, 0)])
def test_no_rounds_and_no_bands_are_refused(rounds, bands):
    with pytest.raises(ValueError, match="bands over"):
        optimal_coefficients(rounds, bands)
