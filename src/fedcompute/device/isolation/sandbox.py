"""What an isolated process may do, and the report of what holds (spec/device.md 5.5, 7.1)."""

import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from fedcompute.device.isolation import landlock, limits, namespaces, privileges, seccomp
from fedcompute.device.isolation.grants import python_grants, training_grants
from fedcompute.errors import OperationFailed, Reason

_Result = TypeVar("_Result")
_Mechanism = tuple[str, int]
"""A mechanism and the least level of it that counts: for Landlock its ABI, 1 for the others."""

_WORKER_DESCRIPTORS, _TRAINER_DESCRIPTORS = 128, 256
_WORKER_LIBRARIES, _TRAINER_LIBRARIES = 1 << 30, 4 << 30


@dataclass(frozen=True)
class Policy:
    """What one isolated process needs beyond Python itself.

    `readable`: files and directories that it may read. `writable`: directories in which it may make, write and remove
    files. `memory`: bytes of private memory. `cpu_seconds`: processor time of all its threads. `file_bytes`: size of
    the largest file that it may write. `trains`: whether it runs TensorFlow, which reads what processors and memory
    the machine has.
    """

    readable: Collection[Path]
    writable: Collection[Path]
    memory: int
    cpu_seconds: int
    file_bytes: int
    trains: bool = False


@dataclass(frozen=True)
class Restriction:
    """One thing that an isolated process cannot do.

    `name`: a key of RESTRICTIONS. `by`: the mechanisms that see to it. `why`: what the kernel said where one of its
    mechanisms is missing, empty if none is.
    """

    name: str
    enforced: bool
    by: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class _Mechanisms:
    """`sufficient`: sets of which one must be there whole. `further`: second lines of defence."""

    sufficient: tuple[tuple[_Mechanism, ...], ...]
    further: tuple[_Mechanism, ...] = ()


_SECCOMP, _LANDLOCK, _RLIMIT, _NO_NEW_PRIVILEGES = ("seccomp", 1), ("landlock", 1), ("rlimit", 1), ("no_new_privs", 1)
_SCOPES = ("landlock", landlock.SCOPE_VERSION)

RESTRICTIONS: Mapping[str, _Mechanisms] = {
    # No socket is made, connected or bound.
    "network": _Mechanisms(
        ((_SECCOMP,),), (("network namespace", 1), ("landlock", landlock.NETWORK_VERSION))
    ),
    # No file beyond the policy and Python is opened, listed or changed; Landlock leaves modes and times to seccomp.
    "files": _Mechanisms(((_LANDLOCK, _SECCOMP),)),
    # No process is made, traced or read, no program executed.
    "processes": _Mechanisms(((_SECCOMP,),), (_LANDLOCK, ("thread limit", 1))),
    # No other process is signalled.
    "signals": _Mechanisms(((_SECCOMP,), (_SCOPES,)), (_SCOPES,)),
    # No capability is held or regained.
    "privileges": _Mechanisms(((_NO_NEW_PRIVILEGES, ("capabilities", 1)),), (_SECCOMP,)),
    # Without seccomp, shared memory and child processes escape the limits.
    "memory": _Mechanisms(((_RLIMIT, _SECCOMP),)),
    "cpu_time": _Mechanisms(((_RLIMIT, _SECCOMP),)),
    "file_size": _Mechanisms(((_RLIMIT,),)),
    # It does not outlive its parent, nor does it leave anything behind that does.
    "lifetime": _Mechanisms(((("parent death signal", 1), _SECCOMP),)),
}  # fmt: skip


def confine(policy: Policy, keep: Collection[int] = (), *, parent: int | None = None) -> tuple[Restriction, ...]:
    """Confines the calling process for good, before anything of a developer or a plan is imported.

    `keep`: inherited descriptors beside 0, 1 and 2 that stay open; sockets among them go on working and must be
    connected streams, for no filter sees where a datagram socket sends. `parent`: the process whose end is this one's
    end, by default the present parent; name it, because a parent that has ended before this call is otherwise not
    noticed. HOME and TMPDIR become the first writable directory, if there is one. Returns what holds and what does
    not; `require` judges that. Call it in a fresh process, which a thread started that lives as long as the process
    shall. What prints to a file is cut off by `file_bytes` too; give it a pipe.

    Formal guarantees: after the call, and for every thread that comes later, each restriction that the report calls
    enforced holds against arbitrary code in the process, assuming that the kernel is not itself broken into, and that
    who reads a kept descriptor treats what comes as hostile. Python's installation, the system's libraries and
    `policy.readable` can be read. Not hidden are the names and attributes of files that the user may search, which
    processes there are, the clock, the host's name and load. Capabilities gone, root reads only what its id may.
    The number and the sum of the files written are not limited, only the size of each; with uid 0 nor is the number
    of threads.

    Raises OperationFailed with ISOLATION_UNAVAILABLE if the process has more than one thread or a path of the policy
    is not there; nothing has been restricted then.
    """
    threads = _thread_count()
    if threads > 1:
        raise OperationFailed(Reason.ISOLATION_UNAVAILABLE, f"confining a process that has {threads} threads already")
    absent = [path for path in policy.readable if not Path(path).exists()]
    absent += [path for path in policy.writable if not Path(path).is_dir()]
    if absent:
        raise OperationFailed(Reason.ISOLATION_UNAVAILABLE, f"{absent[0]}, which the policy grants, is not there")
    if sys.platform != "linux":
        why = f"{sys.platform} has no such mechanism"
        return tuple(Restriction(name, False, (), why) for name in RESTRICTIONS)
    return _report(*_apply(policy, keep, os.getppid() if parent is None else parent))


def require(report: Sequence[Restriction]) -> None:
    """Accepts only a report in which everything is enforced; raises OperationFailed with ISOLATION_UNAVAILABLE."""
    open_ends = [f"{each.name} ({each.why})" for each in report if not each.enforced]
    if open_ends:
        raise OperationFailed(
            Reason.ISOLATION_UNAVAILABLE, f"{len(open_ends)} restrictions are not enforced: {', '.join(open_ends)}"
        )


def _apply(policy: Policy, keep: Collection[int], parent: int) -> tuple[int, dict[str, str]]:
    """Puts on all that the kernel has; returns the Landlock ABI, and why which mechanisms are missing."""
    missing: dict[str, str] = {}

    def attempt(mechanism: str, function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result | None:
        try:
            return function(*arguments, **options)
        except OSError as error:
            missing[mechanism] = str(error.strerror or error)
            return None

    root = os.getuid() == 0
    limits.close_descriptors(keep)
    # Rules first: opening the granted paths may need the capabilities that go.
    abi = attempt("landlock", landlock.version) or 0
    rules = attempt("landlock", landlock.ruleset, abi, _grants(policy)) if abi else None
    in_user_namespace = attempt("network namespace", namespaces.enter)
    attempt(
        "rlimit",
        limits.apply,
        memory=policy.memory,
        libraries=_TRAINER_LIBRARIES if policy.trains else _WORKER_LIBRARIES,
        cpu_seconds=policy.cpu_seconds,
        file_bytes=policy.file_bytes if policy.writable else 0,
        descriptors=_TRAINER_DESCRIPTORS if policy.trains else _WORKER_DESCRIPTORS,
        counted_alone=bool(in_user_namespace),
    )
    if root:
        missing["thread limit"] = "the kernel does not count the threads of uid 0"
    elif "rlimit" in missing:
        missing["thread limit"] = missing["rlimit"]
    attempt("no_new_privs", privileges.renounce)
    attempt("capabilities", privileges.drop)
    # After the change of credentials, which may clear it.
    attempt("parent death signal", privileges.end_with_parent, parent)
    if rules is not None:
        attempt("landlock", landlock.enforce, rules)
    attempt("seccomp", seccomp.confine)
    # Bytecode would be written in vain, and modules found in vain in directories whose listing is remembered.
    sys.dont_write_bytecode = True
    sys.path_importer_cache.clear()
    if policy.writable:
        os.environ["HOME"] = os.environ["TMPDIR"] = str(next(iter(policy.writable)))
    return abi, missing


def _grants(policy: Policy) -> Iterator[landlock.Grant]:
    yield from python_grants()
    if policy.trains:
        yield from training_grants()
    yield from (landlock.Grant(Path(path), landlock.READ) for path in policy.readable)
    yield from (landlock.Grant(Path(path), landlock.CHANGE) for path in policy.writable)


def _report(abi: int, missing: Mapping[str, str]) -> tuple[Restriction, ...]:
    def lack(mechanism: _Mechanism) -> str:
        name, level = mechanism
        if name in missing:
            return missing[name]
        return f"ABI {abi}, {level} is needed" if name == "landlock" and abi < level else ""

    report = []
    for name, mechanisms in RESTRICTIONS.items():
        known = tuple(dict.fromkeys(chain(*mechanisms.sufficient, mechanisms.further)))
        enforced = any(not any(map(lack, one)) for one in mechanisms.sufficient)
        by = tuple(mechanism[0] for mechanism in known if not lack(mechanism))
        why = "; ".join(f"{mechanism[0]}: {lack(mechanism)}" for mechanism in known if lack(mechanism))
        report.append(Restriction(name, enforced, by, why))
    return tuple(report)


def _thread_count() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return threading.active_count()
