"""`python -m fedcompute.device`: the process of a running device, which `fedcompute device run` turns into.

It parses by the standard library and loads none of the prompt's libraries: an idle device stays small.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedcompute.device.client.authorization import read_own_enrolment
from fedcompute.device.daemon import DaemonSettings, now_ms, open_daemon, printable
from fedcompute.device.directory import DeviceDirectory
from fedcompute.device.isolation.probe import check_isolation
from fedcompute.device.jobs.events import Event, describe
from fedcompute.errors import FedComputeError

_TIME = "%Y-%m-%d %H:%M:%S"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a device until SIGINT or SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedcompute.device", description="Run a device.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--report-isolation", action="store_true", help="go on where isolation is not complete")
    parser.add_argument("--enrolment", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt=_TIME)
    try:
        for line in check_isolation(strict=not options.report_isolation):
            sys.stderr.write(f"warning: {line}\n")
        settings = DaemonSettings(
            strict=not options.report_isolation,
            prove=None if options.enrolment is None else read_own_enrolment(options.enrolment).prove,
            on_event=_tell_json if options.json else _tell,
            on_phase=(lambda population, phase: None) if options.json else _tell_phase,
        )
        directory = DeviceDirectory.open(options.directory)
        try:
            asyncio.run(_serve(directory, settings, announce=not options.json))
        finally:
            directory.close()
    except FedComputeError as error:
        sys.stderr.write(f"Error:  {error.detail}\nCode:   {error.reason.value}\nRemedy: {error.remedy}\n")
        return 1
    except BrokenPipeError:
        # The reader of a pipe has left; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        # Before there was anything to stop.
        return 0
    return 0


async def _serve(directory: DeviceDirectory, settings: DaemonSettings, *, announce: bool) -> None:
    async with open_daemon(directory, settings) as daemon:

        async def serve() -> None:
            if announce:
                _say(f"device in {directory.path}; stop with Ctrl-C")
            await daemon.serve()

        serving = asyncio.create_task(serve())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        await asyncio.wait({serving})
        if not serving.cancelled():
            serving.result()


def _tell(event: Event) -> None:
    _say_of(event.time, event.job, describe(event))


def _tell_phase(population: str, phase: str) -> None:
    """On a terminal only: who looks at it sees that a run goes on."""
    if sys.stdout.isatty():
        _say_of(now_ms(), population, f"  {phase.replace('_', '-')}")


def _say_of(milliseconds: int, job: str, what: str) -> None:
    time = datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().strftime(_TIME)
    _say(printable(f"{time}  {job:24} {what}"))


def _tell_json(event: Event) -> None:
    document = {
        "time": event.time, "event": event.kind.value, "job": event.job, "success": event.success,
        "counted": event.counted, "reason": event.reason, "detail": event.detail, "earliest_run": event.earliest_run,
    }  # fmt: skip
    _say(json.dumps(document))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
