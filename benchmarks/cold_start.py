"""Seconds from a command to what it is there for, from cold.

    python benchmarks/cold_start.py [--repeats 5] [--only simulate]

`fedcompute simulate`: from the imports' end until the first round is done, model and data loaded and the graph compiled
in that time, and the imports by themselves. `fedcompute server`: from the command until /healthz answers. `fedcompute
quickstart`: from the command until its first round is done, as users see it. Every run is a process of its own with an
empty directory; files of the installation are in the page cache. Medians; asserts nothing about time.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
from hardware import machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rows import Row, write_rows

BIN = Path(sys.executable).parent
GROUP = "cold start"
SECTIONS = ("simulate", "server", "quickstart")
# Of the simulation: 1,000 clients, 50 in a round, batches of 10, with differential privacy.
CONFIG = """
population_name: "benchmark"
mode: TRAINING_ONLY
policies {
  model_release_policy { num_max_training_rounds: 20 dp_target_epsilon: 10 dp_delta: 0.000001 }
  dataset_policy { batch_size: 10 }
}
federated_learning {
  learning_process {
    client_learning_rate: 0.1
    runtime_config { report_goal: 50 }
    metrics { name: "sparse_categorical_accuracy" }
  }
}
differential_privacy { type: FIXED_GAUSSIAN noise_multiplier: 1 clip_norm: 1 }
"""
# What `fedcompute simulate` does with its own data set, with the clock between imports and work.
SIMULATE = """
import json, sys, time
start = time.perf_counter()
import keras, tensorflow
from fedcompute.builder.client import load_config
from fedcompute.fleet.simulation.jobs import RunJob, Setup
from fedcompute.fleet.simulation.local_training import pin_threads
from fedcompute.fleet.simulation.runs import run
from fedcompute.protos import task_builder_pb2
imported = time.perf_counter()
pin_threads(int(sys.argv[3]))
config = load_config(sys.argv[1]).config.SerializeToString()
flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True).SerializeToString()
moments = {}
def on_round(one):
    moments[one.number] = time.perf_counter()
run(RunJob(Setup(config, flags, sys.argv[2], "digits", 1000), rounds=2, every=1000), on_round)
first, second = moments[1], moments[2]
print(json.dumps([imported - start, first - imported, second - first]))
"""


def simulated(work: Path, model: str) -> tuple[float, float, float]:
    """Seconds of the imports, from there to the end of the first round, and of the second round."""
    config = work / "config.pbtxt"
    config.write_text(CONFIG)
    command = [sys.executable, "-c", SIMULATE, str(config), model, str(os.cpu_count() or 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(work))
    if done.returncode:
        sys.exit(done.stderr)
    imports, first, second = json.loads(done.stdout.splitlines()[-1])
    return imports, first, second


def server_ready(work: Path) -> float:
    """Seconds from `fedcompute server` to the first answer of /healthz."""
    start = time.perf_counter()
    with command("server", "--port=0", f"--data-dir={work / 'data'}", "--json", work=work) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["listening"]
        httpx.get(f"{url}/healthz", timeout=10).raise_for_status()
        return time.perf_counter() - start


def quickstart(work: Path) -> float:
    """Seconds from `fedcompute quickstart` to the line of its first round."""
    start = time.perf_counter()
    with command("quickstart", "--rounds=2", f"--directory={work / 'run'}", work=work) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:1] == ["1"]:
                return time.perf_counter() - start
    sys.exit("fedcompute quickstart ended without a round")


@contextmanager
def command(*arguments: str, work: Path) -> Iterator[subprocess.Popen[str]]:
    """A running `fedcompute`, which is told to end when the block does."""
    with (work / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [str(BIN / "fedcompute"), *arguments],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(work),
        )  # fmt: skip
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def environment(work: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FEDCOMPUTE_CACHE_DIR": str(work / "cache"),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def rows_of(sections: list[str], repeats: int) -> list[Row]:
    rows = []
    with Progress(transient=True) as progress:

        def medians(what: str, run: Callable[[Path], tuple[float, ...]]) -> list[float]:
            found = []
            for _ in progress.track(range(repeats), description=what):
                with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
                    found.append(run(Path(name)))
            return [statistics.median(values) for values in zip(*found, strict=True)]

        if "simulate" in sections:
            for model in ("digits-linear", "emnist-cnn"):
                imports, first, second = medians(f"simulate, {model}", partial(simulated, model=model))
                name = f"simulate {model}: first round after imports"
                note = f"model, data and graph included; the next round {second:.2f} s"
                rows.append(Row(GROUP, name, first, "s", note=note))
            rows.append(Row(GROUP, "imports: TensorFlow, Keras, fedcompute", imports, "s"))
        if "server" in sections:
            (seconds,) = medians("server", lambda work: (server_ready(work),))
            rows.append(Row(GROUP, "fedcompute server: until /healthz answers", seconds, "s", note="empty directory"))
        if "quickstart" in sections:
            (seconds,) = medians("quickstart", lambda work: (quickstart(work),))
            note = "build, server, 40 devices; TensorFlow is imported by two processes"
            rows.append(Row(GROUP, "fedcompute quickstart: until its first round is done", seconds, "s", note=note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; all without it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console(width=max(120, Console().width))
    console.print(machine())
    rows = rows_of(arguments.only or list(SECTIONS), arguments.repeats)
    table = Table("what", "seconds", "", title=f"from cold, median of {arguments.repeats}")
    for row in rows:
        table.add_row(row.name, f"{row.value:.2f}", row.note)
    console.print(table)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
