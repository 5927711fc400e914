"""Fixtures of the device tests: the reference's artifacts, and HTTP servers on loopback."""

import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette

from fedcompute.device.developer.examples import training_example
from fedcompute.device.isolation.probe import probe
from fedcompute.protos import plan_pb2

SERVICE = """
import os, time
from datetime import UTC, datetime, timedelta
from fedcompute.device import *

EVER = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)

class Service(IsolatedService):
    def on_request(self, request_token):
        worker = Worker()
        worker.remote, worker.local = self.get_remote_data(request_token), self.get_local_data(request_token)
        worker.logs, worker.user_data = self.get_log_reader(request_token), self.get_user_data(request_token)
        worker.scheduler = self.get_federated_compute_scheduler(request_token)
        worker.urls = self.get_event_url_provider(request_token)
        worker.models = self.get_model_manager(request_token)
        return worker

class Worker(IsolatedWorker):
    def later(self, population, **interval):
        self.scheduler.schedule(Params(TrainingInterval(**interval)), FederatedComputeInput(population))

"""

REFERENCE = Path(__file__).resolve().parents[2] / "../shared/fixtures/reference-keras"


@pytest.fixture
def reference() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip("the reference's artifacts are not beside this checkout")
    return REFERENCE


@pytest.fixture
def reference_plan(reference):
    def read(name: str) -> plan_pb2.ClientOnlyPlan:
        return plan_pb2.ClientOnlyPlan.FromString((reference / "output" / name).read_bytes())

    return read


@pytest.fixture
def dense_data():
    """20 examples of the dense model: x float32 [20, 784], y int64 [20] of 0 and 1, and the serialized examples."""
    rng = np.random.default_rng(7)
    x = rng.random((20, 784), dtype=np.float32)
    y = rng.integers(0, 2, 20)
    return x, y, [training_example({"x": x[i], "y": y[i]}) for i in range(20)]


@pytest.fixture
def dense_weights():
    """Weights of the 784-256-2 model: the shapes of its trainable leaves, small random values."""
    rng = np.random.default_rng(8)
    shapes = [(784, 256), (256,), (256, 2), (2,)]
    return [(0.05 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


@pytest.fixture
def serve():
    """`with serve(routes) as base_url:` runs the routes on a free port of localhost, in a thread."""

    @contextmanager
    def run(routes) -> Iterator[str]:
        config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the test's server does not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://localhost:{port}"
        finally:
            server.should_exit = True
            thread.join(10)

    return run


@pytest.fixture(scope="session")
def isolated():
    """Skips where the kernel does not isolate workers; a device refuses to run there."""
    missing = [one.name for one in probe() if not one.enforced]
    if missing:
        pytest.skip(f"this machine cannot isolate: {', '.join(missing)}")


@pytest.fixture
def write_service(isolated):
    """Returns write(folder, hooks) -> folder with the code of `org.example.app.Service`, whose worker has these hooks.

    Hooks reach `self.remote`, `self.local`, `self.logs`, `self.user_data`, `self.scheduler`, `self.urls`,
    `self.models`, `self.later`.
    """

    def write(folder: Path, hooks: str) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "service.py").write_text(SERVICE + textwrap.indent(textwrap.dedent(hooks), "    ") + "\n    pass\n")
        return folder

    return write
