"""Noise multipliers that were calibrated before, kept in the user's cache directory: one takes seconds to find."""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

logger = logging.getLogger(__name__)

_LIMIT = 4096


def cache_directory() -> Path | None:
    """FEDCOMPUTE_CACHE_DIR, else `fedcompute` in XDG_CACHE_HOME or ~/.cache; None if the first is set and empty."""
    own = os.environ.get("FEDCOMPUTE_CACHE_DIR")
    if own is not None:
        return Path(own) if own else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedcompute"


def calibrated(
    kind: str,
    arguments: tuple[float, ...],
    target: float,
    calibrate: Callable[[], float],
    epsilon: Callable[[float], float],
) -> float:
    """The result of `calibrate`, or an earlier one for the same `kind`, `arguments`, target and accountant version.

    Formal guarantees: `epsilon` of an earlier result is computed again and is at most `target`; a file that is damaged,
    or promises what does not hold, is replaced. So a wrong file can cost noise beyond need and never privacy.
    """
    path = _path(kind, arguments, target)
    if path is not None and (known := _read(path)) is not None and epsilon(known) <= target:
        logger.info("The noise multiplier for this privacy target was calibrated before.")
        return known
    noise = calibrate()
    # The accountant remembers it for the next build in this process, which will ask.
    epsilon(noise)
    if path is not None:
        _write(path, noise)
    return noise


def _path(kind: str, arguments: tuple[float, ...], target: float) -> Path | None:
    try:
        directory = cache_directory()
        accountant = version("dp-accounting")
    except (RuntimeError, PackageNotFoundError):
        # No home directory; no accountant whose version could be told.
        return None
    if directory is None:
        return None
    key = json.dumps([kind, [repr(value) for value in arguments], repr(target), accountant])
    return directory / "calibrations" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read(path: Path) -> float | None:
    try:
        with path.open("rb") as file:
            noise = json.loads(file.read(_LIMIT))["noise_multiplier"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return float(noise) if isinstance(noise, float) and math.isfinite(noise) and noise > 0 else None


def _write(path: Path, noise: float) -> None:
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"noise_multiplier": noise}, file)
        Path(name).replace(path)
    except OSError as error:
        # The next build calibrates again.
        logger.warning("A calibrated noise multiplier could not be kept: %s", type(error).__name__)
        if name:
            Path(name).unlink(missing_ok=True)
