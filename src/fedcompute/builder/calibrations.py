"""Noise multipliers that were calibrated before: one takes seconds to find."""

import logging
from collections.abc import Callable

from fedcompute.builder.number_cache import number_path, read_number, write_number

logger = logging.getLogger(__name__)

_NAME = "noise_multiplier"


def calibrated(
    kind: str,
    arguments: tuple[object, ...],
    target: float,
    calibrate: Callable[[], float],
    epsilon: Callable[[float], float],
) -> float:
    """The result of `calibrate`, or an earlier one for the same `kind`, `arguments`, target and accountant version.

    Formal guarantees: `epsilon` of an earlier result is computed again and is at most `target`; a file that is damaged,
    or promises what does not hold, is replaced. So a wrong file can cost noise beyond need and never privacy.
    """
    path = number_path("calibrations", (kind, arguments, target))
    if (known := read_number(path, _NAME)) is not None and epsilon(known) <= target:
        logger.info("The noise multiplier for this privacy target was calibrated before.")
        return known
    noise = calibrate()
    # The accountant remembers it for the next build in this process, which will ask.
    epsilon(noise)
    write_number(path, _NAME, noise)
    return noise
