"""Contributions per second by the number of workers: the jobs of aggregation alone, and a whole server.

    python benchmarks/scaling.py [--workers 1 2 4] [--executor processes|ray] [--only jobs] [--plot FILE]

Encrypted uploads of the tutorial's network, packed as phones pack them, lie in a blob store; an executor's workers
decrypt, check and add them up in jobs of 25. Numbers of workers take turns, medians are shown, beside one worker and
beside what the cores that are there could give; the CPU's time for one contribution tells scaling on a busy machine.
The whole server takes the same uploads over HTTP first, from the load generator that shares its machine, and is timed
from the first byte to the last sum. Prints a table; asserts nothing about time.
"""

import argparse
import contextlib
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from aggregation import Stored, store_uploads
from hardware import machine
from load import (
    POPULATION,
    Load,
    cpu_of,
    load_generator,
    open_task,
    rounds_of,
    sealed_update,
    serving,
    sessions,
    upload_head,
    wait_until,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import Row, write_rows

from fedcompute.server.executors import PROCESSES, RAY, Executor, open_executor
from fedcompute.server.rounds.aggregate import aggregate
from fedcompute.storage.schema import IterationStatus

SECTIONS = ("jobs", "server")
JOB = 25  # uploads in a job
PHONES = 6  # zlib's level
COLOURS = ("#0072B2", "#D55E00")


@dataclass(frozen=True)
class Point:
    """With so many workers: contributions a second, the median and the best, and the CPU's seconds for one."""

    workers: int
    per_second: float
    best: float
    cpu: float


@dataclass(frozen=True)
class Run:
    """Seconds of the clock, and of the CPU on every process that worked, for so many contributions."""

    count: int
    wall: float
    cpu: float


def point(workers: int, runs: Sequence[Run]) -> Point:
    rates = [run.count / run.wall for run in runs]
    return Point(workers, statistics.median(rates), max(rates), statistics.median(run.cpu / run.count for run in runs))


def cpu_below() -> float:
    """Seconds of CPU that this process' children, and theirs, have used so far."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    below = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in below} - below:
        below |= more
    total = 0.0
    for process in below - {os.getpid()}:
        with contextlib.suppress(OSError):
            total += cpu_of(process)
    return total


def job_curve(
    stored: Stored, workers: Sequence[int], kind: str, address: str | None, count: int, times: int
) -> list[Point]:
    """The jobs of aggregation on the workers of an executor: `count` uploads, `times` over."""
    found: dict[int, list[Run]] = {number: [] for number in workers}
    with ExitStack() as stack:
        executors = {number: stack.enter_context(closing(open_executor(kind, address, number))) for number in workers}
        for executor in executors.values():
            run_jobs(executor, stored, count)  # workers start and import
        for _ in track(range(times), description=f"jobs, {kind}", transient=True):
            for number, executor in executors.items():
                found[number].append(run_jobs(executor, stored, count))
    return [point(number, runs) for number, runs in found.items()]


def run_jobs(executor: Executor, stored: Stored, count: int) -> Run:
    """Adds `count` uploads up, job by job."""
    start, cpu = time.perf_counter(), cpu_below()
    futures = []
    for first in range(0, count, JOB):
        uploads = tuple((str(index), str(index % stored.kinds)) for index in range(first, min(count, first + JOB)))
        job = replace(stored.job, uploads=uploads, output_path=f"sum-{os.getpid()}-{first}")
        futures.append((executor.submit(aggregate, job), len(uploads)))
    for future, size in futures:
        assert future.result().accepted == size
    return Run(count, time.perf_counter() - start, cpu_below() - cpu)


def server_curve(load: Load, workers: Sequence[int], count: int, times: int) -> list[Point]:
    """A whole server: `count` uploads over HTTP as fast as it takes them, until they are added up."""
    found: dict[int, list[Run]] = {number: [] for number in workers}
    for _ in track(range(times), description="server", transient=True):
        for number in workers:
            found[number].append(run_server(load, number, count))
    return [point(number, runs) for number, runs in found.items()]


def run_server(load: Load, workers: int, count: int) -> Run:
    """Times from the first upload to the last sum of a round in a fresh server."""
    with (
        tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name,
        serving(Path(name), f"--workers={workers}", f"--collector-batch-size={JOB}") as server,
    ):
        open_task(server, POPULATION, goal=count, room=count)
        body = sealed_update(server)
        paths = sessions(server, POPULATION, count)
        server.settle()
        began, cpu = time.time(), cpu_below()
        load(server, upload_head(len(body)), targets=paths, count=count, connections=16, body=body)
        with closing(sqlite3.connect(f"file:{Path(name) / 'fedcompute.db'}?mode=ro", uri=True)) as database:
            wait_until(lambda: int(IterationStatus.APPLYING) in rounds_of(database)[0])
            ended = rounds_of(database)[0][int(IterationStatus.APPLYING)]
        return Run(count, ended - began, cpu_below() - cpu)


def rows_of(points: Sequence[Point], what: str, note: str) -> list[Row]:
    first, cores, straight = points[0], os.cpu_count() or 1, is_straight(what)
    return [
        Row(
            "scaling", f"{what}, {one.workers} worker{'s' * (one.workers > 1)}", one.per_second,
            "contributions/s",
            f"{first.workers} worker, {first.per_second:,.1f}/s" if one is not first else "",
            one.per_second / first.per_second if one is not first else None,
            (f"{share(one, first, cores):.0%} of what {min(cores, one.workers)} cores could give; " if straight else "")
            + f"{one.cpu * 1e3:.1f} ms of CPU for one; {note}",
        )
        for one in points
    ]  # fmt: skip


def is_straight(what: str) -> bool:
    """Whether one worker uses one core: that of a server unpacks on every core that no other worker has."""
    return what != "server"


def share(one: Point, first: Point, cores: int) -> float:
    """Of a straight line through the first point that ends at the number of cores."""
    return one.per_second / first.per_second / (min(cores, one.workers) / min(cores, first.workers))


def table_of(curves: dict[str, list[Point]]) -> Table:
    cores = os.cpu_count() or 1
    table = Table(
        "what", "workers", "contributions/s", "to the first", "to the cores there are", "best", "ms of CPU for one",
        title=f"contributions per second, encrypted, 1.2 million parameters, {cores} cores",
    )  # fmt: skip
    for what, points in curves.items():
        for one in points:
            table.add_row(
                what, str(one.workers), f"{one.per_second:,.1f}", f"{one.per_second / points[0].per_second:.2f}",
                f"{share(one, points[0], cores):.0%}" if is_straight(what) else "",
                f"{one.best:.1f}", f"{one.cpu * 1e3:.1f}",
            )  # fmt: skip
    return table


def plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Draws the curves, and for jobs the straight line up to the cores that are there."""
    from matplotlib.figure import Figure

    cores = os.cpu_count() or 1
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for (what, points), colour in zip(curves.items(), COLOURS, strict=False):
        workers = [one.workers for one in points]
        if is_straight(what):
            ideal = [points[0].per_second * min(number, cores) / min(workers[0], cores) for number in workers]
            axes.plot(workers, ideal, color=colour, linestyle=":", linewidth=1.2)
        axes.plot(workers, [one.per_second for one in points], color=colour, marker="o", linewidth=1.8, label=what)
        for one in points:
            place = (one.workers, one.per_second)
            axes.annotate(f"{one.per_second:.0f}", place, (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axes.plot([], [], color="#555555", linestyle=":", linewidth=1.2, label=f"a straight line up to {cores} cores")
    axes.set_title(
        f"Contributions per second by workers, {cores} cores, {date.today():%Y-%m-%d}", fontsize=11, loc="left"
    )
    axes.set_xlabel("workers")
    axes.set_xticks(sorted({one.workers for points in curves.values() for one in points}))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.grid(visible=True, axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--executor", choices=(PROCESSES, RAY), default=PROCESSES, help="of the jobs")
    parser.add_argument("--ray-address", help="HOST:PORT of a Ray cluster's head; default: one on this machine")
    parser.add_argument("--uploads", type=int, default=200, help="in a run; 4.5 MB of disk each in the whole server")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; all without it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves into a PNG file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    sections = arguments.only or SECTIONS
    console = Console(width=max(120, Console().width))
    console.print(machine())
    curves: dict[str, list[Point]] = {}
    rows: list[Row] = []
    if "jobs" in sections:
        what = "jobs" if arguments.executor == PROCESSES else "jobs, Ray"
        with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
            stored = store_uploads(Path(name), PHONES)
            curves[what] = job_curve(
                stored, arguments.workers, arguments.executor, arguments.ray_address, arguments.uploads,
                arguments.repeats,
            )  # fmt: skip
        rows += rows_of(curves[what], what, f"jobs of {JOB} encrypted uploads, 1.2M parameters, zlib {PHONES}")
    if "server" in sections:
        with load_generator() as load:
            curves["server"] = server_curve(load, arguments.workers, arguments.uploads, arguments.repeats)
        rows += rows_of(curves["server"], "server", "uploads by HTTP included; the load generator shares the cores")
    console.print(table_of(curves))
    if arguments.plot:
        plot(curves, arguments.plot)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
