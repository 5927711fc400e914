"""The lattice on which clipped contributions are summed as integers and noise is added."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Steps per clip norm, as a power of two: 2**31 contributions of at most 2**31 steps fit an int64.
_BITS = 30


@dataclass(frozen=True)
class Lattice:
    """Multiples of `step` model units; a power of two that public parameters alone determine."""

    step: float


def lattice_for(clip_norm: float) -> Lattice:
    """The lattice of a clip norm: 2**30 to 2**31 steps per clip norm."""
    return Lattice(step=2.0 ** (math.floor(math.log2(clip_norm)) - _BITS))


def to_lattice(leaves: Mapping[str, NDArray[np.float64]], lattice: Lattice) -> dict[str, NDArray[np.int64]]:
    """Rounds each element toward zero to a multiple of the step; returns the integer multiples.

    Formal guarantees: division by a power of two is exact and truncation never increases a magnitude, so the L2 norm
    of the result times the step is at most the norm of `leaves`: the sum's sensitivity stays the clip norm, with no
    rounding term to account for. The price is a bias of less than one step per element, 2**-30 of the clip norm.
    """
    return {name: np.trunc(leaf / lattice.step).astype(np.int64) for name, leaf in leaves.items()}


def add_rounded_noise(
    total: NDArray[np.int64], noise: NDArray[np.float64], standard_deviation: float, lattice: Lattice
) -> NDArray[np.int64]:
    """Adds `standard_deviation * noise`, rounded to the lattice, to a lattice sum of the same number of elements.

    `noise`: standard normal draws, flat; `standard_deviation`: model units.

    Formal guarantees: `total` lies on the lattice, so total + round(z) = round(total + z): rounding is post-processing
    of the Gaussian mechanism and costs no privacy. Beyond that, the guarantees of the noise source.
    """
    rounded = np.rint(noise * (standard_deviation / lattice.step)).astype(np.int64)
    return total + rounded.reshape(total.shape)
