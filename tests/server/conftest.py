"""A real server on loopback, hand-made plans for it, and hand-made devices that speak its protocol."""

import importlib.util
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fedcompute.app import server as http_server
from fedcompute.crypto.envelope import gzip_bytes, seal_update
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.learning.specification import evaluation_process, initial_state, training_process
from fedcompute.protos import learning_pb2, plan_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.executors import ProcessExecutor
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

PROTO = {"content-type": "application/x-protobuf"}
FLOAT = np.dtype(np.float32)
WEIGHTS = (LeafSpec("kernel", (3, 2), FLOAT), LeafSpec("bias", (2,), FLOAT))
INITIAL = (np.arange(6, dtype=np.float32).reshape(3, 2) / 10, np.array([0.5, -0.5], np.float32))
FAST = RetryWindow(0.01, 0.02)
RATE = 0.5


def process_of(aggregator=None) -> learning_pb2.LearningProcess:
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=WEIGHTS,
        non_trainable=(),
        server_optimizer=learning_pb2.Sgd(learning_rate=RATE),
        aggregator=aggregator or learning_pb2.UniformMean(),
        metrics=["sparse_categorical_accuracy"],
    )


def plan_of(process) -> bytes:
    return plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process).SerializeToString()


def client_plan() -> bytes:
    plan = plan_pb2.ClientOnlyPlan(tflite_graph=b"TFL3")
    plan.phase.tensorflow_spec.example_selector.collection_uri = "app://examples"
    return plan.SerializeToString()


def update_of(process, deltas, metrics=(1.0, 2.0, 3.0, 4.0)) -> dict[str, np.ndarray]:
    """An update file's leaves: count if the process has one, metric state, deltas."""
    leaves, rest, states = {}, list(deltas), list(metrics)
    for leaf in process.updates:
        match leaf.role:
            case learning_pb2.UpdateLeaf.COUNT:
                leaves[leaf.spec.name] = np.array(1, np.int32)
            case learning_pb2.UpdateLeaf.METRIC:
                leaves[leaf.spec.name] = np.array(states.pop(0), np.float32)
            case _:
                leaves[leaf.spec.name] = np.asarray(rest.pop(0), np.float32)
    return leaves


@dataclass
class Api:
    """A client of one server; devices and operators both."""

    url: str
    # Without limits: where they are reached, the pool closes idle connections that another thread is about to use.
    http: httpx.Client = field(
        default_factory=lambda: httpx.Client(
            timeout=30, limits=httpx.Limits(max_connections=None, max_keepalive_connections=None)
        )
    )

    def create_task(self, population, *, goal=3, rounds=1, room=None, info=None) -> task_pb2.Task:
        task = task_pb2.Task(
            total_iteration=rounds,
            min_aggregation_size=goal,
            max_aggregation_size=room or 2 * goal,
            min_client_version="0",
            max_client_version="999999999",
        )
        if info is not None:
            task.info.CopyFrom(info)
        response = self.http.post(
            f"{self.url}/taskmanagement/v1/population/{population}:create-task",
            content=task_pb2.CreateTaskRequest(task=task).SerializeToString(),
            headers=PROTO,
        )
        assert response.status_code == 200, response.text
        return task_pb2.CreateTaskResponse.FromString(response.content).task

    def open_task(self, population, process, *, within=30, **options) -> int:
        """Creates a task, puts its artifacts and waits until it is open; returns its id."""
        task = self.create_task(population, **options)
        for url, data in (
            (task.init_checkpoint_url[0], write_checkpoint(initial_state(process, INITIAL, ()))),
            (task.server_phase_url[0], gzip_bytes(plan_of(process))),
            (task.client_only_plan_url[0], client_plan()),
        ):
            assert self.http.put(url, content=data).status_code == 200
        self.wait(lambda: self.task(population, task.task_id)["task"]["status"] != "CREATED", within)
        return task.task_id

    def task(self, population, task_id) -> dict[str, Any]:
        response = self.http.get(f"{self.url}/api/v1/tasks/{population}/{task_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def wait_for(self, population, task_id, status, iteration=None) -> dict[str, Any]:
        """Waits until the task, or one of its rounds, has a status."""

        def reached():
            found = self.task(population, task_id)
            if iteration is None:
                return found if found["task"]["status"] == status else None
            rounds = {one["iteration_id"]: one["status"] for one in found["iterations"]}
            return found if rounds.get(iteration) == status else None

        return self.wait(reached)

    def wait(self, question, seconds=30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = question()
            if answer:
                return answer
            time.sleep(0.02)
        raise AssertionError("it did not happen in time")

    def check_in(self, population, version="1", headers=None) -> httpx.Response:
        request = task_assignments_pb2.CreateTaskAssignmentRequest()
        request.client_version.version_code = version
        return self.http.post(
            f"{self.url}/taskassignment/v1/population/{population}:create-task-assignment",
            content=request.SerializeToString(),
            headers={**PROTO, **(headers or {"odp-idempotency-key": f"1 - {uuid.uuid4()}"})},
        )

    def assignment(self, population, seconds=10) -> task_assignments_pb2.TaskAssignment:
        """Checks in until there is a place."""

        def got():
            response = self.check_in(population)
            assert response.status_code in (200, 201), response.text
            answer = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(response.content)
            return answer.task_assignment if response.status_code == 201 else None

        return self.wait(got, seconds)

    def report(self, assignment, result=task_assignments_pb2.ReportResultRequest.COMPLETED) -> httpx.Response:
        return self.http.put(
            f"{self.url}/taskassignment/v1{assignment.self_uri}:report-result",
            content=task_assignments_pb2.ReportResultRequest(result=result).SerializeToString(),
            headers=PROTO,
        )

    def upload_instruction(self, assignment) -> task_assignments_pb2.UploadInstruction:
        response = self.report(assignment)
        assert response.status_code == 200, response.text
        return task_assignments_pb2.ReportResultResponse.FromString(response.content).upload_instruction

    def upload(self, instruction, body: bytes) -> httpx.Response:
        headers = dict(instruction.extra_request_headers)
        return self.http.put(instruction.upload_location, content=body, headers=headers)

    def seal(self, leaves) -> bytes:
        """The body that a device uploads."""
        key = parse_public_keys(self.http.get(f"{self.url}/.well-known/odp/v1/public-keys").content)[0]
        return gzip_bytes(seal_update(write_checkpoint(leaves), key))

    def place(self, population):
        """An assignment whose device has trained, and where it uploads; it comes again if a round closed meanwhile."""
        while True:
            assignment = self.assignment(population)
            instruction = self.upload_instruction(assignment)
            if instruction.upload_location:
                return assignment, instruction

    def contribute(self, population, leaves=None, body=None) -> task_assignments_pb2.TaskAssignment:
        """One device's whole run."""
        body = self.seal(leaves) if body is None else body
        assignment, instruction = self.place(population)
        response = self.upload(instruction, body)
        assert response.status_code == 200, response.text
        return assignment

    def checkpoint(self, population, task_id, iteration) -> dict[str, np.ndarray]:
        url = f"{self.url}/api/v1/tasks/{population}/{task_id}/checkpoint"
        response = self.http.get(url, params={"iteration": iteration})
        assert response.status_code == 200, response.text
        return read_checkpoint(response.content)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings_of(data_dir, **changes) -> Settings:
    return Settings(
        data_dir=data_dir,
        port=free_port(),
        **{"workers": 1, "retry_no_task": FAST, "retry_no_active_task": FAST, **changes},
    )


class Running:
    """A server in a thread of this process."""

    def __init__(self, settings, executor=None) -> None:
        self.settings = settings
        self._server = http_server(settings, executor)
        self.app = self._server.config.app
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self._server.started
        self.api = Api(settings.base_url)

    def stop(self) -> None:
        self.api.http.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


class SharedWorker:
    """An executor of one server whose worker process goes on to work for the next one.

    A server's own takes longer to start than the jobs of most tests.
    """

    capacity = 2

    def __init__(self, pool) -> None:
        self._pool = pool
        self._outcomes = []

    def submit(self, job, argument):
        self._outcomes.append(self._pool.submit(job, argument))
        return self._outcomes[-1]

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        for one in self._outcomes:
            one.cancel()


@pytest.fixture(scope="session")
def shared_worker():
    """Returns make() -> an executor for one server."""
    pool = ProcessExecutor(1)
    yield lambda: SharedWorker(pool)
    pool.close()


@pytest.fixture(scope="module")
def api(tmp_path_factory, shared_worker):
    """One server for a whole test file; every test takes a population of its own."""
    running = Running(settings_of(tmp_path_factory.mktemp("data")), shared_worker())
    yield running.api
    running.stop()


@pytest.fixture
def run_server(tmp_path, shared_worker):
    """Starts servers with settings of the test's choice; all stop at its end.

    A server has a worker process of its own where the test says how many, names a kind of executor, or names a blob
    store, which a worker finds by the environment that it was started with.
    """
    started = []

    def run(executor=None, **changes):
        if isinstance(executor, str):
            executor, changes["executor"] = None, executor
        elif executor is None and not {"workers", "blob_url"} & set(changes):
            executor = shared_worker()
        started.append(Running(settings_of(changes.pop("data_dir", tmp_path / "data"), **changes), executor))
        return started[-1]

    yield run
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def start_server(shared_worker):
    """Starts servers on a data directory of the test's choice; all stop at the end of the test file."""
    started = []

    def start(data_dir, **changes):
        started.append(Running(settings_of(data_dir, **changes), shared_worker()))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def hand_made():
    """What the tests make by hand: processes, plans, updates."""
    return HandMade()


class HandMade:
    process_of = staticmethod(process_of)
    evaluation_of = staticmethod(evaluation_process)
    plan_of = staticmethod(plan_of)
    client_plan = staticmethod(client_plan)
    update_of = staticmethod(update_of)
    settings_of = staticmethod(settings_of)
    api_of = Api
    initial = INITIAL
    rate = RATE


@pytest.fixture(scope="session")
def reference():
    """The scripted client and its parts; test modules cannot import their neighbours."""
    path = Path(__file__).with_name("reference_client.py")
    spec = importlib.util.spec_from_file_location("reference_client", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Gate:
    """An executor of threads; jobs of the kind `held` end, their results stored, when the test opens the gate."""

    def __init__(self, held) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._held = held
        self.reached, self.opened = threading.Event(), threading.Event()

    def submit(self, job, argument):
        return self._pool.submit(self._run, job, argument)

    def _run(self, job, argument):
        result = job(argument)
        if job is self._held:
            self.reached.set()
            self.opened.wait(60)
        return result

    capacity = 4

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        self.opened.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def make_gate():
    """Executors that keep one kind of job from ending."""
    made = []

    def make(held):
        made.append(Gate(held))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def make_api():
    """Clients for servers that the test starts itself."""
    made = []

    def make(url):
        made.append(Api(url))
        return made[-1]

    yield make
    for one in made:
        one.http.close()
