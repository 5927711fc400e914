"""How long pages, charts and figures take with much history behind them: 1,000 rounds, 20 metrics, 100,000 assignments.

    python benchmarks/dashboard.py [--rounds 1000] [--metrics 20] [--assignments 100000]

Fills a database through the server's own tables, lets the round engine's chore sum the rounds up, serves it, and asks
for everything a browser would ask for. Prints a table; asserts nothing about time.
"""

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows
from sqlalchemy import insert

from fedcompute.cli.quickstart import serving
from fedcompute.privacy.chain import Release, chained
from fedcompute.protos import task_pb2
from fedcompute.server.listening import listen
from fedcompute.server.settings import Settings
from fedcompute.storage import schema
from fedcompute.storage.database import Database, Transaction
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.schema import AssignmentStatus, IterationStatus, TaskStatus
from fedcompute.storage.summaries import settle, to_settle
from fedcompute.storage.tasks import create_task

POPULATION = "history"
_REPEATS = 15
_CHUNK = 20_000
# What became of a hundred devices.
_ENDS = (
    (AssignmentStatus.UPLOAD_COMPLETED, 80),
    (AssignmentStatus.REMOTE_FAILED, 5),
    (AssignmentStatus.LOCAL_NOT_ELIGIBLE, 6),
    (AssignmentStatus.LOCAL_FAILED_MODEL_COMPUTATION, 2),
    (AssignmentStatus.LOCAL_TIMEOUT, 3),
    (AssignmentStatus.CANCELED, 4),
)
_METRIC = "server/client_work/train/metric_{}"


@dataclass(frozen=True)
class Figure:
    """What an address answered with: milliseconds, the median and the slowest, and KiB."""

    name: str
    median: float
    slowest: float
    kibibytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--metrics", type=int, default=20)
    parser.add_argument("--assignments", type=int, default=100_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as directory:
        listener = listen("127.0.0.1", 0)
        settings = Settings(data_dir=Path(directory) / "data", port=listener.getsockname()[1], workers=1)
        settings.data_dir.mkdir(mode=0o700)
        started = time.monotonic()
        settling = make_history(settings, options.rounds, options.metrics, options.assignments)
        each = f"{1000 * settling / options.rounds:.1f} ms a round to sum it up"
        size = f"{options.rounds:,} rounds, {options.metrics} metrics, {options.assignments:,} assignments"
        console.print(f"{size}: made in {time.monotonic() - started:.0f} s, {each}")
        console.print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, SQLite")
        with serving(settings, listener):
            figures = _measured(settings.base_url, options.rounds // 2)
    table = Table("what", "median ms", "slowest ms", "KiB", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in figures:
        table.add_row(one.name, f"{one.median:.1f}", f"{one.slowest:.1f}", f"{one.kibibytes:.0f}")
    console.print(table)
    settled = Row("dashboard", "a round that ends is summed up", 1000 * settling / options.rounds, "ms", note=size)
    write_rows(options.json, [*_rows(figures, size), settled])


def make_history(settings: Settings, rounds: int, metrics: int, assignments: int) -> float:
    """Fills the database of a server that does not run; returns the seconds that summing the rounds up took."""
    database = Database.open(settings.database)
    begin = datetime.now(UTC) - timedelta(minutes=20 * rounds)
    each = assignments // rounds
    with database.write() as tx:
        key = _task(tx, rounds, each, begin)
    rows: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    with database.write() as tx:
        for number in range(1, rounds + 1):
            opened = begin + timedelta(minutes=20 * number)
            _round(tx, IterationKey(POPULATION, key, number), opened, each, metrics)
            for row, entries in _devices(IterationKey(POPULATION, key, number), opened, each):
                rows.append(row)
                history += entries
            if len(rows) >= _CHUNK or number == rounds:
                tx.execute(insert(schema.assignment), rows)
                tx.execute(insert(schema.assignment_status_history), history)
                rows.clear()
                history.clear()
    with database.write() as tx:
        _ledger(tx, key, rounds, each, begin)
        tx.execute(
            schema.task.update().values(status=int(TaskStatus.COMPLETED), status_id=2, status_time=datetime.now(UTC))
        )
    started = time.monotonic()
    while True:
        with database.read() as tx:
            keys = to_settle(tx, limit=100)
        for one in keys:
            with database.write() as tx:
                settle(tx, one, datetime.now(UTC))
        if not keys:
            break
    database.close()
    return time.monotonic() - started


def _task(tx: Transaction, rounds: int, each: int, begin: datetime) -> int:
    task = task_pb2.Task(
        population_name=POPULATION,
        total_iteration=rounds,
        min_aggregation_size=max(1, each * 8 // 10),
        max_aggregation_size=each,
        min_client_version="0",
        max_client_version="999999999",
    )
    return create_task(tx, task, begin).key.task_id


def _round(tx: Transaction, key: IterationKey, opened: datetime, each: int, metrics: int) -> None:
    place = dict(zip(schema.ITERATION_COLUMNS, _place(key), strict=True))
    tx.execute(
        insert(schema.iteration).values(
            **place,
            status=int(IterationStatus.COMPLETED),
            status_id=4,
            status_time=opened + timedelta(minutes=16),
            created_time=opened,
            base_iteration_id=key.iteration_id - 1,
            base_on_result_id=key.iteration_id - 1,
            report_goal=each * 8 // 10,
            result_id=key.iteration_id,
            info={},
            aggregation_level=2,
            max_aggregation_size=each,
            min_client_version="0",
            max_client_version="999999999",
        )
    )
    steps = (
        (IterationStatus.COLLECTING, 0.0),
        (IterationStatus.AGGREGATING, 15.0),
        (IterationStatus.APPLYING, 15.5),
        (IterationStatus.COMPLETED, 16.0),
    )
    tx.execute(
        insert(schema.iteration_status_history),
        [
            {
                **place,
                "status_id": number + 1,
                "status": int(status),
                "created_time": opened + timedelta(minutes=minutes),
                "aggregation_level": min(number, 2),
            }
            for number, (status, minutes) in enumerate(steps)
        ],
    )
    tx.execute(
        insert(schema.model_metrics),
        [
            {
                "population_name": key.population,
                "task_id": key.task_id,
                "iteration_id": key.iteration_id,
                "metric_name": name,
                "metric_value": random.random(),
                "created_time": opened,
            }
            for name in ["server/client_work/train/loss", "server/client_work/train/binary_accuracy"]
            + [_METRIC.format(number) for number in range(metrics - 2)]
        ],
    )


def _devices(key: IterationKey, opened: datetime, each: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    ends = [status for status, count in _ENDS for _ in range(count)]
    place = dict(zip(schema.ITERATION_COLUMNS, _place(key), strict=True))
    for number in range(each):
        end, session = ends[number % len(ends)], str(uuid.uuid4())
        path = {
            AssignmentStatus.UPLOAD_COMPLETED: (0, 1, 2),
            AssignmentStatus.REMOTE_FAILED: (0, 1, 2, int(AssignmentStatus.REMOTE_FAILED)),
        }.get(end, (0, int(end)))
        times = [opened + timedelta(seconds=8 * number % 800 + 20 * step) for step in range(len(path))]
        rejection = "not_finite" if end is AssignmentStatus.REMOTE_FAILED else None
        yield (
            {
                **place,
                "session_id": session,
                "status": path[-1],
                "status_id": len(path),
                "status_time": times[-1],
                "created_time": times[0],
                "correlation_id": "",
                "rejection": rejection,
            },
            [
                {
                    **place,
                    "session_id": session,
                    "status_id": step + 1,
                    "status": status,
                    "created_time": moment,
                    "rejection": rejection if status == path[-1] else None,
                }
                for step, (status, moment) in enumerate(zip(path, times, strict=True))
            ],
        )


def _ledger(tx: Transaction, task_id: int, rounds: int, each: int, begin: datetime) -> None:
    entry, rows = None, []
    for number in range(1, rounds + 1):
        moment = begin + timedelta(minutes=20 * number + 16)
        release = Release(
            POPULATION,
            task_id,
            number,
            "model",
            "FIXED_GAUSSIAN",
            {"class": "GaussianDpEvent", "noise_multiplier": 1.0},
            None,
            1.0,
            each,
            each,
            0.1 * number**0.5,
            1e-6,
        )
        entry = chained(entry, release, moment.isoformat(timespec="microseconds"))
        values = {name: value for name, value in entry.__dict__.items() if name in schema.privacy_ledger.c}
        rows.append(values | {"population_name": POPULATION, "created_time": moment})
    tx.execute(insert(schema.privacy_ledger), rows)


def _place(key: IterationKey) -> tuple[str, int, int, int]:
    return key.population, key.task_id, key.iteration_id, key.attempt_id


def _measured(url: str, middle: int) -> list[Figure]:
    """Asks for everything, round `middle` for one; pages first, then charts, then what programs read."""
    task = f"/tasks/{POPULATION}/1"
    metric = "name=server%2Fclient_work%2Ftrain%2Floss"
    charts = ("noise", "clip", "epsilon", "devices", "rejections", "phases", "over-time", "training", "minutes")
    addresses = [
        "/",
        f"/populations/{POPULATION}",
        task,
        f"{task}?before={middle}",
        f"{task}/rounds/{middle}",
        "/compare",
        "/privacy",
        f"/privacy/{POPULATION}",
        "/service",
        "/system",
        f"/charts{task}/metric?{metric}",
        *(f"/charts{task}/{name}" for name in charts),
        f"/charts{task}/arrivals?round={middle}",
        f"/charts/populations/{POPULATION}/minutes",
        f"/charts/compare?run={POPULATION}/1&metric=loss",
        f"/charts/privacy/{POPULATION}",
        f"/api/v1{task}",
        f"/api/v1{task}/metrics?limit=1000",
        "/metrics",
    ]
    with httpx.Client(base_url=url, timeout=60) as client:
        found = [_asked(client, address, {}, 200) for address in addresses]
        known = {"if-none-match": client.get(task).headers["etag"]}
        return [*found, replace(_asked(client, task, known, 304), name=f"{task}, unchanged")]


def _asked(client: httpx.Client, address: str, headers: dict[str, str], status: int) -> Figure:
    times, size = [], 0
    for _ in range(_REPEATS):
        started = time.perf_counter()
        answer = client.get(address, headers=headers)
        times.append(1000 * (time.perf_counter() - started))
        assert answer.status_code == status, (address, answer.text[:200])
        size = len(answer.content)
    return Figure(address, statistics.median(times), max(times), size / 1024)


def _rows(figures: Sequence[Figure], size: str) -> list[Row]:
    """A row for each page; the charts, of which a page loads several, in two."""
    charts = [one.median for one in figures if one.name.startswith("/charts/")]
    return [
        *(
            Row("dashboard", one.name, one.median, "ms", note=size)
            for one in figures
            if not one.name.startswith("/charts/")
        ),
        Row("dashboard", f"a chart, median of {len(charts)}", statistics.median(charts), "ms", note=size),
        Row("dashboard", "a chart, the slowest", max(charts), "ms", note=size),
    ]


if __name__ == "__main__":
    main()
