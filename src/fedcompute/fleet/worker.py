"""One worker of a fleet: a process (`python -m fedcompute.fleet.worker INDEX`, started by `fleet.processes`) or a job.

A process reads its settings from the first line of standard input and leaves when that closes; a job leaves when its
connection to whoever asked for it does.
"""

import asyncio
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from fedcompute.device.client.runtime import RunOutcome
from fedcompute.fleet.devices import Observer, run_devices
from fedcompute.fleet.settings import FleetSettings

# Devices in the middle of a run have so long to come to an end.
_END_SECONDS = 15.0
_CONNECT_SECONDS = 10.0
_LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
HELLO_BYTES = 100

_LOG = logging.getLogger(__name__)
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Share:
    """Which devices of a fleet a job runs, and where it reports: `token` lets it in there."""

    settings: FleetSettings
    index: int
    host: str
    port: int
    token: str = field(repr=False)

    @property
    def numbers(self) -> range:
        """The numbers of its devices."""
        return range(self.index, self.settings.devices, self.settings.processes)


def main() -> None:
    """Runs this process's share of the devices until the parent lets go."""
    logging.basicConfig(level=logging.WARNING, format=_LOG_FORMAT)
    index = int(sys.argv[1])
    settings = FleetSettings.from_json(sys.stdin.readline())
    numbers = range(index, settings.devices, settings.processes)
    asyncio.run(_run_until_released(settings, numbers, sys.stdin, _teller(sys.stdout)))


def run_share(share: Share) -> None:
    """A job: runs the devices until whoever asked closes the connection; raises OSError if there is none."""
    # Read by TensorFlow when it loads.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    with socket.create_connection((share.host, share.port), _CONNECT_SECONDS) as connection:
        connection.settimeout(None)
        with connection.makefile("r") as held, connection.makefile("w") as told:
            told.write(f"{share.token} {share.index}\n")
            told.flush()
            tell = _teller(told)
            try:
                with _complaints(tell):
                    asyncio.run(_run_until_released(share.settings, share.numbers, held, tell))
            finally:
                # What still reads from it would keep it open.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


async def _run_until_released(settings: FleetSettings, numbers: range, held: IO[str], tell: Tell) -> None:
    loop = asyncio.get_running_loop()
    released = asyncio.Event()

    def wait_for_release() -> None:
        # A connection may also break.
        with suppress(OSError):
            held.read()
        # The devices may have ended by themselves.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(released.set)

    def report_state(device: int, state: str) -> None:
        tell({"device": device, "state": state})

    def report_outcome(device: int, outcome: RunOutcome) -> None:
        if outcome.detail and outcome.counted:
            _LOG.warning("device %d, %s: %s (%s)", device, outcome.phase, outcome.detail, outcome.reason)
        tell({"device": device, "outcome": outcome.reason or "contributed", "seconds": dict(outcome.seconds)})

    threading.Thread(target=wait_for_release, daemon=True).start()
    devices = asyncio.create_task(run_devices(settings, numbers, Observer(report_state, report_outcome)))
    release = asyncio.create_task(released.wait())
    await asyncio.wait({devices, release}, return_when=asyncio.FIRST_COMPLETED)
    if devices.done():
        # Devices run for ever: an end is an error, and raising it here makes the exit status say so.
        devices.result()
    devices.cancel()
    _, unfinished = await asyncio.wait({devices}, timeout=_END_SECONDS)
    if unfinished:
        # The parent may be gone, and then nobody else ends this process.
        os._exit(1)


def _teller(told: IO[str]) -> Tell:
    def tell(report: dict[str, Any]) -> None:
        # Whoever listened is gone; the end of what is held ends the devices.
        with suppress(OSError, ValueError):
            told.write(json.dumps(report) + "\n")
            told.flush()

    return tell


@contextmanager
def _complaints(tell: Tell) -> Iterator[None]:
    """Tells what devices log, instead of logging it here."""

    class Complaints(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell({"complaint": self.format(record)})

    handler, logger = Complaints(logging.WARNING), logging.getLogger("fedcompute")
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


if __name__ == "__main__":
    main()
