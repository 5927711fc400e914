"""Seconds per round and per phase of the quickstart task.

    python benchmarks/round.py [--rounds 10] [--devices 40] [--model digits-linear]

Prints a table; asserts nothing about time. Phases of devices are means over contributions; phases of the server come
from the status history of its rounds.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows
from sqlalchemy import select

from fedcompute.cli.quickstart import register, serving
from fedcompute.cli.sample_task import POPULATION, SampleTask, build_sample
from fedcompute.fleet.processes import Fleet
from fedcompute.fleet.settings import FleetSettings
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.listening import listen
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.storage.database import Database
from fedcompute.storage.schema import IterationStatus, iteration_status_history

SOON = RetryWindow(0.2, 1.0)
DEVICE_PHASES = {
    "assign": "check_in",
    "download": "download",
    "train": "train",
    "encrypt": "encrypt",
    "upload": "upload",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--devices", type=int, default=40)
    parser.add_argument("--model", default="digits-linear")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    console = Console()
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, NumPy {np.__version__}"
    )
    with tempfile.TemporaryDirectory() as directory:
        rows = round_rows(Path(directory), arguments.model, arguments.devices, arguments.rounds)
    title = f"quickstart task, {arguments.model}: {arguments.devices} devices, {arguments.rounds} rounds"
    table = Table("phase", "seconds", "of", title=title)
    for row in rows:
        table.add_row(row.name, f"{row.value:.3f}", row.note)
    console.print(table)
    write_rows(arguments.json, rows)


def round_rows(root: Path, model: str, devices: int, rounds: int) -> list[Row]:
    """Runs the quickstart's task and times its phases."""
    listener = listen(Settings.host, 0)
    port = listener.getsockname()[1]
    settings = Settings(data_dir=root, port=port, retry_no_task=SOON, retry_no_active_task=SOON, workers=1)
    workshop = ProcessExecutor(1)
    try:
        task = SampleTask(root / "model", model, "digits", devices, rounds, 0.5)
        sample = workshop.submit(build_sample, task).result()
    finally:
        workshop.close()
    with serving(settings, listener):
        training, _ = register(settings, sample)
        fleet_settings = FleetSettings(server_url=settings.base_url, population=POPULATION, devices=devices)
        api = OperatorApi(settings.base_url)
        with Fleet(fleet_settings, root / "fleet.log") as fleet:
            while api.task(POPULATION, training)["task"]["status"] == "OPEN":
                fleet.check()
                time.sleep(0.2)
            progress = fleet.progress
    per_round = server_phases(settings, training)
    count, group = max(1, progress.contributions), f"round, {model}, {devices} devices"
    return [
        *(
            Row(group, name, progress.seconds.get(phase, 0.0) / count, "s", note="contribution, mean")
            for name, phase in DEVICE_PHASES.items()
        ),
        *(
            Row(group, name, statistics.median(seconds), "s", note="round, median")
            for name, seconds in per_round.items()
        ),
    ]


def server_phases(settings: Settings, task_id: int) -> dict[str, list[float]]:
    """Seconds per round between the entries of its status history; the first round, which waits for devices, is out."""
    database = Database.open(settings.database)
    history = iteration_status_history.c
    entered: dict[int, dict[int, datetime]] = {}
    with database.read() as tx:
        query = select(history.iteration_id, history.status, history.created_time).where(history.task_id == task_id)
        for iteration_id, status, created in tx.execute(query):
            entered.setdefault(iteration_id, {}).setdefault(status, created)
    database.close()
    steps = {
        "collect": (IterationStatus.COLLECTING, IterationStatus.AGGREGATING),
        "aggregate": (IterationStatus.AGGREGATING, IterationStatus.APPLYING),
        "update": (IterationStatus.APPLYING, IterationStatus.COMPLETED),
        "round": (IterationStatus.COLLECTING, IterationStatus.COMPLETED),
    }
    return {
        name: [
            (times[end] - times[start]).total_seconds()
            for iteration_id, times in entered.items()
            if iteration_id > 1 and start in times and end in times
        ]
        or [float("nan")]
        for name, (start, end) in steps.items()
    }


if __name__ == "__main__":
    main()
