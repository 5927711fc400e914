"""Who takes part in which round."""

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import OperationFailed, Reason

# A cohort is cut into a multiple of this many slices, so that as many threads are busy to its end.
_EVENLY = 4


def cohorts(
    counts: NDArray[np.int64], *, size: int, minimum_examples: int, minimum_separation: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """The clients of one round after the other, for ever: random samples of `size` without replacement.

    Only clients with `minimum_examples` take part, and each at most once in `minimum_separation` rounds. `counts`:
    examples by client. Raises OperationFailed (SETTINGS_INVALID) if there are too few.
    """
    eligible = np.flatnonzero(counts >= max(1, minimum_examples))
    apart = max(1, minimum_separation)
    if len(eligible) < size * apart:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"{len(eligible)} of {len(counts)} clients have {max(1, minimum_examples)} examples or more; rounds of "
            f"{size}, {apart} rounds apart, need {size * apart}",
            remedy="give more --clients, or lower the configuration's report_goal or minimum_separation",
        )
    return _samples(eligible, size, apart, np.random.default_rng(seed))


def slices(cohort: NDArray[np.int64], width: int) -> list[NDArray[np.int64]]:
    """The cohort in order, cut into nearly equal slices of at most `width`; how does not depend on who adds them up."""
    count = -(-len(cohort) // width)
    return np.array_split(cohort, min(len(cohort), -(-count // _EVENLY) * _EVENLY))


def _samples(
    eligible: NDArray[np.int64], size: int, apart: int, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    resting: deque[NDArray[np.int64]] = deque(maxlen=apart - 1)
    while True:
        free = np.setdiff1d(eligible, np.concatenate(resting), assume_unique=True) if resting else eligible
        cohort = generator.choice(free, size, replace=False)
        resting.append(cohort)
        yield cohort
