"""A fleet whose devices run as jobs of an executor, on other machines too.

Each job connects to this process, reports there, one JSON object a line, and leaves when the connection closes.
"""

import contextlib
import hmac
import secrets
import socket
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedcompute.errors import OperationFailed, Reason
from fedcompute.fleet.processes import FleetProgress, reports
from fedcompute.fleet.settings import FleetSettings
from fedcompute.fleet.worker import HELLO_BYTES, Share, run_share
from fedcompute.server.executors import Executor

_STOP_SECONDS = 10.0
_HELLO_SECONDS = 10.0


class SpreadFleet:
    """Devices of `settings` as jobs of `executor`, from `with` to the end of its block. Complaints go to `log`.

    A job that the executor runs again, because its machine was lost, starts its devices anew.
    """

    def __init__(self, settings: FleetSettings, log: Path, executor: Executor, host: str) -> None:
        """`host`: this machine's address, as jobs reach it; see `own_address`."""
        self.settings = settings
        self.progress = FleetProgress.of(settings.devices)
        self._log = log
        self._executor = executor
        self._host = host
        self._token = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._stopping = False
        self._connections: set[socket.socket] = set()
        self._jobs: list[Future[Any]] = []

    def __enter__(self) -> Self:
        self._server = socket.create_server((self._host, 0), family=_family(self._host))
        threading.Thread(target=self._accept, daemon=True).start()
        port = self._server.getsockname()[1]
        for index in range(self.settings.processes):
            share = Share(self.settings, index, self._host, port, self._token)
            self._jobs.append(self._executor.submit(run_share, share))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises OperationFailed if a job has ended by itself."""
        for index, job in enumerate(self._jobs):
            if job.done():
                job.result()
                raise OperationFailed(
                    Reason.INTERNAL, f"fleet job {index} ended", remedy=f"read the end of {self._log.name}"
                )

    def stop(self) -> None:
        """Lets every job go and waits a little. A run in progress is dropped, as when a phone goes off."""
        with self._lock:
            self._stopping = True
            connections, self._connections = self._connections, set()
        _close(self._server)
        for connection in connections:
            _close(connection)
        wait(self._jobs, _STOP_SECONDS)

    def _accept(self) -> None:
        # Ends when `stop` closes the server.
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), connection.makefile("r") as lines:
            connection.settimeout(_HELLO_SECONDS)
            token, _, index = lines.readline(HELLO_BYTES).strip().partition(" ")
            if not hmac.compare_digest(token, self._token):
                return
            connection.settimeout(None)
            with self._lock:
                if self._stopping:
                    return
                self._connections.add(connection)
            try:
                for report in reports(lines):
                    if "complaint" in report:
                        self._complain(str(report["complaint"]))
                    else:
                        self.progress.take(report)
            finally:
                with self._lock:
                    self._connections.discard(connection)
                for device in range(int(index), self.settings.devices, self.settings.processes):
                    self.progress.take({"device": device, "state": "starting"})

    def _complain(self, text: str) -> None:
        with self._lock, self._log.open("a") as log:
            log.write(text + "\n")


def own_address(ray_address: str | None) -> str:
    """This machine's address as the nodes of a Ray cluster reach it; loopback for a cluster of its own."""
    if ray_address is None:
        return "127.0.0.1"
    host, _, port = ray_address.rpartition(":")
    # A datagram socket that is connected knows its address, and has sent nothing.
    target = (host.strip("[]"), int(port)) if host else ("192.0.2.1", 9)
    try:
        with socket.socket(_family(target[0]), socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _close(one: socket.socket) -> None:
    # Closing alone wakes nobody who reads or accepts.
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
