"""Seconds per round and per phase of the quickstart task, and contributions aggregated per second for large updates.

    python benchmarks/round.py [--rounds 10] [--devices 40] [--model digits-linear] [--updates 20]

Prints two tables; asserts nothing about time. Phases of devices are means over contributions; phases of the server
come from the status history of its rounds.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from fedcompute.cli.quickstart import register, serving
from fedcompute.cli.sample_task import POPULATION, SampleTask, build_sample
from fedcompute.crypto.envelope import gzip_bytes, open_update, seal_update
from fedcompute.crypto.keys import generate_key_pair
from fedcompute.fleet.processes import Fleet
from fedcompute.fleet.settings import FleetSettings
from fedcompute.learning.contribution import add, empty_sum, read_contribution
from fedcompute.learning.specification import training_process
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.protos import learning_pb2
from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.listening import listen
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.storage.database import Database
from fedcompute.storage.schema import IterationStatus, iteration_status_history
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

PARAMETERS = 1_199_882
SOON = RetryWindow(0.2, 1.0)
LIMIT = 64 << 20
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
    parser.add_argument("--updates", type=int, default=20)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    console = Console()
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, NumPy {np.__version__}"
    )
    with tempfile.TemporaryDirectory() as directory:
        console.print(rounds_table(Path(directory), arguments.model, arguments.devices, arguments.rounds))
    console.print(aggregation_table(arguments.updates))


def rounds_table(root: Path, model: str, devices: int, rounds: int) -> Table:
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
    table = Table("phase", "seconds", "of", title=f"quickstart task, {model}: {devices} devices, {rounds} rounds")
    for name, phase in DEVICE_PHASES.items():
        table.add_row(
            name, f"{progress.seconds.get(phase, 0.0) / max(1, progress.contributions):.3f}", "contribution, mean"
        )
    for name, seconds in per_round.items():
        table.add_row(name, f"{statistics.median(seconds):.3f}", "round, median")
    return table


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


def aggregation_table(count: int) -> Table:
    """Takes updates of 1.2 million parameters through decrypt, check and sum on one core."""
    table = Table("upload", "sum", "contributions/s", "MB/s", title=f"aggregation, {PARAMETERS:,} parameters, one core")
    generator = np.random.default_rng(0)
    leaves = [LeafSpec("", (PARAMETERS - 10,), np.dtype(np.float32)), LeafSpec("", (10,), np.dtype(np.float32))]
    key = generate_key_pair(datetime.now(UTC), timedelta(days=1))
    floor: float | None = None
    for aggregator, name in (
        (learning_pb2.UniformMean(), "float64"),
        (learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=count), "lattice"),
    ):
        process = training_process(
            algorithm=learning_pb2.LearningProcess.FED_AVG,
            trainable=leaves,
            non_trainable=[],
            server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
            aggregator=aggregator,
            metrics=[],
        )
        update = {
            leaf.spec.name: np.array(1, np.int32)
            if leaf.role == learning_pb2.UpdateLeaf.COUNT
            else (generator.standard_normal([dim.size for dim in leaf.spec.shape.dim]) * 5e-4).astype(np.float32)
            for leaf in process.updates
        }
        clip_norm = 1.0 if process.HasField("fixed_gaussian") else None
        checkpoint = write_checkpoint(update)
        for kind, body in (
            ("plaintext", gzip_bytes(checkpoint)),
            ("encrypted", gzip_bytes(seal_update(checkpoint, key.published))),
        ):
            start = time.perf_counter()
            total = empty_sum(process, b"", clip_norm)
            for _ in range(count):
                plain = open_update(body, {key.id: key.private_key}, allow_plaintext=True, limit=LIMIT)
                total = add(total, read_contribution(process, read_checkpoint(plain), clip_norm))
            seconds = time.perf_counter() - start
            table.add_row(kind, name, f"{count / seconds:.1f}", f"{count * len(checkpoint) / seconds / 1e6:.0f}")
        if floor is None:
            arrays = [value for value in update.values() if value.ndim]
            sums = [np.zeros(value.shape) for value in arrays]
            start = time.perf_counter()
            for _ in range(count):
                for running, value in zip(sums, arrays, strict=True):
                    running += value
            floor = time.perf_counter() - start
    table.add_row("arrays in memory", "NumPy float64", f"{count / (floor or 1):.1f}", "")
    return table


if __name__ == "__main__":
    main()
