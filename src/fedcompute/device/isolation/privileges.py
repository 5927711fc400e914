"""Rights that a process gives up for good, and its end together with its parent."""

import errno
import itertools
import os
import signal
import struct

from fedcompute.device.isolation import libc

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 2, 4, 24
_PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 28, 38, 47, 4
# NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each with its lock, and the lock of KEEP_CAPS.
_SECURE_BITS = 0b11101111
_CAPABILITIES_VERSION = 0x20080522


def renounce() -> None:
    """Sets no_new_privs: no program that is executed, setuid or not, has more rights. Raises OSError."""
    libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop() -> None:
    """Empties all capability sets, also those of root, keeps others from reading this process, and sets umask 077.

    Formal guarantees: with no_new_privs nothing gives a capability back; what is left are the rights of the user's
    plain id. Where the bounding set cannot be emptied (a user without CAP_SETPCAP), no_new_privs makes it void.
    Raises OSError.
    """
    try:
        libc.call("prctl", _PR_SET_SECUREBITS, _SECURE_BITS, 0, 0, 0)
        for capability in itertools.count():
            libc.call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    except OSError as error:
        # EINVAL: the one after the last capability. EPERM: no CAP_SETPCAP.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
    libc.call("prctl", _PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = libc.buffer(struct.pack("Ii", _CAPABILITIES_VERSION, 0))
    libc.call("capset", header, libc.buffer(bytes(24)))
    libc.call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.umask(0o077)


def capabilities() -> int:
    """The union of the effective, permitted and inheritable sets, as bits."""
    header, sets = libc.buffer(struct.pack("Ii", _CAPABILITIES_VERSION, 0)), libc.buffer(bytes(24))
    libc.call("capget", header, sets)
    words: tuple[int, ...] = struct.unpack("6I", sets.raw)
    return words[0] | words[1] | words[2] | (words[3] | words[4] | words[5]) << 32


def parent_death_signal() -> int:
    """The signal that this process gets when its parent ends, 0 for none."""
    number = libc.buffer(bytes(4))
    libc.call("prctl", _PR_GET_PDEATHSIG, number, 0, 0, 0)
    return int.from_bytes(number.raw, "little")


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when `parent` ends; kills it at once if that has already happened.

    The kernel's measure is the thread that started this process: it must live as long as the process shall.
    Raises OSError.
    """
    libc.call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
