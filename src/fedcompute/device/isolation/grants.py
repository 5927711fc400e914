"""The files that Python and TensorFlow need to work at all, none of them anybody's data."""

import sys
from collections.abc import Iterator
from pathlib import Path

from fedcompute.device.isolation.landlock import READ, READ_WRITE_FILE, Grant

_PACKAGE = Path(__file__).resolve().parents[2]
_SYSTEM = (
    # Shared libraries, with locales and time zones
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/nix/store", "/gnu/store",
    "/etc/ld.so.cache", "/usr/share/locale", "/usr/share/zoneinfo", "/etc/localtime",
    "/dev/urandom",
)  # fmt: skip
# TensorFlow chooses kernels and sizes of thread pools by the processors, and ends without its own command line.
_TRAINING = ("/proc/cpuinfo", "/proc/self/cmdline", "/sys/devices/system/cpu")


def python_grants() -> Iterator[Grant]:
    """Python's own libraries, installed packages, this package, and the system's libraries, to be read.

    Of `sys.path` only directories of installed packages count: the working directory, PYTHONPATH and source trees may
    hold anything.
    """
    for prefix in {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}:
        yield Grant(Path(prefix, "lib"), READ)
        yield Grant(Path(prefix, "lib64"), READ)
    for directory in map(Path, sys.path):
        if directory.name in ("site-packages", "dist-packages"):
            yield Grant(directory, READ)
    yield Grant(_PACKAGE, READ)
    yield from (Grant(Path(path), READ) for path in _SYSTEM)
    yield Grant(Path("/dev/null"), READ_WRITE_FILE)


def training_grants() -> Iterator[Grant]:
    """What TensorFlow reads of the machine, beside Python."""
    return (Grant(Path(path), READ, pinned=path.startswith("/proc/")) for path in _TRAINING)
