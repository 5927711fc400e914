import numpy as np
import pytest
from scipy import stats

from fedcompute.privacy.gaussian import FixedGaussian
from fedcompute.privacy.lattice import lattice_for
from fedcompute.privacy.noise import SeededNoise, SystemNoise


@pytest.mark.parametrize("source", [SystemNoise(), SeededNoise(7)])
def test_draws_follow_the_standard_normal_distribution(source):
    draws = source.standard_normal(200_001)
    assert draws.shape == (200_001,)
    # Fails once in 10**9 runs for a correct sampler.
    assert stats.kstest(draws, "norm").pvalue > 1e-9
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    half = len(draws) // 2
    assert abs(np.corrcoef(draws[:half], draws[half : 2 * half])[0, 1]) < 0.02


def test_system_noise_never_repeats_and_seeded_noise_always_does():
    assert not np.array_equal(SystemNoise().standard_normal(8), SystemNoise().standard_normal(8))
    np.testing.assert_array_equal(SeededNoise(1).standard_normal(8), SeededNoise(1).standard_normal(8))


def test_a_release_has_the_stated_deviation_over_the_report_goal_and_lies_on_the_lattice():
    mechanism = FixedGaussian(clip_norm=0.5, standard_deviation=0.2, report_goal=10.0)
    lattice = lattice_for(0.5)
    total = {"update/1/0": np.full(100_000, 3 << 30, np.int64)}
    mean = mechanism.release(total, lattice, SystemNoise())["update/1/0"]
    center = (3 << 30) * lattice.step / 10
    assert stats.kstest((mean - center) / 0.02, "norm").pvalue > 1e-9
    steps = mean * 10 / lattice.step
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert mechanism.event.noise_multiplier == pytest.approx(0.4)


def test_without_deviation_the_release_is_the_mean():
    mechanism = FixedGaussian(clip_norm=1.0, standard_deviation=0.0, report_goal=2.0)
    mean = mechanism.release({"a": np.array([1 << 31], np.int64)}, lattice_for(1.0), SystemNoise())
    assert mean["a"] == 1.0
