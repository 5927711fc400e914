"""What a contribution costs the database: bytes that stay, and how many lives of an assignment it writes per second.

    python benchmarks/database.py [--contributions 20000] [--database-url postgresql://...] [--threads 8]

A life as the server writes it: a place in a group of check-ins, the report, the upload's arrival, the batch, the sum.
Check-ins of one population take turns; reports come side by side. SQLite in a temporary directory, or the empty
database of a URL, whose tables stay filled. Prints a table; asserts nothing about time.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hardware import machine
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows
from sqlalchemy import text

from fedcompute.protos import task_pb2
from fedcompute.storage.assignments import hold_assignment, mark_uploaded, report_completed
from fedcompute.storage.batches import create_batch, finish_batch, publish_batch
from fedcompute.storage.check_ins import Assigned, CheckIn, assign_all
from fedcompute.storage.database import Database, sqlite_path
from fedcompute.storage.iterations import create_iteration, next_iteration
from fedcompute.storage.keys import AssignmentKey, IterationKey
from fedcompute.storage.tasks import create_task, get_task, open_task

GROUP = 64  # check-ins in a transaction
BATCH = 50
EARLIER = 1_000
POPULATION = "benchmark"


@dataclass(frozen=True)
class Life:
    """Of one contribution: bytes of its rows with their indexes, and seconds of each step."""

    kind: str
    row_bytes: float
    check_in: float
    report: float
    collect: float

    @property
    def per_second(self) -> float:
        return 1 / (self.check_in + self.report + self.collect)


def measure(url: str, count: int, threads: int) -> Life:
    """Writes `count` contributions of one round into a database that has seen an earlier one and its statistics."""
    kind = "SQLite" if sqlite_path(url) else "PostgreSQL"
    with closing(Database.open(url)) as database:
        live(database, "earlier", min(count, EARLIER), threads)
        if kind == "PostgreSQL":
            with database.write() as tx:
                tx.execute(text("ANALYZE"))  # its autovacuum does so within a minute
        before = size_of(database, kind)
        steps = live(database, POPULATION, count, threads)
        return Life(kind, (size_of(database, kind) - before) / count, *(seconds / count for seconds in steps))


def live(database: Database, population: str, count: int, threads: int) -> tuple[float, float, float]:
    """Seconds of the check-ins, the reports and the collecting of a round."""
    key, numbers = open_round(database, population, count), range(count)
    start = time.perf_counter()
    assigned = [
        one for first in numbers[::GROUP] for one in check_in(database, population, numbers[first : first + GROUP])
    ]
    checked = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda one: report(database, one), assigned))
    reported = time.perf_counter()
    sessions = [one.session_id for one in assigned]
    for first in numbers[::BATCH]:
        collect(database, key, sessions[first : first + BATCH])
    return checked - start, reported - checked, time.perf_counter() - reported


def open_round(database: Database, population: str, places: int) -> IterationKey:
    task = task_pb2.Task(
        population_name=population, total_iteration=1, min_aggregation_size=places, max_aggregation_size=places,
        min_client_version="0", max_client_version="999999999",
    )  # fmt: skip
    task.info.training_info.SetInParent()
    now = datetime.now(UTC)
    with database.write() as tx:
        key = create_task(tx, task, now).key
        assert open_task(tx, key, now)
        row = get_task(tx, key)
        assert row is not None
        new = next_iteration(row, None)
        assert create_iteration(tx, new, now)
    return new.key


def check_in(database: Database, population: str, numbers: Sequence[int]) -> list[AssignmentKey]:
    asking = [CheckIn(population, 350_000_000, f"{population} {one}", f"{one:036d}") for one in numbers]
    with database.write() as tx:
        found = assign_all(tx, asking, datetime.now(UTC), choose=lambda _: 0)
    return [one.assignment.key for one in found if isinstance(one, Assigned)]


def report(database: Database, key: AssignmentKey) -> None:
    with database.write() as tx:
        assert hold_assignment(tx, key.task, key.iteration.iteration_id, key.session_id)
        assert report_completed(tx, key, datetime.now(UTC))


def collect(database: Database, key: IterationKey, sessions: Sequence[str]) -> None:
    now = datetime.now(UTC)
    with database.write() as tx:
        moved = mark_uploaded(tx, key, sessions, now)
        batch = create_batch(tx, key, moved, now)
        assert batch is not None
        assert publish_batch(tx, batch.key, now)
    with database.write() as tx:
        assert finish_batch(tx, batch.key, len(sessions), {}, now)


def size_of(database: Database, kind: str) -> int:
    """Bytes of all tables and indexes."""
    with database.read() as tx:
        if kind == "SQLite":
            pages = (tx.execute(text(f"PRAGMA {name}")).scalar_one() for name in ("page_count", "page_size"))
            return int(next(pages)) * int(next(pages))
        return int(tx.execute(text("SELECT pg_database_size(current_database())")).scalar_one())


def rows_of(life: Life, count: int) -> list[Row]:
    group, note = f"database, {life.kind}", f"{count:,} contributions of one round"
    return [
        Row(group, "rows of a contribution, indexes included", life.row_bytes, "bytes", note=note),
        Row(
            group, f"check-ins that get a place, {GROUP} in a transaction", 1 / life.check_in, "check-ins/s", note=note
        ),
        Row(group, "reports, a transaction each", 1 / life.report, "reports/s", note=note),
        Row(group, f"uploads collected and summed, {BATCH} in a batch", 1 / life.collect, "uploads/s", note=note),
        Row(group, "whole lives of a contribution", life.per_second, "contributions/s", note=note),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contributions", type=int, default=20_000)
    parser.add_argument("--database-url", help="of an empty database; default: SQLite in a temporary directory")
    parser.add_argument("--threads", type=int, default=8, help="that report side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console(width=max(120, Console().width))
    console.print(machine())
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
        url = arguments.database_url or f"sqlite:///{Path(name) / 'fedcompute.db'}"
        rows = rows_of(measure(url, arguments.contributions, arguments.threads), arguments.contributions)
    table = Table("what", "figure", title=rows[0].group)
    for row in rows:
        table.add_row(row.name, f"{row.value:,.0f} {row.unit}")
    console.print(table)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
