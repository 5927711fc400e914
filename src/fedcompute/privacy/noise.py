"""Sources of Gaussian noise on the lattice.

`SystemNoise` protects people; `SeededNoise` replays simulations and tests bit for bit. A server's update job constructs
`SystemNoise` itself; no setting, flag or request reaches the choice.
"""

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.discrete_gaussian import discrete_gaussian


class NoiseSource(Protocol):
    """Draws independent values of the discrete Gaussian distribution."""

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        """`count` independent draws with `deviation` lattice steps; see `discrete_gaussian`."""
        ...


class SystemNoise:
    """Draws from the operating system's generator.

    Formal guarantees: those of `discrete_gaussian`, with words from the kernel's cryptographic generator: nothing is
    seeded, stored or repeatable.
    """

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        return discrete_gaussian(deviation, count, _system_words)


class SilentNoise:
    """No noise at all, for states whose values do not matter.

    Formal guarantees: none.
    """

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        return np.zeros(count, np.int64)


class SeededNoise:
    """Repeatable draws for simulations and tests.

    Formal guarantees: none. Whoever knows the seed knows the noise.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Philox(seed)

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        return discrete_gaussian(deviation, count, self._words)

    def _words(self, count: int) -> NDArray[np.uint64]:
        return np.asarray(self._generator.random_raw(count), np.uint64)


@dataclass(frozen=True)
class Draw:
    """Draws made ahead of their use: `values` with `deviation` lattice steps. A secret."""

    deviation: float
    values: NDArray[np.int64] = field(repr=False)


class RecordedNoise:
    """Draws from `source` and keeps every draw in `draws`.

    Formal guarantees: those of `source`.
    """

    def __init__(self, source: NoiseSource) -> None:
        self._source = source
        self.draws: list[Draw] = []

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        values = self._source.gaussian(deviation, count)
        self.draws.append(Draw(deviation, values))
        return values


class DrawnNoise:
    """Hands out `draws` in their order, each once, as long as they are what is asked for; then draws from `source`.

    Formal guarantees: those of the source that the draws were recorded from, provided that they serve one release: two
    releases with the same draws differ by what no noise hides.
    """

    def __init__(self, draws: Iterable[Draw], source: NoiseSource) -> None:
        self._draws = deque(draws)
        self._source = source

    def gaussian(self, deviation: float, count: int) -> NDArray[np.int64]:
        if self._draws and self._draws[0].deviation == deviation and self._draws[0].values.size == count:
            return self._draws.popleft().values
        # What was made for another course of things is of no use here.
        self._draws.clear()
        return self._source.gaussian(deviation, count)


def _system_words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), np.uint64)
