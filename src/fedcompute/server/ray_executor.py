"""Jobs on the nodes of a Ray cluster; Ray itself is joined by a process beside this one (`ray_driver`)."""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from fedcompute import tracing
from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.executors import Failure, settle
from fedcompute.server.job_data import decode_data, encode_data, name_of
from fedcompute.server.logs import current_logs, facts
from fedcompute.server.ray_driver import Cluster, Frame, read_frame, write_frame
from fedcompute.server.ray_worker import Call, Reply, log_lines

_LOG = logging.getLogger(__name__)
_START_SECONDS = 60.0
_LEAVE_SECONDS = 10.0
_LONGEST_LINE = 2_000


class RayExecutor:
    """Workers on every node of a cluster, one for each CPU, which start with the first job.

    When a worker or its node dies, its job runs again elsewhere; nodes that join get workers within seconds. When the
    cluster is lost or cannot be reached, jobs fail with CLUSTER_UNREACHABLE and the next one joins anew. Jobs are
    functions that the nodes can import too, and plain data (`job_data`).
    """

    def __init__(self, address: str | None, workers: int) -> None:
        """`address`: HOST:PORT of the head, None for a cluster of this machine alone; `workers`: 0 is every CPU."""
        if importlib.util.find_spec("ray") is None:
            raise OperationFailed(
                Reason.SETTINGS_INVALID, "Ray is not installed", remedy="pip install 'fedcompute[ray]'"
            )
        self._address = address
        self._workers = workers
        self._lock = threading.Lock()
        self._member: _Member | None = None
        self._closed = False

    def submit(self, job: Callable[[Any], Any], argument: Any) -> Future[Any]:
        """Queues `job(argument)`; see `Executor.submit`."""
        outcome: Future[Any] = Future()
        try:
            data = encode_data(Call(name_of(job), argument, facts(), tracing.origin(), current_logs()))
        except FedComputeError as error:
            outcome.set_exception(error)
            return outcome
        with self._lock:
            if self._closed:
                outcome.cancel()
            else:
                self._joined().run(outcome, data)
        return outcome

    def warm_up(self) -> None:
        """Joins the cluster, whose workers then start and import what jobs need."""
        with self._lock:
            if not self._closed:
                self._joined()

    @property
    def capacity(self) -> int:
        """Two for each worker: one that runs, one that is next."""
        member = self._member
        return 2 * max(1, member.workers if member is not None else self._workers)

    def close(self) -> None:
        """Leaves the cluster, which ends the workers; running jobs are cut off."""
        with self._lock:
            self._closed = True
            member, self._member = self._member, None
        if member is not None:
            member.close()

    def _joined(self) -> "_Member":
        if self._member is None or self._member.ended:
            self._member = _Member(self._address, self._workers)
        return self._member


class _Member:
    """The process that has joined a cluster, and the jobs that it has."""

    def __init__(self, address: str | None, workers: int) -> None:
        self.workers = 0  # that are ready
        self.ended = False
        self._where = "the local Ray cluster" if address is None else f"the Ray cluster at {address}"
        self._lock = threading.Lock()
        self._flights: dict[int, Future[Any]] = {}
        self._count = 0
        self._closing = False
        self._failure = "its process ended"
        # Of a cluster of its own; it holds logs and the object store's overflow, and goes with it.
        self._directory = tempfile.mkdtemp(prefix="fedcompute-ray-") if address is None else None
        self._cluster = Cluster(address, workers, self._directory)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedcompute.server.ray_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is for the server, which then ends it in order.
            start_new_session=True,
            env=_environment(address),
        )
        assert self._process.stdin is not None, "pipes were asked for"
        assert self._process.stdout is not None, "pipes were asked for"
        assert self._process.stderr is not None, "pipes were asked for"
        # A queue, because a pipe that is full must not keep up whoever asks.
        self._down: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._late = threading.Timer(_START_SECONDS, self._give_up)
        for work, file in (
            (self._write, self._process.stdin),
            (self._read, self._process.stdout),
            (self._listen, self._process.stderr),
        ):
            threading.Thread(target=work, args=(file,), daemon=True).start()
        self._late.daemon = True
        self._late.start()

    def run(self, outcome: Future[Any], data: bytes) -> None:
        """Sends a job; a process that has just ended fails it."""
        with self._lock:
            if not self.ended:
                self._count += 1
                self._flights[self._count] = outcome
                self._down.put((self._count, data))
                return
        settle(outcome, self._lost())

    def close(self) -> None:
        """Cancels what is under way and ends the process, politely, then not."""
        with self._lock:
            self._closing = True
            flights, self._flights = list(self._flights.values()), {}
        for outcome in flights:
            outcome.cancel()
        self._down.put(None)
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()

    def _give_up(self) -> None:
        self._failure = f"it did not answer within {_START_SECONDS:g} s"
        self._kill()

    def _kill(self) -> None:
        # Its group: a local cluster's processes end with the one that started them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _write(self, file: IO[bytes]) -> None:
        # It may be gone; whoever reads from it notices too.
        with contextlib.suppress(OSError), file:
            file.write(json.dumps(asdict(self._cluster)).encode() + b"\n")
            file.flush()
            while (job := self._down.get()) is not None:
                write_frame(file, Frame.JOB, *job)

    def _read(self, file: IO[bytes]) -> None:
        try:
            with file:
                while (frame := read_frame(file)) is not None:
                    self._late.cancel()
                    self._take(*frame)
        except ValueError as error:
            self._failure = f"its process wrote {error}"
            self._kill()
        self._end()

    def _take(self, kind: Frame, number: int, data: bytes) -> None:
        match kind:
            case Frame.REPLY:
                self._reply(number, data)
            case Frame.LOST:
                text = f"the job's worker process died: {data.decode(errors='replace')}"
                self._settle(number, Failure(Reason.INTERNAL, text))
            case Frame.WORKERS:
                self.workers = number
            case Frame.NOTE:
                _LOG.warning("%s: %s", self._where, data.decode(errors="replace"))
            case Frame.FAILED:
                self._failure = data.decode(errors="replace")

    def _reply(self, number: int, data: bytes) -> None:
        try:
            reply = decode_data(data)
        except FedComputeError as error:
            self._settle(number, Failure(error.reason, error.detail))
            return
        assert isinstance(reply, Reply), "a worker answers with a reply"
        log_lines(reply.lines)
        self._settle(number, reply.result)

    def _settle(self, number: int, result: Any) -> None:
        with self._lock:
            outcome = self._flights.pop(number, None)
        if outcome is not None:
            settle(outcome, result)

    def _end(self) -> None:
        self._late.cancel()
        self._process.wait()
        with self._lock:
            self.ended, self.workers = True, 0
            flights, self._flights = list(self._flights.values()), {}
            told = self._closing
        self._down.put(None)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        if not told:
            _LOG.warning("%s is lost: %s", self._where, self._failure)
        for outcome in flights:
            settle(outcome, self._lost())

    def _lost(self) -> Failure:
        return Failure(Reason.CLUSTER_UNREACHABLE, f"{self._where} cannot be reached: {self._failure}")

    def _listen(self, file: IO[bytes]) -> None:
        # Ray's own lines have no form that a log could keep.
        with file:
            while line := file.readline(_LONGEST_LINE):
                if text := line.decode(errors="replace").strip():
                    _LOG.info("ray: %s", text)


def _environment(address: str | None) -> dict[str, str]:
    """What the process is told: our own modules' places, none of our secrets, and Ray's silence about us."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("FEDCOMPUTE_")}
    found.pop("RAY_ADDRESS", None)
    found |= {
        "PYTHONPATH": os.pathsep.join(str(Path(one).absolute()) for one in sys.path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if address is None or address.startswith(("127.0.0.1:", "localhost:")):
        # Else it takes the address by which other machines reach this one.
        found["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is None:
        # Its own, so that nobody else of this machine gets in, and none is left in a home directory.
        found |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return found
