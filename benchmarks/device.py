"""Seconds that a device takes to run plans.

    python benchmarks/device.py [--repeats 9]

Later runs of a prepared plan, against the same training steps in a plain loop over a `tf.function`: once on the same
serialized examples, once on batches that were parsed before. Then the first run of a fresh process. Runs take turns,
medians are shown; asserts nothing about time.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from rows import Row, write_rows

from fedcompute.builder.client_graph import ClientSettings, client_graph
from fedcompute.builder.client_optimizers import SGD
from fedcompute.builder.device_graph import device_graph
from fedcompute.builder.example_source import example_format, parse_batch
from fedcompute.builder.lower_ops import LowerOps
from fedcompute.builder.op_check import supported_ops
from fedcompute.builder.plan import build_plan, client_only_plan, example_selector
from fedcompute.device.developer.examples import training_example
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.models.functional_model import FunctionalModel, functional_model_from_keras
from fedcompute.models.zoo import binary_cross_entropy, create_dense_model, sparse_cross_entropy
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.tree import LeafSpec

RATE = 0.1
FIRST_RUN = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.protos import plan_pb2
import tensorflow
imported = time.perf_counter()
plan, checkpoint, examples = (Path(sys.argv[1], name).read_bytes() for name in ("plan", "checkpoint", "examples"))
size = int(sys.argv[2])
examples = [examples[i:i + size] for i in range(0, len(examples), size)]
plan, runner = plan_pb2.ClientOnlyPlan.FromString(plan), PlanRunner()
runner.prepare(plan)
prepared = time.perf_counter()
runner.run(plan, checkpoint, examples)
first = time.perf_counter()
runner.run(plan, checkpoint, examples)
print(imported - start, prepared - imported, first - prepared, time.perf_counter() - first)
"""


@dataclass(frozen=True)
class Task:
    """A model, how it is trained, and the plan that does it."""

    name: str
    model: FunctionalModel
    classes: int
    batch: int
    steps: int

    def plan(self) -> tuple[plan_pb2.ClientOnlyPlan, bytes]:
        """FED_AVG with a fixed clip norm, lowered as for phones; and its client checkpoint."""
        weights = self.model.trainable
        process = training_process(
            algorithm=learning_pb2.LearningProcess.FED_AVG,
            trainable=[LeafSpec(str(i), weight.shape, weight.dtype) for i, weight in enumerate(weights)],
            non_trainable=[],
            server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
            aggregator=learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=2),
            metrics=(),
        )
        graph = client_graph(self.model, process, ClientSettings("", self.batch, -1, SGD, RATE, b""))
        flatbuffer = device_graph(graph, supported_ops(), LowerOps.AUTO).flatbuffer
        plan = client_only_plan(build_plan(process, flatbuffer, example_selector("")))
        return plan, write_checkpoint(client_checkpoint(process, initial_state(process, weights, [])))

    def examples(self) -> list[bytes]:
        rng = np.random.default_rng(0)
        shape = self.model.x_spec.shape[1:]
        labels = rng.integers(0, self.classes, self.batch * self.steps)
        return [training_example({"x": rng.random(shape, dtype=np.float32), "y": int(label)}) for label in labels]


def tasks() -> list[Task]:
    layers, label = keras.layers, tf.TensorSpec([None, 1], tf.int64)
    pixels, image = tf.TensorSpec([None, 784]), tf.TensorSpec([None, 28, 28, 1])
    linear = keras.Sequential([keras.Input((784,)), layers.Dense(62, activation="softmax")])
    convolutional = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    from_keras = functional_model_from_keras
    return [
        Task("dense 784-256-2", from_keras(create_dense_model(), binary_cross_entropy, (pixels, label)), 2, 3, 200),
        Task("linear 784-62", from_keras(linear, sparse_cross_entropy, (pixels, label)), 62, 3, 200),
        Task("convolutions 8-16", from_keras(convolutional, sparse_cross_entropy, (image, label)), 10, 3, 200),
        Task("convolutions 8-16", from_keras(convolutional, sparse_cross_entropy, (image, label)), 10, 20, 50),
    ]


def plain_loop(task: Task) -> Callable[[Any], None]:
    """Trains on batches of (x, y), one call of a `tf.function` for each."""
    variables = [tf.Variable(weight) for weight in task.model.trainable]

    @tf.function(reduce_retracing=True, autograph=False)
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            output = task.model.predict_on_batch((variables, ()), x, training=True)
            loss = task.model.loss(output, y)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(RATE * gradient)

    def train(batches: Any) -> None:
        for variable, weight in zip(variables, task.model.trainable, strict=True):
            variable.assign(weight)
        for x, y in batches:
            step(x, y)
        for variable in variables:
            variable.numpy()

    return train


def later_runs(repeats: int) -> tuple[Table, list[Row]]:
    """Median seconds of runs that take turns, each after two that do not count."""
    table = Table(title=f"later runs, {os.cpu_count()} cores, TensorFlow {tf.__version__}: milliseconds per step")
    for heading in ("model", "batch x steps", "plain loop", "plan runner", "ratio", "parsed before", "ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    runner, rows = PlanRunner(), []
    for task in tasks():
        plain, ours, parsed = (1000 * seconds / task.steps for seconds in compared(task, runner, repeats))
        row = (f"{plain:.3f}", f"{ours:.3f}", f"{ours / plain:.2f}", f"{parsed:.3f}", f"{ours / parsed:.2f}")
        table.add_row(task.name, f"{task.batch} x {task.steps}", *row)
        name, floor = f"a training step, {task.name}, batch {task.batch}", f"plain tf.function loop, {plain:.3f} ms"
        note = "examples parsed in both; a later run of the plan"
        rows.append(Row("device", name, ours, "ms", floor, plain / ours, note))
    runner.close()
    return table, rows


def compared(task: Task, runner: PlanRunner, repeats: int) -> list[float]:
    """Seconds of a plain loop on serialized examples, of the plan runner, of a plain loop on parsed batches."""
    (plan, checkpoint), examples, train = task.plan(), task.examples(), plain_loop(task)
    layout = example_format(task.model.x_spec, task.model.y_spec, "")
    parse = tf.autograph.experimental.do_not_convert(lambda serialized: parse_batch(serialized, layout))

    def batches() -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(examples).batch(task.batch).map(parse)

    parsed = list(batches())
    works = [lambda: train(batches()), lambda: runner.run(plan, checkpoint, examples), lambda: train(parsed)]
    return medians(works, repeats)


def medians(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 2):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[2:]) for taken in seconds]


def first_run(repeats: int) -> tuple[Table, list[Row]]:
    """A fresh process, up to the end of its second run."""
    table = Table(title="the first run of a fresh process: seconds")
    for heading in ("model", "import of TensorFlow", "preparation", "first run", "second run"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = []
    for task in tasks()[:3]:
        (plan, checkpoint), examples = task.plan(), task.examples()
        # All of one size, so that the process can take them apart.
        examples = [example for example in examples if len(example) == len(examples[0])]
        with tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as folder:
            parts = (("plan", plan.SerializeToString()), ("checkpoint", checkpoint), ("examples", b"".join(examples)))
            for name, content in parts:
                Path(folder, name).write_bytes(content)
            command = [sys.executable, "-c", FIRST_RUN, folder, str(len(examples[0]))]
            seconds = [
                [float(word) for word in subprocess.run(command, capture_output=True, check=True).stdout.split()]
                for _ in range(repeats)
            ]
        imported, prepared, first, second = (statistics.median(column) for column in zip(*seconds, strict=True))
        table.add_row(task.name, *(f"{value:.3f}" for value in (imported, prepared, first, second)))
        note = f"import of TensorFlow before it {imported:.1f} s"
        rows.append(Row("device", f"first run in a fresh process, {task.name}", prepared + first, "s", note=note))
    return table, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    console = Console()
    console.print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    rows = []
    for table, found in (later_runs(arguments.repeats), first_run(min(3, arguments.repeats))):
        console.print(table)
        rows += found
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
