"""Sources of standard normal noise.

`SystemNoise` protects people; `SeededNoise` replays simulations and tests bit for bit. A server's update job constructs
`SystemNoise` itself; no setting, flag or request reaches the choice.
"""

import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class NoiseSource(Protocol):
    """Draws independent standard normal values."""

    def standard_normal(self, count: int) -> NDArray[np.float64]:
        """`count` independent draws of N(0, 1), float64."""
        ...


class SystemNoise:
    """Standard normal draws from the operating system's generator (Box-Muller over 64-bit uniforms).

    Formal guarantees: the uniforms come from the kernel's cryptographic generator, nothing is seeded, stored or
    repeatable. The draws follow N(0, 1) up to float64 rounding and a tail cut at sqrt(128 ln 2) = 9.4 standard
    deviations, whose mass is below 2**-63 per draw; add that to delta per coordinate and release. Callers round the
    scaled draw to a lattice that is far coarser than float64's spacing, so low-order bits of the arithmetic
    (Mironov 2012) never leave.
    """

    def standard_normal(self, count: int) -> NDArray[np.float64]:
        pairs = (count + 1) // 2
        bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64)
        radius = np.sqrt(-2.0 * np.log((bits[:pairs].astype(np.float64) + 1.0) * 2.0**-64))
        angle = bits[pairs:].astype(np.float64) * (2.0**-64 * 2.0 * np.pi)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class SilentNoise:
    """No noise at all, for states whose values do not matter.

    Formal guarantees: none.
    """

    def standard_normal(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)


class SeededNoise:
    """Repeatable draws for simulations and tests.

    Formal guarantees: none. Whoever knows the seed knows the noise.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(seed))

    def standard_normal(self, count: int) -> NDArray[np.float64]:
        return self._generator.standard_normal(count)
