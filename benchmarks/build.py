"""Seconds from command to created tasks, for training and evaluation of the tutorial's convolutional network.

    python benchmarks/build.py [--model emnist-cnn]

Starts a server and a task builder as users do and times `task_builder_client`: the first build of a fresh service, a
second with another configuration, and one that the service has built before. Then a calibration of noise, first and
again. Prints a table; asserts nothing about time.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

BIN = Path(sys.executable).parent
POPULATION = "benchmark"
CONFIG = """\
population_name: "benchmark"
mode: TRAINING_AND_EVAL
policies {{ model_release_policy {{ num_max_training_rounds: {rounds} dp_target_epsilon: 10 dp_delta: 0.000001 }} }}
federated_learning {{
  learning_process {{
    client_learning_rate: {learning_rate}
    runtime_config {{ report_goal: 50 }}
    metrics {{ name: "sparse_categorical_accuracy" }}
  }}
  evaluation {{ source_training_task_id: 1 report_goal: 2 }}
}}
differential_privacy {{ type: FIXED_GAUSSIAN noise_multiplier: {noise} clip_norm: 1 }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emnist-cnn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    rows = []
    table = Table("build", "seconds", title=f"{arguments.model}, training and evaluation, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as name:
        work = Path(name)
        os.environ["FEDCOMPUTE_CACHE_DIR"] = str(work / "cache")
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        model = save_model(arguments.model, work / "model")
        with (
            started("fedcompute", "server", "--port=0", f"--data-dir={work / 'data'}") as server,
            started("task_builder", "--port=0", f"--task_management_server={server}") as builder,
        ):
            for label, rounds, learning_rate, noise in (
                ("first in a fresh service, TensorFlow import included", 20, 0.1, 1),
                ("second, another configuration", 20, 0.2, 1),
                ("the same again, from the cache", 20, 0.2, 1),
                ("with noise to calibrate", 20, 0.3, 0),
                ("with noise calibrated before", 20, 0.4, 0),
            ):
                config = work / "config.pbtxt"
                config.write_text(CONFIG.format(rounds=rounds, learning_rate=learning_rate, noise=noise))
                seconds = build(builder, model, config)
                table.add_row(label, f"{seconds:.2f}")
                rows.append(Row("build", label, seconds, "s", note=f"{arguments.model}, training and evaluation"))
                cancel_all(server)
    Console().print(table)
    write_rows(arguments.json, rows)


def save_model(name: str, path: Path) -> Path:
    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model
    from fedcompute.models.zoo import SAMPLE_MODELS

    sample = SAMPLE_MODELS[name]
    save_functional_model(functional_model_from_keras(sample.build(), sample.loss_fn(), sample.input_spec()), path)
    return path


@contextmanager
def started(*command: str) -> Iterator[str]:
    """Runs a program of this installation; yields the URL that it announces."""
    process = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        words = (word for line in process.stdout for word in line.split())
        yield next(word for word in words if word.startswith("http://"))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def build(builder: str, model: Path, config: Path) -> float:
    command = [BIN / "task_builder_client", f"--task_builder_server={builder}", f"--saved_model={model}"]
    start = time.perf_counter()
    done = subprocess.run([*map(str, command), f"--task_config={config}"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds


def cancel_all(server: str) -> None:
    fedcompute = [str(BIN / "fedcompute"), "task"]
    listed = subprocess.run([*fedcompute, "list", "--server", server, "--json"], capture_output=True, check=True)
    for task in json.loads(listed.stdout):
        if task["status"] in ("OPEN", "CREATED"):
            task_id = f"--task-id={task['task_id']}"
            cancel = [*fedcompute, "cancel", f"--population={POPULATION}", task_id, "--server", server]
            subprocess.run(cancel, capture_output=True, check=True)


if __name__ == "__main__":
    main()
