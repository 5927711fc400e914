"""Servers that fail at a chosen write, and devices that do what devices do: try again."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from fedcompute.crypto.envelope import gzip_bytes, seal_update
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.protos import learning_pb2, plan_pb2, task_assignments_pb2, task_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

PROTO = {"content-type": "application/x-protobuf"}
POPULATION = "faults"
INITIAL = (np.arange(6, dtype=np.float32).reshape(3, 2) / 8,)
GOAL, ROUNDS = 3, 2
PATIENCE_S = 90


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_of(aggregator):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=(LeafSpec("kernel", (3, 2), np.dtype(np.float32)),),
        non_trainable=(),
        server_optimizer=learning_pb2.Sgd(learning_rate=0.5),
        aggregator=aggregator,
        metrics=["sparse_categorical_accuracy"],
    )


# A tree of noise that outlives its round: more state than any other kind has.
PROCESS = process_of(learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=0.5, report_goal=GOAL))


class Zygote:
    """The program that forks servers."""

    def __init__(self):
        program = Path(__file__).with_name("zygote.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, **order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(20)


@pytest.fixture(scope="session")
def zygote():
    made = Zygote()
    yield made
    made.close()


def runs(pid):
    return Path(f"/proc/{pid}").exists()


@dataclass
class Server:
    """One server that is started again whenever it is gone, each time with the next of its faults."""

    zygote: Zygote
    directory: Path
    settings: dict
    faults: list[dict] = field(default_factory=list)
    revive: bool = True
    environment: dict = field(default_factory=dict)
    seeded: bool = True
    port: int = field(default_factory=free_port)
    starts: int = 0

    def __post_init__(self):
        self.url = f"http://localhost:{self.port}"
        self.trace = self.directory / f"trace-{self.port}"
        self._closed = threading.Event()
        self._start()
        self._watch = threading.Thread(target=self._revive)
        self._watch.start()

    def _start(self):
        fault = self.faults[self.starts] if self.starts < len(self.faults) else None
        if fault is not None:
            fault = {"mark": str(self.directory / f"fault-{self.starts}"), **fault}
        self.starts += 1
        self.pid = self.zygote.start(
            settings={"data_dir": str(self.directory / "data"), "port": self.port, **self.settings},
            fault=fault,
            environment=self.environment,
            seeded=self.seeded,
            trace=str(self.trace),
            log=str(self.directory / f"log-{self.port}"),
        )

    def _revive(self):
        while not self._closed.wait(0.02):
            if self.revive and not runs(self.pid):
                self._start()

    def runs(self):
        return runs(self.pid)

    def close(self):
        self._closed.set()
        self._watch.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while runs(self.pid) and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def start(zygote, tmp_path):
    """Starts servers on one data directory; all are gone at the end of the test."""
    started = []

    def run(faults=(), *, revive=True, environment=None, seeded=True, **settings):
        settings = {"collector_batch_size": 2, "lease_lifetime": 1.0, **settings}
        started.append(Server(zygote, tmp_path, settings, list(faults), revive, environment or {}, seeded))
        return started[-1]

    yield run
    for one in started:
        one.close()


class Client:
    """Devices and their operator: whatever fails is tried again, at any of the servers."""

    def __init__(self, *urls):
        self._urls = urls
        self._turn = 0
        # One of several may stand still, and is not worth waiting for.
        self.http = httpx.Client(timeout=2 if len(urls) > 1 else 10)

    def call(self, method, path, accept=(200, 201), **options):
        """The first acceptable answer of any server; `path` may be a whole URL, of which the host does not matter."""
        deadline = time.monotonic() + PATIENCE_S
        seen = None
        while time.monotonic() < deadline:
            url = self._urls[self._turn % len(self._urls)]
            target = url + (path if path.startswith("/") else "/" + path.split("/", 3)[3])
            try:
                answer = self.http.request(method, target, **options)
            except httpx.TransportError as error:
                seen = error
            else:
                if answer.status_code in accept:
                    return answer
                seen = f"{answer.status_code} {answer.text}"
            self._turn += 1
            time.sleep(0.03)
        raise AssertionError(f"{method} {path}: {seen}")

    def open_task(self, rounds=ROUNDS, goal=GOAL, process=PROCESS):
        task = task_pb2.Task(
            total_iteration=rounds, min_aggregation_size=goal, max_aggregation_size=goal,
            min_client_version="0", max_client_version="999999999",
        )  # fmt: skip
        body = task_pb2.CreateTaskRequest(task=task).SerializeToString()
        created = self.call(
            "POST", f"/taskmanagement/v1/population/{POPULATION}:create-task", (200, 409), content=body, headers=PROTO
        )
        if created.status_code == 409:  # made just before the server was killed
            created = self.call("GET", f"/taskmanagement/v1/population/{POPULATION}/tasks/1:get")
        task = task_pb2.CreateTaskResponse.FromString(created.content).task
        plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process).SerializeToString()
        for url, data in (
            (task.init_checkpoint_url[0], write_checkpoint(initial_state(process, INITIAL, ()))),
            (task.server_phase_url[0], gzip_bytes(plan)),
            (task.client_only_plan_url[0], plan_pb2.ClientOnlyPlan(tflite_graph=b"TFL3").SerializeToString()),
        ):
            # 409: it has opened, so that it lies there.
            self.call("PUT", url, (200, 409), content=data)
        return task.task_id

    def contribute(self, value, process=PROCESS):
        """One device: the same idempotency key until it has an assignment, then its report, then its upload."""
        request = task_assignments_pb2.CreateTaskAssignmentRequest()
        request.client_version.version_code = "1"
        headers = {**PROTO, "odp-idempotency-key": f"1 - {uuid.uuid4()}"}
        path = f"/taskassignment/v1/population/{POPULATION}:create-task-assignment"
        answer = self.call("POST", path, (201,), content=request.SerializeToString(), headers=headers)
        assignment = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(answer.content).task_assignment
        keys = parse_public_keys(self.call("GET", "/.well-known/odp/v1/public-keys").content)
        body = gzip_bytes(seal_update(write_checkpoint(update_of(value, process)), keys[0]))
        report = task_assignments_pb2.ReportResultRequest(result=task_assignments_pb2.ReportResultRequest.COMPLETED)
        location = ""
        deadline = time.monotonic() + PATIENCE_S
        while not location and time.monotonic() < deadline:
            answer = self.call(
                "PUT",
                f"/taskassignment/v1{assignment.self_uri}:report-result",
                content=report.SerializeToString(),
                headers=PROTO,
            )
            instruction = task_assignments_pb2.ReportResultResponse.FromString(answer.content).upload_instruction
            location = instruction.upload_location
        self.call("PUT", location, content=body, headers=dict(instruction.extra_request_headers))

    def task(self, task_id):
        return self.call("GET", f"/api/v1/tasks/{POPULATION}/{task_id}").json()

    def wait(self, task_id, reached):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = self.task(task_id)
            if reached(found):
                return found
            time.sleep(0.03)
        raise AssertionError(f"it did not happen in time: {found}")

    def run(self, rounds=ROUNDS):
        """A whole task; returns what anybody can see of it at the end."""
        task_id = self.open_task(rounds)
        for number in range(1, rounds + 1):
            for device in range(GOAL):
                self.contribute(0.1 * number + 0.01 * device)
            self.wait(task_id, lambda found, n=number: completed(found) >= n)
        return self.outcome(task_id)

    def outcome(self, task_id):
        found = self.wait(task_id, lambda found: found["task"]["status"] not in ("CREATED", "OPEN"))
        assert found["task"]["status"] == "COMPLETED", found["failure"]
        checkpoint = self.call("GET", f"/api/v1/tasks/{POPULATION}/{task_id}/checkpoint").content
        ledger = self.call("GET", f"/api/v1/populations/{POPULATION}/ledger").json()
        return {
            "model": {name: leaf.tolist() for name, leaf in read_checkpoint(checkpoint).items()},
            "metrics": found["metrics"],
            "assignments": found["assignments"],
            "rounds": [one["status"] for one in found["iterations"]],
            "ledger": [(one["task_id"], one["iteration_id"], one["released"]) for one in ledger["entries"]],
        }


@pytest.fixture(scope="session")
def fixed_gaussian():
    """The process of a task whose rounds are one device each, with independent noise of multiplier 1."""
    return process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=1))


def completed(found):
    return sum(one["status"] == "COMPLETED" for one in found["iterations"])


def update_of(value, process):
    leaves = {}
    for leaf in process.updates:
        if leaf.role == learning_pb2.UpdateLeaf.METRIC:
            leaves[leaf.spec.name] = np.array(1.0, np.float32)
        elif leaf.role == learning_pb2.UpdateLeaf.DELTA:
            leaves[leaf.spec.name] = np.full((3, 2), value, np.float32)
        else:
            leaves[leaf.spec.name] = np.array(0 if leaf.role == learning_pb2.UpdateLeaf.ZEROED else 1, np.int32)
    return leaves


@pytest.fixture
def connect():
    """Clients of servers."""
    made = []

    def make(*servers):
        made.append(Client(*(one.url for one in servers)))
        return made[-1]

    yield make
    for one in made:
        one.http.close()


@pytest.fixture(scope="session")
def undisturbed(zygote, tmp_path_factory):
    """The outcome of a run without a fault, and how often it reached each point."""
    server = Server(zygote, tmp_path_factory.mktemp("undisturbed"), {"collector_batch_size": 2})
    client = Client(server.url)
    try:
        outcome = client.run()
    finally:
        client.http.close()
        server.close()
    return outcome, Counter(server.trace.read_text().splitlines())
