"""Every benchmark, each in a process of its own, and one table of what they found.

    python benchmarks/all.py [--quick] [--only load aggregation] [--json FILE]

Takes about an hour, and longer the first time: the programs that ours is compared with are installed then, each in
an environment of its own. `--quick` leaves those and the slowest out and repeats less, in about two minutes. Exit code
1 if a benchmark fails; the others' rows are there all the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from hardware import machine
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import Row, write_rows

TIMEOUT = 3600.0
SHOWN_LINES = 12


@dataclass(frozen=True)
class Benchmark:
    """A script of this directory, and its arguments; `quick` None leaves it out of the quick run."""

    name: str
    quick: tuple[str, ...] | None
    full: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.py")


BENCHMARKS = (
    Benchmark("hardware", ("--repeats=3",)),
    Benchmark("simulation", ("--without-peers", "--only=linear", "--rounds=10", "--repetitions=1")),
    Benchmark("aggregation", ("--uploads=10", "--only=encrypted")),
    Benchmark("scaling", ("--only=jobs", "--uploads=50", "--repeats=1")),
    Benchmark("load", ("--only=check-ins", "--only=uploads", "--seconds=3", "--places=500", "--uploads=50")),
    Benchmark("database", ("--contributions=2000",)),
    Benchmark("round", None),
    Benchmark("cold_start", ("--only=simulate", "--only=server", "--repeats=1")),
    Benchmark("build", None),
    Benchmark("dashboard", ("--rounds=100", "--assignments=10000")),
    Benchmark("device", None),
    Benchmark("device_daemon", ("--repeats=1",)),
    Benchmark("audit", None),
)


def run(benchmark: Benchmark, arguments: Sequence[str], directory: Path) -> tuple[list[Row], str]:
    """The rows of a benchmark, and the end of what it said if it failed: then one row that says so."""
    found, log = directory / f"{benchmark.name}.json", directory / f"{benchmark.name}.log"
    command = [sys.executable, str(benchmark.script), *arguments, f"--json={found}"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": "160"}
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                timeout=TIMEOUT, check=False,
            ).returncode  # fmt: skip
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"over {TIMEOUT:g} s"
    if not problem:
        try:
            rows = [Row(**row) for row in json.loads(found.read_bytes())]
        except (OSError, ValueError, TypeError) as error:
            problem = f"no rows: {error}"
        else:
            broken = any(row.value is None for row in rows)
            return rows, _end(log) if broken else ""
    return [Row(benchmark.name, f"{benchmark.script.name} failed", None, "", note=problem)], _end(log)


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])


def table_of(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("what")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("beside it")
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("note", style="dim")
    for group, members in groupby(rows, lambda row: row.group):
        table.add_section()
        table.add_row(f"[bold]{escape(group)}")
        said = ""
        for row in members:
            figure = f"{number(row.value)} {row.unit}" if row.value is not None else "[red]failed"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            note = escape(row.note) if row.note != said else ""
            table.add_row(escape(row.name), figure, escape(row.against), ratio, note)
            said = row.note
    return table


def number(value: float) -> str:
    """Three digits or so."""
    places = next((places for bound, places in ((100, 0), (10, 1), (1, 2)) if abs(value) >= bound), 3)
    return f"{value:,.{places}f}"


def main() -> None:
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer benchmarks, rows and repetitions")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="of " + ", ".join(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console, described, begun = Console(), machine(), time.monotonic()
    chosen = [
        (benchmark, (benchmark.quick or ()) if arguments.quick else benchmark.full)
        for benchmark in BENCHMARKS
        if (benchmark.name in arguments.only if arguments.only else benchmark.quick is not None or not arguments.quick)
    ]
    rows: list[Row] = []
    failed = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as directory,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        for place, (benchmark, options) in enumerate(chosen, 1):
            task = progress.add_task(f"{place} of {len(chosen)}: {benchmark.script.name} {' '.join(options)}")
            start = time.monotonic()
            found, problem = run(benchmark, options, Path(directory))
            progress.remove_task(task)
            took = f"{time.monotonic() - start:.0f} s"
            progress.console.print(f"{benchmark.script.name}: {len(found)} rows, {took}", highlight=False)
            if problem:
                progress.console.print(problem, style="red", highlight=False, markup=False)
            rows += found
            failed += [benchmark.script.name] if any(row.value is None for row in found) else []
    wide = console if console.is_terminal else Console(width=max(180, console.width))
    wide.print(table_of(rows, described))
    wide.print("A ratio is the speed of a row over that of what stands beside it: above 1 is faster.")
    wide.print(f"{time.monotonic() - begun:.0f} s in all")
    write_rows(arguments.json, rows)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
