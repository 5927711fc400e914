"""Limits of what an isolated process may use up, and the descriptors that it may keep."""

import os
import resource
from collections.abc import Collection
from pathlib import Path

_STACK_BYTES = 8 << 20
# Threads of one process where the kernel counts them for it alone, else of everything that the user runs.
_OWN_THREADS, _USER_THREADS = 1024, 8192
# SIGXCPU says why the process ended; a process that ignores it has this long until SIGKILL.
_GRACE_SECONDS = 1


def apply(
    *, memory: int, libraries: int, cpu_seconds: int, file_bytes: int, descriptors: int, counted_alone: bool
) -> None:
    """Lowers this process's limits for good; a limit that is lower already stays.

    `memory`: bytes of private memory, thread stacks included. `libraries`: bytes of address space beside it, for
    mapped files and for what allocators only reserve. `file_bytes`: size of a file that is written, also of one that
    is open already. `counted_alone`: whether a user namespace counts this process's threads alone.

    Formal guarantees: at most `memory` bytes are private and writable at any time (since Linux 4.7). A process that
    makes filled pages read-only to escape that count gets `memory + libraries` bytes, provided that nothing makes
    shared memory; pages of files that it reads are the kernel's to reclaim. The kernel counts no threads of uid 0.
    The number of files is not limited. Raises OSError.
    """
    limits = {
        "RLIMIT_DATA": (memory, memory),
        "RLIMIT_AS": (memory + libraries, memory + libraries),
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + _GRACE_SECONDS),
        "RLIMIT_FSIZE": (file_bytes, file_bytes),
        "RLIMIT_NOFILE": (descriptors, descriptors),
        "RLIMIT_NPROC": (_OWN_THREADS, _OWN_THREADS) if counted_alone else (_USER_THREADS, _USER_THREADS),
        "RLIMIT_STACK": (_STACK_BYTES, _STACK_BYTES),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
    }
    for name, (soft, hard) in limits.items():
        which = getattr(resource, name)
        _, present = resource.getrlimit(which)
        if present != resource.RLIM_INFINITY:
            soft, hard = min(soft, present), min(hard, present)
        resource.setrlimit(which, (soft, hard))


def close_descriptors(keep: Collection[int]) -> None:
    """Closes every descriptor but 0, 1, 2 and those in `keep`."""
    try:
        last = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    except OSError:
        last = 1 << 20
    first = 3
    for descriptor in sorted({number for number in keep if number > 2}):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, last + 1)
