"""What an idle device takes, and what isolation costs.

    python benchmarks/device_daemon.py [--repeats 5]

Resident memory of a fresh `python -m fedcompute.device` that waits; seconds of a worker call in a process of its own;
seconds of the first and of a later training in an isolated process, the import of TensorFlow included. Medians of
several runs; asserts nothing about time.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

from fedcompute.device.developer.examples import training_example
from fedcompute.device.developer.worker import ExecuteInput
from fedcompute.device.isolation.messages import Answer
from fedcompute.device.isolation.trainer import IsolatedTrainer
from fedcompute.device.isolation.worker_call import Service, WorkerFailed, call_worker
from fedcompute.protos import plan_pb2

SERVICE = """
from fedcompute.device import IsolatedService, IsolatedWorker

class Idle(IsolatedService):
    def on_request(self, request_token):
        return IsolatedWorker()
"""


def idle_memory(folder: Path, seconds: float) -> tuple[float, float]:
    """Resident and private megabytes of a device that has nothing to do."""
    command = [sys.executable, "-m", "fedcompute.device", str(folder / "device"), "--report-isolation"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        time.sleep(seconds)
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        daemon.terminate()
    kilobytes = dict(line.split(":", 1) for line in status.splitlines())
    return tuple(int(kilobytes[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def no_facilities(method: str, arguments: bytes) -> Answer:
    return Answer()


async def worker_call(folder: Path) -> float:
    start = time.perf_counter()
    called = await call_worker(
        Service(str(folder), "Idle"), "execute", ExecuteInput("bench"), no_facilities,
        seconds=30.0, memory=1 << 30, strict=False,
    )  # fmt: skip
    if isinstance(called.result, WorkerFailed):
        raise called.result
    return time.perf_counter() - start


async def trainings(folder: Path, plan: plan_pb2.ClientOnlyPlan, checkpoint: bytes) -> tuple[float, float]:
    """Seconds of the first training of a fresh process, and of the next one."""
    rng = np.random.default_rng(0)
    examples = [
        training_example({"x": rng.random(784, dtype=np.float32), "y": int(rng.integers(0, 2))}) for _ in range(600)
    ]
    trainer = IsolatedTrainer(folder, strict=False)
    try:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            await trainer.train("bench", plan, checkpoint, examples)
            seconds.append(time.perf_counter() - start)
    finally:
        await trainer.close()
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    rows: list[Row] = []

    def found(name: str, value: float, unit: str, count: int) -> None:
        rows.append(Row("device", name, value, unit, note=f"median of {count}"))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "idle.py").write_text(SERVICE)
        memory = [idle_memory(folder, 2.0) for _ in range(repeats)]
        found("idle device, resident", statistics.median(one[0] for one in memory), "MB", repeats)
        found("idle device, of it private", statistics.median(one[1] for one in memory), "MB", repeats)
        calls = [asyncio.run(worker_call(folder)) for _ in range(4 * repeats)]
        found("a worker call in a process of its own", 1000 * statistics.median(calls), "ms", 4 * repeats)
        plan, checkpoint = dense_plan()
        times = [asyncio.run(trainings(folder, plan, checkpoint)) for _ in range(repeats)]
        first, later = (statistics.median(one[index] for one in times) for index in (0, 1))
        found("first isolated training, TensorFlow import included (200 steps)", first, "s", repeats)
        found("a later isolated training (200 steps)", later, "s", repeats)
    table = Table("what", "median", "of", title="an idle device, and isolation")
    for row in rows:
        table.add_row(row.name, f"{row.value:.2f} {row.unit}", row.note.removeprefix("median of "))
    Console().print(table)
    write_rows(arguments.json, rows)


def dense_plan() -> tuple[plan_pb2.ClientOnlyPlan, bytes]:
    """The plan of the 784-256-2 model with batches of 3, built in a process that may load TensorFlow."""
    from device import tasks

    return tasks()[0].plan()


if __name__ == "__main__":
    main()
