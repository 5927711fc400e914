"""The system call filter of an isolated process: a list of what it may call, everything else is refused."""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedcompute.device.isolation import libc
from fedcompute.device.isolation.syscalls import FIRST_YOUNGER, NUMBERS

# Per machine: its column of NUMBERS and its AUDIT_ARCH value.
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _AND, _EQUAL, _GREATER, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
_ALLOW, _REFUSE, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]
"""One step of a classic BPF program: code, jump if true, jump if false, operand."""


@dataclass(frozen=True)
class Check:
    """Holds if the 32 bits of `argument` at `word` (0 low, 1 high), masked, are one of `values`.

    The kernel itself reads only the low word of every argument that is checked here, but for pointers.
    """

    argument: int
    values: Sequence[int]
    mask: int = 0xFFFFFFFF
    word: int = 0


# CLONE_VM, FS, FILES, SIGHAND and THREAD; free are the exit signal, SYSVSEM, SETTLS, DETACHED and the TID flags.
_THREAD, _THREAD_MASK = 0x10F00, 0xFFFFFFFF & ~0x17C00FF
# O_RDONLY, O_WRONLY, O_RDWR; O_TRUNC only with one that writes: before ABI 3, Landlock lets readers truncate.
_OPEN_MASK, _OPEN = 0o1003, (0, 1, 2, 0o1001, 0o1002)

CHECKED: Mapping[str, tuple[Check, ...]] = {
    "clone": (Check(0, (_THREAD,), _THREAD_MASK),),
    # Not MAP_SHARED with MAP_ANONYMOUS, nor MAP_GROWSDOWN, which the limit of private memory does not count.
    "mmap": (Check(3, (0x00, 0x01, 0x20), 0x121),),
    "open": (Check(1, _OPEN, _OPEN_MASK),),
    "openat": (Check(2, _OPEN, _OPEN_MASK),),
    # Duplicates and flags; not F_SETOWN (signals others), F_SETLEASE, F_NOTIFY (watches others), locks.
    "fcntl": (Check(1, (0, 1, 2, 3, 4, 1030, 1032)),),
    # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; not TIOCSTI (types into the terminal).
    "ioctl": (Check(1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
    # A connected pair of streams is a pipe; asyncio wakes its loop with one. Other kinds can be sent elsewhere.
    "socketpair": (Check(0, (1,)), Check(1, (1,), 0xF)),
    "sendto": (Check(4, (0,)), Check(4, (0,), word=1)),
    "prlimit64": (Check(0, (0,)),),
    # Reading the death signal, dumpable, the bounding set and no_new_privs; names of threads and of memory.
    "prctl": (Check(0, (2, 3, 15, 16, 23, 39, 0x53564D41)),),
    # ARCH_SET_FS, ARCH_GET_FS and the permission to use wide registers.
    "arch_prctl": (Check(0, (0x1002, 0x1003, 0x1021, 0x1022, 0x1023)),),
}
REFUSED: Mapping[str, int] = {
    # The C library then uses clone and openat, whose arguments a filter can see.
    "clone3": errno.ENOSYS,
    "openat2": errno.ENOSYS,
    "socket": errno.EACCES,
    "connect": errno.EACCES,
    "bind": errno.EACCES,
    "execve": errno.EACCES,
    "execveat": errno.EACCES,
}


def build(machine: str, pid: int) -> list[Instruction]:
    """The filter for `machine` ("x86_64", "aarch64") and the process `pid`, the only one that it may signal.

    Formal guarantees: a call runs only if NUMBERS names it, REFUSED does not, and the checks of CHECKED and of the
    two signalling calls hold; assuming that the tables are the kernel's. A call of a foreign architecture (i386 on
    x86_64) ends the process; the x32 numbers and those from FIRST_YOUNGER on give ENOSYS, all else EPERM. A filter
    does not see memory behind a pointer, so no call is allowed whose harm lies there.
    Raises OSError if there is no table for `machine`.
    """
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system call table for {machine}")
    column, architecture = ARCHITECTURES[machine]
    number = {name: numbers[column] for name, numbers in NUMBERS.items()}
    checked = {**CHECKED, "kill": (Check(0, (pid,)),), "tgkill": (Check(0, (pid,)),)}
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS)]
    program.append((_LOAD, 0, 0, _NUMBER))
    for name, checks in checked.items():
        if (value := number[name]) is not None:
            block = _block(checks)
            program += [(_EQUAL, 0, len(block), value), *block]
    for name, code in REFUSED.items():
        if (value := number[name]) is not None:
            program += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _REFUSE | code)]
    free = NUMBERS.keys() - checked.keys() - REFUSED.keys()
    for first, last in _runs(sorted(value for name in free if (value := number[name]) is not None)):
        program += [(_AT_LEAST, 0, 2, first), (_GREATER, 1, 0, last), (_RETURN, 0, 0, _ALLOW)]
    program += [(_AT_LEAST, 0, 1, FIRST_YOUNGER), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    program.append((_RETURN, 0, 0, _REFUSE | errno.EPERM))
    return program


def install(program: Sequence[Instruction]) -> None:
    """Puts a program before every later system call of this thread and of those that it starts, for good.

    Needs no_new_privs or CAP_SYS_ADMIN. Raises OSError if the kernel does not take it.
    """
    code = libc.buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = libc.buffer(struct.pack("HQ", len(program), ctypes.addressof(code)))
    libc.call("prctl", _PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0)


def confine() -> None:
    """Installs the filter for this machine and process; raises OSError."""
    install(build(platform.machine(), os.getpid()))


def _block(checks: Sequence[Check]) -> list[Instruction]:
    block: list[Instruction] = []
    for check in checks:
        block.append((_LOAD, 0, 0, _ARGUMENTS + 8 * check.argument + 4 * check.word))
        if check.mask != 0xFFFFFFFF:
            block.append((_AND, 0, 0, check.mask))
        # Each match jumps over the comparisons that are left and the refusal.
        block += [(_EQUAL, len(check.values) - index, 0, value) for index, value in enumerate(check.values)]
        block.append((_RETURN, 0, 0, _REFUSE | errno.EPERM))
    return [*block, (_RETURN, 0, 0, _ALLOW)]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers; `numbers` are sorted."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
