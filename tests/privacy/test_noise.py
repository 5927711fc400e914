import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from scipy import stats

from fedcompute.privacy import discrete_gaussian
from fedcompute.privacy.discrete_gaussian import MAX_DEVIATION
from fedcompute.privacy.gaussian import FixedGaussian
from fedcompute.privacy.lattice import lattice_for
from fedcompute.privacy.noise import DrawnNoise, RecordedNoise, SeededNoise, SilentNoise, SystemNoise

# A correct sampler fails a test of system noise once in 10**9 runs: below the rate at which machines err.
FALSE_ALARM = 1e-9


@pytest.mark.parametrize("source", [SystemNoise(), SeededNoise(7)])
@pytest.mark.parametrize("deviation", [2.0**30, 3.1e8, 1.4142 * 2**31])
def test_at_the_deviations_of_real_tasks_draws_follow_the_normal_distribution(source, deviation):
    draws = source.gaussian(deviation, 200_001)
    assert draws.shape == (200_001,)
    assert draws.dtype == np.int64
    assert stats.kstest(draws / deviation, "norm").pvalue > FALSE_ALARM
    # Uncorrelated with their neighbours and between halves; 0.02 is nine deviations of the estimate.
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    half = len(draws) // 2
    assert abs(np.corrcoef(draws[:half], draws[half : 2 * half])[0, 1]) < 0.02


@pytest.mark.parametrize("source", [SystemNoise(), SeededNoise(8)])
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.5, 7.3, 40.0])
def test_at_small_deviations_every_integer_has_its_exact_probability(source, deviation):
    count = 300_000
    draws = source.gaussian(deviation, count)
    support = np.arange(-math.ceil(12 * deviation), math.ceil(12 * deviation) + 1)
    weights = np.exp(-(support**2) / (2 * deviation**2))
    expected = count * weights / weights.sum()
    observed = np.array([(draws == value).sum() for value in support])
    assert observed.sum() == count
    # Cells of at least 20 expected draws, where the chi-square approximation holds; the tails are one cell.
    large = expected >= 20
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 20:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM


def test_low_bits_are_uniform_so_that_nothing_of_the_arithmetic_shows():
    low = SystemNoise().gaussian(2.0**30, 1 << 18) & 0xFF
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > FALSE_ALARM


def test_the_coin_of_the_sampler_is_the_inverse_of_e_to_64_bits():
    getcontext().prec = 50
    assert int(discrete_gaussian._INVERSE_E) == int(Decimal(2) ** 64 * Decimal(-1).exp())


def test_the_exponentials_that_decide_acceptance_are_as_exact_as_stated():
    getcontext().prec = 50
    generator = np.random.default_rng(3)
    for exponent in (*generator.random(500), 0.0, 1 - 2**-53, 2**-40):
        exact = Decimal(-float(exponent)).exp()
        used = Decimal(int((np.exp(-np.float64(exponent)) * 2.0**63).astype(np.uint64))) / 2**63
        assert abs(used / exact - 1) < Decimal(2) ** -50


def test_system_noise_never_repeats_and_seeded_noise_always_does():
    assert not np.array_equal(SystemNoise().gaussian(1e9, 8), SystemNoise().gaussian(1e9, 8))
    np.testing.assert_array_equal(SeededNoise(1).gaussian(1e9, 8), SeededNoise(1).gaussian(1e9, 8))


def test_no_deviation_is_no_noise_and_silent_noise_is_none():
    assert not SystemNoise().gaussian(0.0, 5).any()
    assert not SilentNoise().gaussian(1e9, 5).any()
    assert SystemNoise().gaussian(1e9, 0).shape == (0,)


@pytest.mark.parametrize("deviation", [-1.0, math.nan, math.inf, 2 * MAX_DEVIATION])
def test_a_deviation_without_meaning_or_beyond_the_integers_is_refused(deviation):
    with pytest.raises(ValueError, match="lattice steps"):
        SystemNoise().gaussian(deviation, 1)


def test_the_largest_deviation_is_drawn():
    draws = SystemNoise().gaussian(MAX_DEVIATION, 20_000) / MAX_DEVIATION
    assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM


def test_a_release_has_the_stated_deviation_over_the_report_goal_and_lies_on_the_lattice():
    mechanism = FixedGaussian(clip_norm=0.5, standard_deviation=0.2, report_goal=10.0)
    lattice = lattice_for(0.5)
    total = {"update/1/0": np.full(100_000, 3 << 30, np.int64)}
    mean = mechanism.release(total, lattice, SystemNoise())["update/1/0"]
    center = (3 << 30) * lattice.step / 10
    assert stats.kstest((mean - center) / 0.02, "norm").pvalue > FALSE_ALARM
    steps = mean * 10 / lattice.step
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert mechanism.event.noise_multiplier == pytest.approx(0.4)


def test_without_deviation_the_release_is_the_mean():
    mechanism = FixedGaussian(clip_norm=1.0, standard_deviation=0.0, report_goal=2.0)
    mean = mechanism.release({"a": np.array([1 << 31], np.int64)}, lattice_for(1.0), SystemNoise())
    assert mean["a"] == 1.0


def test_draws_made_ahead_are_used_once_in_their_order_and_only_for_what_they_were_made():
    recorded = RecordedNoise(SystemNoise())
    first, second, third = (recorded.gaussian(deviation, 4) for deviation in (1e9, 2e9, 3e9))
    drawn = DrawnNoise(recorded.draws, SilentNoise())
    np.testing.assert_array_equal(drawn.gaussian(1e9, 4), first)
    np.testing.assert_array_equal(drawn.gaussian(2e9, 4), second)
    # Another deviation than was expected: neither this draw nor any after it.
    assert not drawn.gaussian(4e9, 4).any()
    assert not drawn.gaussian(3e9, 4).any()
    assert third.any()
    assert not DrawnNoise(recorded.draws, SilentNoise()).gaussian(1e9, 5).any()
    assert "values" not in repr(recorded.draws[0])
