"""Programs as people run them, a real server on loopback, and a small real model."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fedcompute.cli import app
from fedcompute.server import executors
from fedcompute.server.listening import listen
from fedcompute.server.settings import Settings

BIN = Path(sys.executable).parent

CONFIG = """\
population_name: "digits"
mode: TRAINING_AND_EVAL
policies { model_release_policy { num_max_training_rounds: 3 } }
federated_learning {
  learning_process {
    client_learning_rate: 0.1
    runtime_config { report_goal: 2 }
    metrics { name: "sparse_categorical_accuracy" }
  }
  evaluation { source_training_task_id: 1 report_goal: 2 }
}
differential_privacy { type: FIXED_GAUSSIAN noise_multiplier: 5 clip_norm: 1 estimated_population: 1000000 }
"""


@pytest.fixture(scope="session")
def fedcompute():
    """Returns run(*arguments, env=None) -> result of the `fedcompute` program in this process."""

    def run(*arguments, env=None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)

    return run


@pytest.fixture(scope="session")
def workshop():
    """A worker process for every build of `build`: it loads TensorFlow, which takes longer than a build, once."""
    made = executors.ProcessExecutor(1)
    yield made
    made.close()


@pytest.fixture
def build(fedcompute, workshop, monkeypatch):
    """Returns run(*arguments, env=None) -> result of `fedcompute task build` in this process and the kept worker."""
    kept = SimpleNamespace(submit=workshop.submit, close=lambda: None)
    monkeypatch.setattr(executors, "ProcessExecutor", lambda workers: kept)
    return partial(fedcompute, "task", "build")


@pytest.fixture(scope="session")
def program():
    """Returns run(name, *arguments, **options) -> a finished process of an installed program."""

    def run(name, *arguments, env=None, **options):
        return subprocess.run(
            [str(BIN / name), *map(str, arguments)], capture_output=True, text=True, timeout=120,
            env={**os.environ, **(env or {})}, **options,
        )  # fmt: skip

    return run


@contextlib.contextmanager
def programs():
    """Gives start(name, *arguments, env=None) -> a running program, interrupted at the end of the block."""
    started = []

    def run(name, *arguments, env=None):
        process = subprocess.Popen(
            [str(BIN / name), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        started.append(process)
        return process

    try:
        yield run
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)


@pytest.fixture
def start():
    """Programs that run until the end of the test."""
    with programs() as run:
        yield run


@pytest.fixture(scope="module")
def start_once():
    """Programs that run until the last test of the file."""
    with programs() as run:
        yield run


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server in this process: `url`, `data_dir`."""
    import fedcompute.app

    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    data_dir = tmp_path_factory.mktemp("data")
    running = fedcompute.app.server(Settings(data_dir=data_dir, port=port, workers=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield SimpleNamespace(url=f"http://localhost:{port}", data_dir=data_dir)
    running.should_exit = True
    thread.join(30)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small model: `keras` file, `saved` directory, `config` file."""
    keras = pytest.importorskip("keras", reason="needs TensorFlow")
    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model
    from fedcompute.models.zoo import SAMPLE_MODELS

    root = tmp_path_factory.mktemp("model")
    sample = SAMPLE_MODELS["digits-linear"]
    keras.utils.set_random_seed(1)
    built = sample.build()
    built.save(root / "model.keras")
    functional = functional_model_from_keras(built, sample.loss_fn(), sample.input_spec())
    save_functional_model(functional, root / "saved_model")
    (root / "fcp_server_config.json").write_text(CONFIG)
    return SimpleNamespace(
        keras=root / "model.keras", saved=root / "saved_model", config=root / "fcp_server_config.json",
        weights=functional.trainable,
    )  # fmt: skip


@pytest.fixture
def metrics_tree(tmp_path):
    """A data directory with three rounds of task digits/1 and two of digits/2; round 3 of the first is missing."""

    def write(task, number, values):
        path = tmp_path / "blobs" / "model" / task / str(number) / "s" / "0" / "metrics"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))

    for number, loss in ((1, 1.0), (2, None), (4, 0.5)):
        write("digits/1", number, {"server/client_work/train/loss": loss})
    for number in (1, 2):
        write("digits/2", number, {"server/client_work/train/loss": 0.9})
    return tmp_path
