"""Adaptive clipping: a clip norm that follows a quantile of the devices' update norms (arXiv 1905.03871)."""

import math
from dataclasses import dataclass

TARGET_QUANTILE = 0.5
LEARNING_RATE = 0.2
# A device's bit is +0.5 or -0.5: sensitivity 0.5, and 0.5 is a whole number of steps.
BIT = 0.5
BIT_STEP = 2.0**-20


@dataclass(frozen=True)
class NoiseSplit:
    """Noise of one adaptive release: `value_multiplier` times the clip norm on the sum, `bit_deviation` on the bits."""

    value_multiplier: float
    bit_deviation: float  # devices


def split_noise(noise_multiplier: float, report_goal: float) -> NoiseSplit:
    """Divides a release's noise between sum and bits, with the bits' deviation at a twentieth of the report goal.

    Raises ValueError if `noise_multiplier` is not below a tenth of the report goal: the bits alone would then tell
    more than the whole release may.

    Formal guarantees: the two releases together are as private as one Gaussian release with `noise_multiplier`:
    value_multiplier**-2 + (2 * bit_deviation)**-2 = noise_multiplier**-2, the bits having sensitivity 1/2.
    Source: arXiv 1905.03871, theorem 1; spec/artifacts.md 9.2.
    """
    deviation = 0.05 * report_goal
    if noise_multiplier == 0:
        return NoiseSplit(0.0, 0.0)
    if noise_multiplier >= 2 * deviation:
        raise ValueError(f"noise multiplier {noise_multiplier} is not below a tenth of the report goal {report_goal}")
    return NoiseSplit((noise_multiplier**-2 - (2 * deviation) ** -2) ** -0.5, deviation)


def moved_estimate(estimate: float, noised_bits: float, report_goal: float, target: float, rate: float) -> float:
    """The estimate after one round: geometric steps towards the `target` quantile, at `rate`.

    `noised_bits`: sum of the devices' bits with its noise.

    Formal guarantees: post-processing of the noised bits.
    """
    below = min(1.0, max(0.0, noised_bits / report_goal + BIT))
    return estimate * math.exp(-rate * (below - target))
