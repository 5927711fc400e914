"""L2 clipping of a device's update over all of its leaves together."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# A float32 clip on a device may exceed the bound by rounding, about 1e-6 relative (spec/artifacts.md 9).
NORM_TOLERANCE = 1e-4
_UNIT_ROUNDOFF = 2.0**-53  # float64
_BLOCK = 1 << 13  # elements


def global_norm(leaves: Mapping[str, NDArray[np.floating]]) -> float:
    """L2 norm over all elements of all leaves, in float64.

    Formal guarantees: none of its own; off by at most n/2 + 2 unit roundoffs of float64 for n elements, relative.
    """
    squares = 0.0
    scratch = np.empty(_BLOCK, np.float64)
    for leaf in leaves.values():
        flat = np.ravel(leaf)
        # Blocks of this size stay in the cache and are summed by one thread, so that no digit of the result depends on
        # how many there are.
        for start in range(0, flat.size, _BLOCK):
            block = scratch[: min(_BLOCK, flat.size - start)]
            block[...] = flat[start : start + _BLOCK]
            squares += float(np.dot(block, block))
    return math.sqrt(squares)


def clip_by_global_norm(leaves: Mapping[str, NDArray[np.floating]], clip_norm: float) -> dict[str, NDArray[np.float64]]:
    """Scales finite `leaves` down to an L2 norm of at most `clip_norm` over all of them; shapes are kept.

    Formal guarantees: the result's L2 norm is at most `clip_norm`, in exact arithmetic over the returned float64
    values. For n elements the computed norm is off by at most n/2 + 2 unit roundoffs (a sum of n rounded squares and a
    root, to first order), the factor and each product by 3 more; the margin of n + 16 covers them together in any
    order of summation. Leaves within the bound by that margin are returned as they are.
    Source: arXiv 1710.06963, section 2.2; Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    factor = clip_factor(global_norm(leaves), sum(leaf.size for leaf in leaves.values()), clip_norm)
    wide = {name: leaf.astype(np.float64) for name, leaf in leaves.items()}
    return wide if factor == 1.0 else {name: leaf * factor for name, leaf in wide.items()}


def clip_factor(norm: float, size: int, clip_norm: float) -> float:
    """What `clip_by_global_norm` multiplies each of `size` elements by, whose `global_norm` is `norm`; 1.0 for nothing.

    Formal guarantees: those of `clip_by_global_norm`, for products in float64.
    """
    safe = clip_norm * (1.0 - (size + 16) * _UNIT_ROUNDOFF)
    return 1.0 if norm <= safe else safe / norm
