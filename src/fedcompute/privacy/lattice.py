"""The lattice on which clipped contributions are summed as integers and noise is added."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.noise import NoiseSource

# Steps per clip norm, as a power of two: 2**31 contributions of at most 2**31 steps fit an int64.
_BITS = 30
_BLOCK = 1 << 15  # elements


@dataclass(frozen=True)
class Lattice:
    """Multiples of `step` model units; a power of two that public parameters alone determine."""

    step: float


def lattice_for(clip_norm: float) -> Lattice:
    """The lattice of a clip norm: 2**30 to 2**31 steps per clip norm.

    Formal guarantees: depends on the clip norm alone, which is public; no contribution has a part in it.
    """
    return Lattice(step=2.0 ** (math.floor(math.log2(clip_norm)) - _BITS))


def to_lattice(
    leaves: Mapping[str, NDArray[np.floating]], lattice: Lattice, factor: float = 1.0
) -> dict[str, NDArray[np.int64]]:
    """Multiplies each element by `factor` in float64 and rounds it toward zero to a multiple of the step.

    Returns the integer multiples.

    Formal guarantees: division by a power of two is exact and truncation never increases a magnitude, so the L2 norm
    of the result times the step is at most the norm of `factor * leaves`: the sum's sensitivity stays the clip norm,
    with no rounding term to account for. The price is a bias of less than one step per element, 2**-30 of the clip
    norm.
    """
    return {name: _multiples(leaf, lattice.step, factor) for name, leaf in leaves.items()}


def add_noise(
    total: NDArray[np.int64], standard_deviation: float, lattice: Lattice, noise: NoiseSource
) -> NDArray[np.int64]:
    """Adds discrete Gaussian noise of `standard_deviation` model units to each element of a lattice sum.

    Formal guarantees: the Gaussian mechanism over add-or-remove-one device, carried out on the lattice: sum and noise
    are integers and their addition is exact. With an L2 sensitivity C (see `to_lattice`) its noise multiplier is
    `standard_deviation` / C, with the sampler's distance (see `discrete_gaussian`).
    """
    return total + noise.gaussian(standard_deviation / lattice.step, total.size).reshape(total.shape)


def rounded_division(dividend: NDArray[np.int64], divisor: int) -> NDArray[np.int64]:
    """Divides by a positive integer and rounds to the nearest integer, halves up, all in integers.

    Formal guarantees: exact, so that total + rounded_division(n, d) = rounded_division(d * total + n, d): dividing
    noise is post-processing of a noised sum.
    """
    return (dividend + divisor // 2) // divisor


def _multiples(leaf: NDArray[np.floating], step: float, factor: float) -> NDArray[np.int64]:
    flat = leaf.reshape(-1)
    multiples = np.empty(flat.size, np.int64)
    scratch = np.empty(min(flat.size, _BLOCK), np.float64)
    # In blocks that stay in the cache; over the whole leaf each operation would go through memory.
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        scaled = scratch[: block.size]
        np.multiply(block, factor, out=scaled, dtype=np.float64)
        np.divide(scaled, step, out=scaled)
        # A conversion to integers truncates.
        multiples[start : start + _BLOCK] = scaled
    return multiples.reshape(leaf.shape)
