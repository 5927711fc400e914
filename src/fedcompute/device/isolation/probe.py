"""Finds out what of the sandbox holds on this machine, by confining a process that then tries what it may not."""

import dataclasses
import functools
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import msgspec

from fedcompute.device.isolation import privileges
from fedcompute.device.isolation.sandbox import RESTRICTIONS, Policy, Restriction, confine, require

_SECONDS = 20.0
_OUTPUT_BYTES = 1 << 16
_POLICY = Policy(readable=(), writable=(), memory=256 << 20, cpu_seconds=10, file_bytes=0)


@functools.cache
def probe() -> tuple[Restriction, ...]:
    """What a process that confines itself here cannot do: one Restriction for each key of RESTRICTIONS.

    A child process confines itself and tries each thing once; what it manages to do is reported as not enforced,
    whatever the kernel said. Takes about 0.2 s the first time, then the answer is kept. Never raises for a machine
    without isolation: if the child itself fails, nothing is enforced, and `why` says how it failed.
    """
    command = [sys.executable, "-P", "-m", "fedcompute.device.isolation.probe"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            report = msgspec.json.decode(_output(child), type=tuple[Restriction, ...])
        except (TimeoutError, msgspec.DecodeError) as error:
            child.kill()
            why = f"the probe failed with status {child.wait()}: {error}"
            report = tuple(Restriction(name, False, (), why) for name in RESTRICTIONS)
    return report


def check_isolation(*, strict: bool) -> list[str]:
    """What is not enforced here, a line each; at the start of a device.

    Raises OperationFailed (ISOLATION_UNAVAILABLE) instead, where `strict` asks for all of it.
    """
    report = probe()
    if strict:
        require(report)
    return [f"not enforced on this machine: {one.name}: {one.why}" for one in report if not one.enforced]


def _output(child: "subprocess.Popen[bytes]") -> bytes:
    """All that the child writes, up to the limit; raises TimeoutError."""
    assert child.stdout is not None
    deadline, output = time.monotonic() + _SECONDS, b""
    while len(output) < _OUTPUT_BYTES:
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no report in {_SECONDS:.0f} s")
        piece = os.read(child.stdout.fileno(), _OUTPUT_BYTES - len(output))
        if not piece:
            break
        output += piece
    return output


def _makes_a_socket() -> bool:
    socket.socket().close()
    return True


def _lists_files() -> bool:
    os.scandir("/").close()
    return True


def _makes_a_process() -> bool:
    if child := os.fork():
        os.waitpid(child, 0)
        return True
    os._exit(0)


def _signals_its_parent() -> bool:
    os.kill(os.getppid(), 0)
    return True


def _takes_memory() -> bool:
    mmap.mmap(-1, 2 * _POLICY.memory, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    return True


def _takes_time() -> bool:
    return resource.getrlimit(resource.RLIMIT_CPU)[0] > _POLICY.cpu_seconds


def _writes_files() -> bool:
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0


_TRIALS: Mapping[str, Callable[[], bool]] = {
    "network": _makes_a_socket,
    "files": _lists_files,
    "processes": _makes_a_process,
    "signals": _signals_its_parent,
    "privileges": lambda: privileges.capabilities() != 0,
    "memory": _takes_memory,
    "cpu_time": _takes_time,
    "file_size": _writes_files,
    "lifetime": lambda: privileges.parent_death_signal() != signal.SIGKILL,
}


def _tried(restriction: Restriction) -> Restriction:
    if not restriction.enforced:
        return restriction
    try:
        succeeded = _TRIALS[restriction.name]()
    except OSError:
        succeeded = False
    return dataclasses.replace(restriction, enforced=False, why="an attempt succeeded") if succeeded else restriction


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode([_tried(restriction) for restriction in confine(_POLICY)]))
