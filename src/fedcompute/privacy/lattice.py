"""The lattice on which clipped contributions are summed as integers and noise is added."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.noise import NoiseSource

# Steps per clip norm, as a power of two: 2**31 contributions of at most 2**31 steps fit an int64.
_BITS = 30
_LEAST = -1022  # exponent of the least step that has an inverse
_BLOCK = 1 << 15  # elements


@dataclass(frozen=True)
class Lattice:
    """Multiples of `step` model units; a power of two that public parameters alone determine."""

    step: float


def lattice_for(clip_norm: float) -> Lattice:
    """The lattice of a clip norm: 2**30 to 2**31 steps per clip norm, fewer for one below 2**-992.

    Formal guarantees: depends on the clip norm alone, which is public; no contribution has a part in it.
    """
    return Lattice(step=2.0 ** max(math.floor(math.log2(clip_norm)) - _BITS, _LEAST))


def add_to_lattice(total: NDArray[np.int64], leaf: NDArray[np.floating], lattice: Lattice, factor: float = 1.0) -> None:
    """Multiplies each element by `factor` in float64, rounds it toward zero to a multiple of the step, adds that up.

    `total`: the sum in steps, contiguous, of the shape of `leaf`; changed in place. `factor`: at most 1.

    Formal guarantees: multiplication by a power of two is exact and truncation never increases a magnitude, so the L2
    norm of what is added, times the step, is at most the norm of `factor * leaf`: the sum's sensitivity stays the clip
    norm, with no rounding term to account for. The price is a bias of less than one step per element, 2**-30 of the
    clip norm.
    """
    sums, flat = total.reshape(-1), leaf.reshape(-1)
    scaled, multiples = np.empty(min(flat.size, _BLOCK), np.float64), np.empty(min(flat.size, _BLOCK), np.int64)
    # In blocks that stay in the cache; over the whole leaf each operation would go through memory.
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        size = block.size
        np.multiply(block, factor / lattice.step, out=scaled[:size], dtype=np.float64)
        # A conversion to integers truncates.
        multiples[:size] = scaled[:size]
        running = sums[start : start + size]
        np.add(running, multiples[:size], out=running)


def add_noise(
    total: NDArray[np.int64], standard_deviation: float, lattice: Lattice, noise: NoiseSource
) -> NDArray[np.int64]:
    """Adds discrete Gaussian noise of `standard_deviation` model units to each element of a lattice sum.

    Formal guarantees: the Gaussian mechanism over add-or-remove-one device, carried out on the lattice: sum and noise
    are integers and their addition is exact. With an L2 sensitivity C (see `add_to_lattice`) its noise multiplier is
    `standard_deviation` / C, with the sampler's distance (see `discrete_gaussian`).
    """
    return total + noise.gaussian(standard_deviation / lattice.step, total.size).reshape(total.shape)


def rounded_division(dividend: NDArray[np.int64], divisor: int) -> NDArray[np.int64]:
    """Divides by a positive integer and rounds to the nearest integer, halves up, all in integers.

    Formal guarantees: exact, so that total + rounded_division(n, d) = rounded_division(d * total + n, d): dividing
    noise is post-processing of a noised sum.
    """
    return (dividend + divisor // 2) // divisor
