"""The fixed Gaussian mechanism: clip, add up, add noise of a fixed scale, divide by the report goal."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.lattice import Lattice, add_noise
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.noise import NoiseSource


@dataclass(frozen=True)
class FixedGaussian:
    """Adds Gaussian noise of a fixed scale to a sum of clipped contributions.

    Formal guarantees: adjacency add-or-remove-one device per round; the lattice sum's L2 sensitivity is `clip_norm`
    (see `lattice.add_to_lattice`). Each release is a Gaussian event with noise multiplier `standard_deviation /
    clip_norm`; assumes that every contribution passed `clipping.clip_by_global_norm` with this clip norm on the
    server. The denominator is fixed, so the count of contributions is not released by it.
    Source: arXiv 1710.06963, section 2.2; spec/artifacts.md 9.1.
    """

    clip_norm: float  # L2, model units
    standard_deviation: float  # of the noise on the sum, model units
    report_goal: float  # fixed denominator, devices

    @property
    def event(self) -> GaussianEvent:
        return GaussianEvent(self.standard_deviation / self.clip_norm)

    def release(
        self, total: Mapping[str, NDArray[np.int64]], lattice: Lattice, noise: NoiseSource
    ) -> dict[str, NDArray[np.float64]]:
        """The noised mean over `report_goal` devices: one float64 array per leaf of `total`, same shapes.

        Formal guarantees: those of the class, for one call per sum; a second call on the same sum is a second release.
        """
        return {
            name: add_noise(leaf, self.standard_deviation, lattice, noise) * np.float64(lattice.step / self.report_goal)
            for name, leaf in total.items()
        }
