"""The first steps of an isolated process."""

import os
import sys
from pathlib import Path

import msgspec

from fedcompute.device.isolation.frames import ChildEnd
from fedcompute.device.isolation.messages import Confined, Start
from fedcompute.device.isolation.sandbox import Policy, confine


def enter() -> tuple[ChildEnd, Start]:
    """Confines this process as the device asks, over the descriptor that the command line names."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    end = ChildEnd(descriptor)
    start = msgspec.msgpack.decode(end.receive(), type=Start)
    end.limit = start.message_bytes
    policy = Policy(
        readable=tuple(Path(one) for one in start.readable),
        writable=tuple(Path(one) for one in start.writable),
        memory=start.memory,
        cpu_seconds=start.cpu_seconds,
        file_bytes=start.file_bytes,
        trains=start.trains,
    )
    end.send(Confined(confine(policy, keep=(descriptor,), parent=start.parent)))
    return end, start
