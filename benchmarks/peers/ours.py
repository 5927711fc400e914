"""fedcompute: what `fedcompute simulate` runs, on a SavedModel as users have it.

One process trains a client on each core; several are worker processes that train one client at a time. The data and the
clients of a round are put in the place of a loaded data set and a random sample; everything else is the path of the
command, with the server's checks, exact sums and updates.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from workload import (
    BATCH,
    CLASSES,
    CLIENTS,
    CLIP_NORM,
    COHORT,
    LEARNING_RATE,
    MOST_ROUNDS,
    NOISE_MULTIPLIER,
    SIDE,
    Arguments,
    Array,
    Workload,
    answer,
    load,
    read_arguments,
)

CONFIG = f"""
mode: TRAINING_ONLY
population_name: "benchmark"
policies {{
  min_separation_policy {{ minimum_separation: 1 }}
  data_availability_policy {{ min_example_count: 1 }}
  model_release_policy {{ num_max_training_rounds: {MOST_ROUNDS} dp_target_epsilon: 10 dp_delta: 0.001 }}
  dataset_policy {{ batch_size: {BATCH} }}
}}
federated_learning {{
  learning_process {{
    type: FED_AVG
    client_optimizer: SGD
    client_learning_rate: {LEARNING_RATE}
    server_optimizer: SGD
    server_learning_rate: 1
    runtime_config {{ report_goal: {COHORT} }}
  }}
}}
differential_privacy {{
  type: FIXED_GAUSSIAN
  noise_multiplier: {NOISE_MULTIPLIER}
  clip_norm: {CLIP_NORM}
  estimated_population: {CLIENTS}
}}
"""


def keras_model(workload: Workload) -> Any:
    import keras

    layers = keras.layers
    hidden = [
        layers.Conv2D(32, 3, activation="relu"),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
    ]
    linear = len(workload.weights) == 2
    body = [layers.Flatten()] if linear else hidden
    model = keras.Sequential([keras.Input((SIDE, SIDE, 1), name="x"), *body, layers.Dense(CLASSES)])
    model.set_weights(workload.weights)
    return model


def write_model(workload: Workload, model: Any, directory: Path) -> None:
    import keras
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model

    spec = tf.TensorSpec([None, SIDE, SIDE, 1], tf.float32), tf.TensorSpec([None, 1], tf.int64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    save_functional_model(functional_model_from_keras(model, loss, spec), directory)


def dataset(data: str, _clients: int, _seed: int) -> Any:
    """The workload at a path, as one of the package's data sets."""
    from fedcompute.models.datasets import FederatedDataset

    workload = load(Path(data), "linear")
    clients = {str(number): pair for number, pair in enumerate(zip(workload.x, workload.y, strict=True))}
    return FederatedDataset("benchmark", clients, workload.test_x, workload.test_y, CLASSES)


def sum_of_run(job: Any) -> Any:
    """The package's job for workers, which find the workload."""
    from fedcompute.fleet.simulation import jobs

    take_workload()
    return jobs.sum_of_run(job)


def take_workload(cohorts: Array | None = None) -> None:
    """Puts the workload where the package would load a data set, and its clients in the place of random ones."""
    from fedcompute.models.quiet import quiet_tensorflow

    with quiet_tensorflow():
        from fedcompute.fleet.simulation import rounds, setup, slice_sums
    setup.load_dataset = dataset
    slice_sums.sum_of_run = sum_of_run
    if cohorts is not None:
        rounds.cohorts = lambda *_, **__: iter(cohorts)


@contextmanager
def sums_of(setup: Any, loaded: Any, processes: int) -> Iterator[Any]:
    """How a cohort is summed up: by threads of this process, or by worker processes."""
    from fedcompute.fleet.simulation.slice_sums import in_threads, in_workers, local_training
    from fedcompute.server.executors import ProcessExecutor

    if processes == 1:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            yield in_threads(loaded.task.process, local_training(setup), pool)
        return
    executor = ProcessExecutor(processes)
    try:
        yield in_workers(setup, executor)
    finally:
        executor.close()


def train(arguments: Arguments, workload: Workload, model: Any, directory: Path, begun: float) -> None:
    from google.protobuf import text_format

    from fedcompute.fleet.simulation.jobs import Setup
    from fedcompute.fleet.simulation.rounds import simulate
    from fedcompute.fleet.simulation.setup import load as load_setup
    from fedcompute.protos import task_builder_pb2

    write_model(workload, model, directory / "saved_model")
    config = text_format.Parse(CONFIG, task_builder_pb2.TaskConfig())
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True, skip_dp_aggregator=not arguments.private)
    setup = Setup(
        config.SerializeToString(),
        flags.SerializeToString(),
        str(directory / "saved_model"),
        str(arguments.data),
        CLIENTS,
    )
    take_workload(workload.cohorts)
    loaded = load_setup(setup)
    with sums_of(setup, loaded, arguments.processes) as sums:
        startup = time.perf_counter() - begun
        run = list(simulate(loaded.task, loaded.clients, sums, rounds=arguments.rounds))
    assert all(one.contributions == COHORT for one in run), run[0].rejected
    model.set_weights([run[-1].state[leaf.name] for leaf in loaded.task.process.trainable])
    predicted = model.predict(workload.test_x, batch_size=500, verbose=0).argmax(1)
    accuracy = float(np.mean(predicted == workload.test_y))
    versions = {"fedcompute": version("fedcompute"), "tensorflow": version("tensorflow"), "keras": version("keras")}
    answer([one.seconds for one in run], startup, accuracy, {"python": platform.python_version(), **versions})


def main() -> None:
    from fedcompute.fleet.simulation.local_training import pin_threads
    from fedcompute.models.quiet import quiet_tensorflow

    begun = time.perf_counter()
    arguments = read_arguments()
    workload = load(arguments.data, arguments.model)
    with quiet_tensorflow(), tempfile.TemporaryDirectory(prefix="fedcompute-bench-") as directory:
        pin_threads(os.cpu_count() or 1)
        model = keras_model(workload)
        train(arguments, workload, model, Path(directory), begun)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
