"""A running fleet, seen from outside: its worker processes, what its devices do, and its end.

Each worker reads its orders from standard input and leaves when that closes, so no worker outlives this process,
however it ends; it reports on standard output, one JSON object a line.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from fedcompute.errors import OperationFailed, Reason
from fedcompute.fleet.settings import FleetSettings

_STOP_SECONDS = 10.0


@dataclass
class FleetProgress:
    """What the devices report: `states` device -> state now; `outcomes` counts ended runs by their reason;
    `seconds` sums the seconds of successful runs by phase, `contributions` counts them.
    """

    states: dict[int, str] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    contributions: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, devices: int) -> "FleetProgress":
        """Nothing yet: every device is about to start."""
        return cls(states=dict.fromkeys(range(devices), "starting"))

    def take(self, report: dict[str, Any]) -> None:
        """Adds what a device says of itself."""
        with self._lock:
            if "state" in report:
                self.states[int(report["device"])] = str(report["state"])
            if "outcome" in report:
                self.outcomes[str(report["outcome"])] += 1
                if report["outcome"] == "contributed":
                    self.contributions += 1
                    for phase, seconds in report["seconds"].items():
                        self.seconds[phase] = self.seconds.get(phase, 0.0) + float(seconds)

    def by_state(self) -> Counter[str]:
        """How many devices are in each state."""
        return Counter(self.states.values())


class Fleet:
    """Devices of `settings` in worker processes, from `with` to the end of its block. Errors go to `log`."""

    def __init__(self, settings: FleetSettings, log: Path) -> None:
        self.settings = settings
        self.progress = FleetProgress.of(settings.devices)
        self._log = log
        self._workers: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        try:
            with self._log.open("a") as log:
                for index in range(self.settings.processes):
                    self._workers.append(self._spawn(index, log))
        except BaseException:
            self.stop()
            raise
        for worker in self._workers:
            reader = threading.Thread(target=self._read, args=(worker,), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises OperationFailed (INTERNAL) if a worker process has ended by itself."""
        for index, worker in enumerate(self._workers):
            status = worker.poll()
            if status is not None:
                raise OperationFailed(
                    Reason.INTERNAL,
                    f"fleet process {index} ended with status {status}",
                    remedy=f"read the end of {self._log.name} in the data directory",
                )

    def stop(self) -> None:
        """Ends every worker: politely, then not. A run in progress is dropped, as when a phone goes off."""
        for worker in self._workers:
            if worker.stdin is not None:
                with contextlib.suppress(OSError):
                    worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        for reader in self._readers:
            reader.join(_STOP_SECONDS)
        for worker in self._workers:
            if worker.stdout is not None:
                worker.stdout.close()

    def _spawn(self, index: int, log: IO[str]) -> "subprocess.Popen[str]":
        worker = subprocess.Popen(
            [sys.executable, "-m", "fedcompute.fleet.worker", str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
            # Ctrl-C is for the parent, which then stops its workers in order.
            start_new_session=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        )
        if worker.stdin is not None:
            worker.stdin.write(self.settings.to_json() + "\n")
            worker.stdin.flush()
        return worker

    def _read(self, worker: "subprocess.Popen[str]") -> None:
        for report in reports(worker.stdout):
            self.progress.take(report)


def reports(lines: IO[str] | None) -> Iterator[dict[str, Any]]:
    """The JSON objects in lines of text; lines that are none are left out."""
    for line in lines or ():
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict):
                yield report
