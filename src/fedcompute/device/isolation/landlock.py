"""Landlock: the files that a process can reach from now on, and no others."""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedcompute.device.isolation import libc

# The same on every architecture that has both Landlock and Python.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG, REFER, TRUNCATE, IOCTL_DEV = 1 << 7, 1 << 8, 1 << 13, 1 << 14, 1 << 15
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = READ_FILE | READ_DIR
READ_WRITE_FILE = READ_FILE | WRITE_FILE | TRUNCATE
# No links, devices, pipes or sockets: whoever reads the directory afterwards must find plain files only.
CHANGE = READ | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR | REFER

NETWORK_VERSION, SCOPE_VERSION = 4, 6


@dataclass(frozen=True)
class Grant:
    """Rights to a file, or to a directory and all that is beneath it.

    `pinned`: a descriptor stays open that holds the path. Short of memory, the kernel makes the files of procfs anew,
    to which Landlock then knows no grant.
    """

    path: Path
    rights: int
    pinned: bool = False


def version() -> int:
    """The kernel's Landlock ABI, 1 or more. Raises OSError where Landlock is not built in or not switched on."""
    return libc.call("syscall", _CREATE_RULESET, None, 0, _VERSION_FLAG)


def handled(abi: int) -> tuple[int, int, int]:
    """What an ABI can refuse: rights to files, to TCP ports, and scopes (abstract sockets, signals)."""
    files = (1 << 13) - 1
    files |= REFER if abi >= 2 else 0
    files |= TRUNCATE if abi >= 3 else 0
    files |= IOCTL_DEV if abi >= 5 else 0
    return files, 0b11 if abi >= NETWORK_VERSION else 0, 0b11 if abi >= SCOPE_VERSION else 0


def ruleset(abi: int, grants: Iterable[Grant]) -> int:
    """A descriptor of the rules that grant this and refuse everything else that `abi` can refuse.

    A path that is not there or not reachable grants nothing. Raises OSError.
    """
    rights = handled(abi)
    words = 3 if abi >= SCOPE_VERSION else 2 if abi >= NETWORK_VERSION else 1
    attributes = struct.pack(f"{words}Q", *rights[:words])
    descriptor = libc.call("syscall", _CREATE_RULESET, libc.buffer(attributes), len(attributes), 0)
    for grant in grants:
        try:
            beneath = os.open(grant.path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        allowed = grant.rights & rights[0]
        if not grant.path.is_dir():
            allowed &= _OF_FILES
        libc.call("syscall", _ADD_RULE, descriptor, _PATH_BENEATH, libc.buffer(struct.pack("=Qi", allowed, beneath)), 0)
        if not grant.pinned:
            os.close(beneath)
    return descriptor


def enforce(descriptor: int) -> None:
    """Puts the rules on this thread and all that it starts, for good, and closes the descriptor.

    Formal guarantees: no file is opened, executed, listed, made, removed, renamed or (from ABI 3) truncated beyond
    the grants, through any path, link or inherited directory, and no process outside is traced; from ABI 4 no TCP
    port is bound or connected, from ABI 6 nothing outside is signalled. Files that are already open stay so.
    Landlock hides neither names nor attributes: stat, readlink and chdir still answer for every path that the
    user may search, and modes, owners and times are not its matter.
    Needs no_new_privs or CAP_SYS_ADMIN. Raises OSError.
    """
    try:
        libc.call("syscall", _RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)
