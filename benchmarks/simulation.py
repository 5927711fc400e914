"""How fast rounds are simulated in memory, beside other programs that do the same work on the same data.

    python benchmarks/simulation.py [--rounds 12] [--repetitions 5] [--only linear,cnn] [--without-peers]

Each program runs as a process of its own, in turns, in an environment of its own that is made on first use (about 4 GB
below the user's cache directory; `--environments` chooses another place). Prints tables; asserts nothing about time.

The work: 1,000 clients with 50 images of 28x28x1 and 62 classes, 50 clients a round, batches of 10, one local epoch of
SGD at 0.1, plain federated averaging; softmax regression (48,670 parameters) and a convolutional network (1.2 million).
Same images, initial weights, clients in each round and order of examples everywhere, all in memory before the clock
starts. A round is training, clipping, summing up, noise and the new model; nothing is evaluated. The first round is
cold (tracing, compiling, workers that start and load the data) and stands apart. DP is a clip norm of 1 for a client's
update and Gaussian noise, in each program by its own mechanism. The accuracy on held-out images shows that all train
the same model.

One process may use every core: the PyTorch loop and pfl-research have PyTorch's own number of threads or one, whichever
is faster; fedcompute trains a client on each core; Flower has one actor with all cores. Of several processes each has
one thread.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import workload
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

PEERS = Path(__file__).parent / "peers"
TORCH = "torch==2.13.0"
TIMEOUT_SECONDS = 1800
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")


@dataclass(frozen=True)
class Program:
    """`requirements`: what its environment holds, none for this interpreter's. `torchrun`: launches its processes."""

    name: str
    script: str
    requirements: tuple[str, ...] = ()
    torchrun: bool = False

    @property
    def environment(self) -> str:
        return Path(self.script).stem


LOOP = Program("PyTorch loop", "pytorch_loop.py", (TORCH, "numpy"), torchrun=True)
PFL = Program("pfl-research", "pfl_research.py", ("pfl==0.6.0", TORCH), torchrun=True)
FLOWER = Program("Flower", "flower.py", ("flwr[simulation]==1.42.0", TORCH))
OURS = Program("fedcompute", "ours.py")
PROGRAMS = (LOOP, PFL, FLOWER, OURS)


@dataclass(frozen=True)
class Case:
    """A row: what all programs do."""

    model: str
    private: bool
    processes: int


@dataclass
class Cell:
    """What a program needed in a case: one list of seconds per round for each run, by its number of threads.

    `problem`: why there is nothing, in words.
    """

    case: Case
    program: str
    runs: dict[str, list[list[float]]] = field(default_factory=dict)
    startup: list[float] = field(default_factory=list)
    accuracy: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def medians(self) -> list[float]:
        """Seconds per round of each run, without the first round, with the better number of threads."""
        found = [[statistics.median(run[1:] or run) for run in runs] for runs in self.runs.values()]
        return min(found, key=statistics.median, default=[])

    @property
    def seconds(self) -> float | None:
        """Seconds per round: the median of the runs."""
        return statistics.median(self.medians) if self.medians else None

    @property
    def best(self) -> float | None:
        """Seconds of the fastest warm round of all: what a busy machine disturbs least."""
        warm = [seconds for runs in self.runs.values() for run in runs for seconds in run[1:]]
        return min(warm, default=None)

    @property
    def cold(self) -> float | None:
        """Seconds of the first round: the median of the runs."""
        firsts = [run[0] for runs in self.runs.values() for run in runs]
        return statistics.median(firsts) if firsts else None


def default_environments() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedcompute-peers"


def rows(
    *,
    rounds: int = 12,
    repetitions: int = 5,
    only: Sequence[str] = tuple(workload.MODELS),
    peers: bool = True,
    environments: Path | None = None,
    prefix: Sequence[str] = (),
) -> list[Cell]:
    """Runs every program in every case and returns what they needed, cases in order, programs in order.

    `rounds` are of the linear model; the network, whose rounds are long, has half of them. `prefix` is a command
    that every program is started with, such as `taskset -c 0,1`.
    """
    cases = [Case(model, private, count) for model in only for private in (False, True) for count in (1, 2)]
    programs = PROGRAMS if peers else (OURS,)
    pythons = {one: _python(one, environments or default_environments()) for one in programs}
    cells = {(case, one): Cell(case, one.name) for case in cases for one in programs}
    for (_, one), cell in cells.items():
        cell.problem = "" if pythons[one] else "not installed"
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as directory:
        data = Path(directory) / "workload.npz"
        workload.write(data)
        for repetition in range(repetitions):
            for (case, one), cell in cells.items():
                if not cell.problem:
                    count = rounds if case.model == "linear" else max(4, rounds // 2)
                    _measure(cell, case, one, [*prefix, str(pythons[one])], data, count)
                    done = cell.problem or ", ".join(f"{seconds:.4f}" for seconds in cell.medians)
                    sys.stderr.write(f"{repetition + 1}/{repetitions} {' '.join(_labels(case))} {one.name}: {done}\n")
    return list(cells.values())


def _measure(cell: Cell, case: Case, program: Program, python: list[str], data: Path, rounds: int) -> None:
    arguments = ["--data", str(data), "--model", case.model, "--processes", str(case.processes)]
    arguments += ["--rounds", str(rounds), *(["--private"] if case.private else [])]
    script = str(PEERS / program.script)
    launcher: tuple[str, ...] = ()
    threads: tuple[str, ...] = ("",)
    if program.torchrun:
        threads = ("", "1") if case.processes == 1 else ("1",)
        launcher = () if case.processes == 1 else (*TORCHRUN, "--nproc-per-node", str(case.processes))
    for number in threads:
        environment = {**os.environ, **({"OMP_NUM_THREADS": number} if number else {})}
        try:
            done = subprocess.run(
                [*python, *launcher, script, *arguments],
                capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            cell.problem = f"over {TIMEOUT_SECONDS} s"
            return
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
        if not lines:
            cell.problem = "failed"
            sys.stderr.write(f"{program.name}, {case}: exit code {done.returncode}\n{done.stderr[-2000:]}\n")
            return
        answer: dict[str, Any] = json.loads(lines[-1])
        cell.runs.setdefault(number, []).append(answer["seconds"])
        cell.startup.append(answer["startup"])
        cell.accuracy, cell.versions = answer["accuracy"], answer["versions"]


def _python(program: Program, environments: Path) -> Path | None:
    """The interpreter of a program's environment, made if need be; None, said on stderr, if that fails."""
    if not program.requirements:
        return Path(sys.executable)
    directory = environments / program.environment
    python = directory / "bin" / "python"
    mark = directory / "requirements.txt"
    wanted = "\n".join(program.requirements)
    if mark.is_file() and mark.read_text() == wanted:
        return python
    sys.stderr.write(f"{program.name}: installing {', '.join(program.requirements)} in {directory}\n")
    try:
        venv.create(directory, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *program.requirements]
        subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{program.name} cannot be installed, its cells stay empty: {(error.stderr or '')[-500:]}\n")
        return None
    mark.write_text(wanted)
    return python


def tables(cells: Sequence[Cell]) -> list[Table]:
    """Seconds per round with ratios, and what else the runs showed."""
    names = list(dict.fromkeys(cell.program for cell in cells))
    others = [name for name in names if name != OURS.name]
    found = {(cell.case, cell.program): cell for cell in cells}
    cases = list(dict.fromkeys(cell.case for cell in cells))
    speed = Table(title=f"seconds per round of {workload.COHORT} clients, median of runs; how many times faster we are")
    for heading in ("model", "DP", "processes"):
        speed.add_column(heading)
    for heading in (*names, *(f"x {name}" for name in others)):
        speed.add_column(heading, justify="right")
    for case in cases:
        ours = found[case, OURS.name].seconds
        ratios = [_ratio(found[case, name].seconds, ours) for name in others]
        speed.add_row(*_labels(case), *(_number(found[case, name]) for name in names), *ratios)
    details = Table(title="spread of the runs, cold starts and what was learnt")
    for heading in ("model", "DP", "processes", "program"):
        details.add_column(heading)
    for heading in ("s/round, runs", "best round s", "ms/client step", "first round s", "start-up s", "accuracy"):
        details.add_column(heading, justify="right")
    steps = workload.COHORT * workload.EXAMPLES // workload.BATCH
    for cell in cells:
        if cell.seconds is None or cell.best is None or cell.cold is None or cell.accuracy is None:
            continue
        spread = f"{min(cell.medians):.4f}..{max(cell.medians):.4f}"
        times = f"{cell.best:.4f}", f"{cell.seconds / steps * 1e3:.3f}", f"{cell.cold:.2f}"
        startup = f"{statistics.median(cell.startup):.2f}"
        details.add_row(*_labels(cell.case), cell.program, spread, *times, startup, f"{cell.accuracy:.3f}")
    return [speed, details]


def _labels(case: Case) -> tuple[str, str, str]:
    return case.model, "yes" if case.private else "no", str(case.processes)


def _number(cell: Cell) -> str:
    return cell.problem or f"{cell.seconds:.4f}"


def _ratio(other: float | None, ours: float | None) -> str:
    return "-" if other is None or ours is None else f"{other / ours:.2f}"


def plain_rows(cells: Sequence[Cell]) -> list[Row]:
    """Ours beside each of the others, case by case; a row without a figure where ours failed."""
    found = []
    for ours in (cell for cell in cells if cell.program == OURS.name):
        case = ours.case
        processes = "one process" if case.processes == 1 else f"{case.processes} processes"
        name = f"{case.model}, {'DP' if case.private else 'no DP'}, {processes}"
        note = ours.problem if ours.cold is None else f"s/round, {workload.COHORT} clients; the first {ours.cold:.2f} s"
        others = [cell for cell in cells if cell.case == case and cell is not ours]
        if not others or ours.seconds is None:
            found.append(Row("simulation", name, ours.seconds, "s", note=note))
            continue
        for other in others:
            against = f"{other.program}, {other.problem or f'{other.seconds:.4f} s'}"
            ratio = None if other.seconds is None else other.seconds / ours.seconds
            found.append(Row("simulation", name, ours.seconds, "s", against, ratio, note))
    return found


def versions(cells: Iterable[Cell]) -> str:
    """The versions of each program in a line."""
    parts = {cell.program: ", ".join(f"{name} {one}" for name, one in cell.versions.items()) for cell in cells}
    return "; ".join(f"{program}: {listed}" for program, listed in parts.items() if listed)


def machine() -> str:
    """Processor, cores and how busy it is."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return (
        f"{name or platform.processor()}, {platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of the linear model; the network has half")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default=",".join(workload.MODELS), help="models, with commas between")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--environments", type=Path, default=default_environments())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--prefix", default="", help="a command before every program, such as 'taskset -c 0,1'")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if unknown := [name for name in only if name not in workload.MODELS]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(workload.MODELS)}")
    console = Console(width=max(150, Console().width))
    console.print(machine())
    cells = rows(
        rounds=arguments.rounds,
        repetitions=arguments.repetitions,
        only=only,
        peers=not arguments.without_peers,
        environments=arguments.environments,
        prefix=shlex.split(arguments.prefix),
    )
    for table in tables(cells):
        console.print(table)
    console.print(versions(cells))
    console.print((__doc__ or "").partition("\n\nThe work: ")[2])
    write_rows(arguments.json, plain_rows(cells))


if __name__ == "__main__":
    main()
