"""One worker process of a fleet: `python -m fedcompute.fleet.worker INDEX`, started by `fleet.processes`.

The first line of standard input holds the settings; the process leaves when standard input closes.
"""

import asyncio
import json
import logging
import os
import sys
import threading
from typing import Any

from fedcompute.device.client.runtime import RunOutcome
from fedcompute.fleet.devices import Observer, run_devices
from fedcompute.fleet.settings import FleetSettings

# Devices in the middle of a run have so long to come to an end.
_END_SECONDS = 15.0


def main() -> None:
    """Runs this process's share of the devices until the parent lets go."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    index = int(sys.argv[1])
    settings = FleetSettings.from_json(sys.stdin.readline())
    numbers = range(index, settings.devices, settings.processes)
    asyncio.run(_run_until_released(settings, numbers))


async def _run_until_released(settings: FleetSettings, numbers: range) -> None:
    loop = asyncio.get_running_loop()
    released = asyncio.Event()

    def wait_for_release() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(released.set)

    threading.Thread(target=wait_for_release, daemon=True).start()
    devices = asyncio.create_task(run_devices(settings, numbers, Observer(_report_state, _report_outcome)))
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


def _report_state(device: int, state: str) -> None:
    _print({"device": device, "state": state})


def _report_outcome(device: int, outcome: RunOutcome) -> None:
    if outcome.detail and outcome.counted:
        logging.getLogger(__name__).warning(
            "device %d, %s: %s (%s)", device, outcome.phase, outcome.detail, outcome.reason
        )
    report = {"device": device, "outcome": outcome.reason or "contributed", "seconds": dict(outcome.seconds)}
    _print(report)


def _print(report: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The parent is gone; its closing of standard input ends this process.
        pass


if __name__ == "__main__":
    main()
