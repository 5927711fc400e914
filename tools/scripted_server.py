"""A server with moods for `simulate_day.py`: what it answers depends on who checks in and how often before."""

import gzip
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import uvicorn
from google.protobuf.duration_pb2 import Duration
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.crypto.envelope import open_update
from fedcompute.crypto.keys import KeyPair, generate_key_pair, public_keys_json
from fedcompute.protos import eligibility_pb2, federatedcompute_pb2, task_assignments_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

SECOND, HOUR = 1000, 3_600_000
START = 1_767_225_600_000  # 2026-01-01 00:00 UTC
KEY_LIFETIME = 4 * HOUR


@dataclass(frozen=True)
class Answer:
    """What the server says to a check-in. `window`: bounds in seconds, where it turns the device away."""

    what: str = "assigns"
    window: tuple[float, float] | None = None


def answer_to(job: str, visit: int, chance: random.Random) -> Answer:
    """The server's mood towards a population at its check-in number `visit`, from 1."""
    mood = job.rpartition("-")[0]
    if mood == "patient":
        windows = [(30, 90), (0.2, 0.4), (0, 5), (900, 2400), (9, 3), (3600, 7200)]
        return Answer("no task", windows[(visit + int(job[-2:])) % 6]) if visit < 5 else Answer()
    if mood == "postponed":
        return Answer("no task", (1e6, 2e6))
    if mood == "hopeless":
        return Answer("error 500")
    if mood == "stranger":
        return Answer("asks for a proof") if visit < 4 else Answer()
    if mood == "unlucky":
        return Answer("loses the upload") if visit < 3 else Answer()
    if mood == "separate":
        return Answer("assigns with minimum separation")
    if mood == "crowded":
        return Answer("wants no report", (600, 1200)) if visit % 2 else Answer()
    if mood == "moody":
        return chance.choice(
            [Answer(), Answer("no task", (60, 600)), Answer("error 500"), Answer("wants no report", (5, 5))]
        )
    return Answer("takes no failure report") if job == "junk-29" else Answer()


class Server:
    """The wire of a federated compute server, with moods.

    `clock` tells the time, `note` is told each answer to a check-in of a population.
    """

    def __init__(
        self, clock: Callable[[], int], note: Callable[[str, Answer], None], plan: bytes, checkpoint: bytes
    ) -> None:
        self._clock, self._note = clock, note
        self._plan, self._checkpoint = gzip.compress(plan), gzip.compress(checkpoint)
        self._chance = random.Random(3)
        self.url = ""
        self.keys: list[KeyPair] = []
        self.visits: Counter[str] = Counter()
        self.assignments: dict[str, tuple[str, Answer]] = {}
        self.reports: Counter[str] = Counter()
        self.uploads: list[tuple[int, str, str, int]] = []  # time, assignment, population, number of the key
        self.rotate()

    def rotate(self) -> None:
        """Publishes another key from now on."""
        self.keys.append(generate_key_pair(datetime.now(UTC), timedelta(days=9)))

    @property
    def round(self) -> int:
        return (self._clock() - START) // (3 * HOUR)

    async def answer(self, request: Request) -> Response:
        body, path = await request.body(), request.url.path
        if path.endswith("/public-keys"):
            headers = {"cache-control": f"max-age={KEY_LIFETIME // SECOND}"}
            return Response(public_keys_json([self.keys[-1].published]), headers=headers)
        if path in ("/plan", "/checkpoint"):
            data = self._plan if path == "/plan" else self._checkpoint
            return Response(data, headers={"content-encoding": "gzip"})
        if path.endswith(":create-task-assignment"):
            return self._check_in(path.split("/")[4].partition(":")[0])
        assignment = path.split("/")[-1].partition(":")[0]
        job, answer = self.assignments[assignment]
        if path.startswith("/upload/"):
            return self._upload(assignment, job, answer, body)
        return self._report(assignment, answer, task_assignments_pb2.ReportResultRequest.FromString(body).result)

    def _check_in(self, job: str) -> Response:
        self.visits[job] += 1
        answer = answer_to(job, self.visits[job], self._chance)
        self._note(job, answer)
        if answer.what.startswith("error"):
            return Response(status_code=500)
        message = task_assignments_pb2.CreateTaskAssignmentResponse()
        if answer.what == "no task":
            _turn_away(message.rejection_info, answer)
        elif answer.what == "asks for a proof":
            message.rejection_info.reason = federatedcompute_pb2.RejectionReason.UNAUTHENTICATED
            message.rejection_info.auth_metadata.key_attestation_metadata.challenge = b"prove it"
            return _protobuf(message, 401)
        else:
            self._assign(message.task_assignment, job, answer)
        return _protobuf(message, 201)

    def _assign(self, assignment: task_assignments_pb2.TaskAssignment, job: str, answer: Answer) -> None:
        number = f"assignment-{len(self.assignments) + 1}"
        self.assignments[number] = job, answer
        packed = federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
        assignment.population_name, assignment.task_id, assignment.aggregation_id = job, "1", str(self.round)
        assignment.assignment_id = number
        assignment.plan.uri, assignment.plan.compression_format = f"{self.url}/plan", packed
        assignment.init_checkpoint.uri = f"{self.url}/checkpoint"
        if "separation" in answer.what:
            policy = eligibility_pb2.MinimumSeparationPolicy(current_index=self.round, minimum_separation=1)
            policies = assignment.eligibility_task_info.eligibility_policies
            policies.add(id="separation", min_sep_policy=policy)

    def _report(self, assignment: str, answer: Answer, result: int) -> Response:
        self.reports[assignment] += 1
        if answer.what == "takes no failure report":
            return Response(status_code=500)
        message = task_assignments_pb2.ReportResultResponse()
        if answer.what == "wants no report":
            _turn_away(message.rejection_info, answer)
        else:
            message.upload_instruction.upload_location = f"{self.url}/upload/{assignment}"
        return _protobuf(message)

    def _upload(self, assignment: str, job: str, answer: Answer, body: bytes) -> Response:
        if answer.what == "loses the upload":
            return Response(status_code=500)
        numbers = {key.id: number for number, key in enumerate(self.keys)}
        used = next(number for key, number in numbers.items() if key.encode() in body)
        private = {key.id: key.private_key for key in self.keys}
        update = open_update(body, private, allow_plaintext=False, limit=1 << 20)
        assert read_checkpoint(update)["update/1/loss/1"] == 2, "the loss of two examples"
        self.uploads.append((self._clock(), assignment, job, used))
        return Response()


@contextmanager
def serve(server: Server) -> Iterator[None]:
    """Answers on a free port of this machine, which `server.url` then names."""
    routes = [Route("/{rest:path}", server.answer, methods=["GET", "POST", "PUT"])]
    running = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started and thread.is_alive():
            time.sleep(0.005)
        server.url = f"http://localhost:{running.servers[0].sockets[0].getsockname()[1]}"
        yield
    finally:
        running.should_exit = True
        thread.join(10)


def artifacts() -> tuple[bytes, bytes]:
    """The smallest plan that trains, linear regression on two features, and its checkpoint."""
    import tensorflow as tf

    from fedcompute.builder.client_graph import ClientSettings, client_graph
    from fedcompute.builder.client_optimizers import SGD
    from fedcompute.builder.device_graph import device_graph
    from fedcompute.builder.lower_ops import LowerOps
    from fedcompute.builder.plan import build_plan, client_only_plan, example_selector
    from fedcompute.learning.specification import training_process
    from fedcompute.models.functional_model import FunctionalModel
    from fedcompute.protos import learning_pb2
    from fedcompute.tensors.tree import LeafSpec

    weights = np.zeros((2, 1), np.float32)

    def predict(given: Any, x: Any, training: bool = False) -> Any:
        return tf.matmul(x, given[0][0])

    def loss(output: Any, label: Any) -> Any:
        return tf.reduce_mean(tf.square(output - label))

    x, y = tf.TensorSpec([None, 2], tf.float32, name="x"), tf.TensorSpec([None, 1], tf.float32, name="y")
    process = training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("kernel", weights.shape, weights.dtype)],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.UniformMean(),
        metrics=(),
    )
    graph = client_graph(
        FunctionalModel((weights,), (), x, y, predict, loss), process, ClientSettings("", 4, -1, SGD, 0.1, b"")
    )
    plan = build_plan(process, device_graph(graph, None, LowerOps.NEVER).flatbuffer, example_selector(""))
    return client_only_plan(plan).SerializeToString(), write_checkpoint({"client/0/trainable/0": weights})


def _turn_away(info: federatedcompute_pb2.RejectionInfo, answer: Answer) -> None:
    info.reason = federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE
    assert answer.window is not None
    for bound, seconds in zip((info.retry_window.delay_min, info.retry_window.delay_max), answer.window, strict=True):
        bound.CopyFrom(Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9)))


def _protobuf(message: Any, status: int = 200) -> Response:
    return Response(message.SerializeToString(), status, media_type="application/x-protobuf")
