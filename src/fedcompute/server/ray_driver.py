"""The process between an executor and a Ray cluster: `python -m fedcompute.server.ray_driver`.

A process of its own because Ray ends whoever has joined a cluster that loses its head, sets signal handlers, and
writes where it likes. Its first line of standard input says which cluster; then frames come in there and go out at
standard output. It leaves when standard input closes, and takes along what it started.
"""

import asyncio
import json
import os
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import IO, Any, NoReturn

from fedcompute.errors import FedComputeError
from fedcompute.server.executors import LIVES
from fedcompute.server.job_data import BYTES_LIMIT
from fedcompute.server.ray_worker import Box, Worker, seal_for

AUTO = "auto"
_HEADER = struct.Struct(">BQQ")
_LOOK_SECONDS = 2.0
_CONNECT_SECONDS = 5.0
_LEAVE_SECONDS = 8.0
_LONGEST_PAUSE = 64.0
# What Ray moves for us is small; a bigger store is taken from the memory of others.
_LOCAL_STORE_BYTES = 256 << 20
# A node without CPUs for Ray must get no worker, and several engines may share the CPUs of the others.
_SHARE_OF_CPU = 0.001


class Frame(IntEnum):
    """What a frame says. Down: JOB. Up: the rest."""

    JOB = 0  # an encoded call
    REPLY = 1  # to the job of that number
    LOST = 2  # the job of that number lost its worker too often; text
    WORKERS = 3  # the number of workers that are ready
    NOTE = 4  # text for the log
    FAILED = 5  # there is no cluster; text


def write_frame(file: IO[bytes], kind: Frame, number: int, data: bytes = b"") -> None:
    """Writes one frame and flushes."""
    file.write(_HEADER.pack(kind, number, len(data)))
    file.write(data)
    file.flush()


def read_frame(file: IO[bytes]) -> tuple[Frame, int, bytes] | None:
    """The next frame; None at the end of the file. Raises ValueError for what is none."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    kind, number, size = _HEADER.unpack(header)
    if size > BYTES_LIMIT:
        raise ValueError(f"a frame of {size} bytes")
    data = file.read(size)
    return None if len(data) < size else (Frame(kind), number, data)


@dataclass(frozen=True)
class Cluster:
    """Which cluster. `address`: HOST:PORT, AUTO for the one that this machine is part of, None for one of its own below
    `directory`; `workers`: how many, 0: one for each CPU.
    """

    address: str | None
    workers: int
    directory: str | None


def lanes_of(nodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, int]:
    """How many workers each living node with CPUs gets: one for each of them, or `workers` in all if that is not 0.

    `nodes`: as `ray.nodes` tells them.
    """
    cpus = {str(one["NodeID"]): int(one["Resources"].get("CPU", 0)) for one in nodes if one["Alive"]}
    room = {node: cpus[node] for node in sorted(cpus) if cpus[node]}
    if workers == 0 or not room:
        return room
    lanes = dict.fromkeys(room, 0)
    for _ in range(workers):
        # Where the next one leaves the most of a CPU for each.
        lanes[min(room, key=lambda node: (lanes[node] + 1) / room[node])] += 1
    return lanes


@dataclass(order=True)
class _Job:
    number: int
    data: bytes = field(compare=False, repr=False)
    lives: int = field(compare=False, default=LIVES)


class _Spread:
    """Spreads jobs over workers, one on each CPU of each node, as nodes come and go."""

    def __init__(self, workers: int, report: Callable[[Frame, int, bytes], None]) -> None:
        import ray

        self._workers = workers
        self._report = report
        self._box = Box()
        self._actor: Any = ray.remote(num_cpus=_SHARE_OF_CPU, max_restarts=0)(Worker)
        self._jobs: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._lanes: dict[str, set[asyncio.Task[None]]] = {}
        self._pauses: dict[str, float] = {}
        self._ready = 0

    def add(self, job: _Job) -> None:
        self._jobs.put_nowait(job)

    async def run(self) -> None:
        """Watches the nodes until cancelled."""
        import ray

        while True:
            wanted = lanes_of(await asyncio.to_thread(ray.nodes), self._workers)
            for node in [node for node in self._lanes if node not in wanted]:
                self._note(f"node {node:.8} is gone")
                # Nobody would ever hear of a worker that was about to start, or has nothing to do.
                for lane in self._lanes.pop(node):
                    lane.cancel()
            missing = sum(wanted.values()) - sum(len(lanes) for lanes in self._lanes.values())
            for node, count in wanted.items():
                lanes = self._lanes.setdefault(node, set())
                # Where only so many workers are to be, those that are there stay when a node joins.
                for _ in range(min(missing, count - len(lanes))):
                    missing -= 1
                    lane = asyncio.create_task(self._lane(node))
                    lanes.add(lane)
                    lane.add_done_callback(lanes.discard)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _lane(self, node: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(node, soft=False)
        worker = self._actor.options(scheduling_strategy=where).remote(self._box.public_key)
        try:
            key = await worker.public_key.remote()
        except ray.exceptions.RayError as error:
            pause = self._pauses.get(node, 1.0)
            self._pauses[node] = min(2 * pause, _LONGEST_PAUSE)
            self._note(f"no worker starts on node {node:.8}: {_short(error)}")
            await asyncio.sleep(pause)
            return
        self._pauses.pop(node, None)
        self._count(1)
        try:
            while await self._next(worker, key):
                pass
        except (ray.exceptions.RayError, FedComputeError) as error:
            self._note(f"a worker on node {node:.8} is gone: {_short(error)}")
        finally:
            self._count(-1)
            # One that is only out of reach may still run what another runs now.
            ray.kill(worker)

    async def _next(self, worker: Any, key: bytes) -> bool:
        import ray

        job = await self._jobs.get()
        try:
            # A worker that was lost while it had nothing to do costs no job a life.
            await worker.public_key.remote()
            job.lives -= 1
            reply = self._box.open(await worker.run.remote(seal_for(key, job.data)))
        except (ray.exceptions.RayError, FedComputeError, asyncio.CancelledError) as error:
            if job.lives > 0:
                self.add(job)
            else:
                self._report(Frame.LOST, job.number, _short(error).encode())
            raise
        self._report(Frame.REPLY, job.number, reply)
        return True

    def _count(self, change: int) -> None:
        self._ready += change
        self._report(Frame.WORKERS, self._ready, b"")

    def _note(self, text: str) -> None:
        self._report(Frame.NOTE, 0, text.encode())


def main() -> None:
    """Joins or starts the cluster, spreads jobs until standard input closes, and leaves nothing behind."""
    frames = os.fdopen(os.dup(1), "wb")
    # Whatever prints must not print between frames.
    os.dup2(2, 1)
    cluster = Cluster(**json.loads(sys.stdin.buffer.readline(1 << 16)))
    try:
        _join(cluster)
    except (Exception, SystemExit) as error:
        write_frame(frames, Frame.FAILED, 0, f"{type(error).__name__}: {_short(error)}".encode())
        _leave(cluster, 1)
    import ray

    status = 0
    try:
        asyncio.run(_serve(cluster, frames))
    except Exception as error:
        write_frame(frames, Frame.FAILED, 0, f"{type(error).__name__}: {_short(error)}".encode())
        status = 1
    # A head that is lost at the same moment would be waited for.
    late = threading.Timer(_LEAVE_SECONDS, _leave, (cluster, 1))
    late.daemon = True
    late.start()
    ray.shutdown()
    _leave(cluster, status)


def _join(cluster: Cluster) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.address is None:
        import ray

        ray.init(
            address="local",
            num_cpus=cluster.workers or os.cpu_count(),
            num_gpus=0,
            object_store_memory=_LOCAL_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=cluster.directory,
            **options,
        )
        return
    if cluster.address != AUTO:
        host, _, port = cluster.address.rpartition(":")
        # Ray itself needs two minutes to find out.
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    import ray

    ray.init(address=cluster.address, **options)


async def _serve(cluster: Cluster, frames: IO[bytes]) -> None:
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    spread = _Spread(cluster.workers, lambda kind, number, data: write_frame(frames, kind, number, data))
    write_frame(frames, Frame.WORKERS, 0)

    def read() -> None:
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            loop.call_soon_threadsafe(spread.add, _Job(frame[1], frame[2]))
        loop.call_soon_threadsafe(end.set)

    threading.Thread(target=read, daemon=True).start()
    watching = asyncio.create_task(spread.run())
    ended = asyncio.create_task(end.wait())
    await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
    if watching.done():
        watching.result()


def _leave(cluster: Cluster, status: int) -> NoReturn:
    if cluster.directory is not None:
        shutil.rmtree(cluster.directory, ignore_errors=True)
    os._exit(status)


def _short(error: BaseException) -> str:
    # What happened comes first, and why last; between them are pages.
    lines = [one.strip() for one in str(error).splitlines() if one.strip()] or [type(error).__name__]
    return " ".join(one[:200] for one in dict.fromkeys((lines[0], lines[-1])))


if __name__ == "__main__":
    main()
