import math

import pytest

from fedcompute.privacy.adaptive import moved_estimate, split_noise


def test_the_split_of_noise_is_as_private_as_the_whole():
    split = split_noise(1.5, 40)
    assert split.bit_deviation == 2.0
    assert split.value_multiplier**-2 + (2 * split.bit_deviation) ** -2 == pytest.approx(1.5**-2)


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_noise_that_the_bits_alone_would_break_is_refused(noise):
    with pytest.raises(ValueError, match="tenth of the report goal"):
        split_noise(noise, 10)


def test_the_estimate_moves_against_the_share_below_it():
    assert moved_estimate(2.0, 0.0, 10, 0.5, 0.2) == 2.0
    assert moved_estimate(2.0, 5.0, 10, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.1))
    assert moved_estimate(2.0, -5.0, 10, 0.5, 0.2) == pytest.approx(2.0 * math.exp(0.1))
    # Noise beyond what devices can say is clamped.
    assert moved_estimate(2.0, 900.0, 10, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.1))
