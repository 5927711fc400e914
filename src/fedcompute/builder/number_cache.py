"""Numbers that took long to compute, kept in the user's cache directory under what they depend on."""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
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


def number_path(folder: str, key: Sequence[object]) -> Path | None:
    """The file of the number with this key and today's version of dp-accounting; None where nothing is kept."""
    try:
        directory = cache_directory()
        accountant = version("dp-accounting")
    except (RuntimeError, PackageNotFoundError):
        # No home directory; no accountant whose version could be told.
        return None
    if directory is None:
        return None
    text = json.dumps([*(value if isinstance(value, str) else repr(value) for value in key), accountant])
    return directory / folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def read_number(path: Path | None, name: str) -> float | None:
    """The positive, finite number that a file holds under `name`; None for no file or one that is damaged."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            number = json.loads(file.read(_LIMIT))[name]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return float(number) if isinstance(number, float) and math.isfinite(number) and number > 0 else None


def write_number(path: Path | None, name: str, number: float) -> None:
    """Keeps a number; a failure is logged and costs the next reader its time."""
    if path is None:
        return
    scratch = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, scratch = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump({name: number}, file)
        Path(scratch).replace(path)
    except OSError as error:
        logger.warning("A computed %s could not be kept: %s", name, type(error).__name__)
        if scratch:
            Path(scratch).unlink(missing_ok=True)
