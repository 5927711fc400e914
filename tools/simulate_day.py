"""Two days in the life of a device, on a clock that jumps from one event to the next, as a table.

python tools/simulate_day.py              # the whole trace
python tools/simulate_day.py --lines 60   # its beginning

Fifty tasks of five apps train against a scripted server: runs, HTTP, encryption and training are real, only the time
is not. The network fails, the server turns devices away, keys rotate, the device reboots and loses power, its user
revokes consent. tests/device/test_simulated_day.py works out every time in the trace again.
"""

import argparse
import asyncio
import gzip
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
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
from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Retries, Transport
from fedcompute.device.client.keys import EncryptionKeys, default_url
from fedcompute.device.client.runtime import Device, DeviceSettings, RunOutcome
from fedcompute.device.developer.examples import training_example
from fedcompute.device.developer.worker import (
    IsolatedWorker,
    TrainingExampleInput,
    TrainingExampleOutput,
    TrainingExampleRecord,
)
from fedcompute.device.jobs.background import background_jobs
from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.jobs.events import Event, describe
from fedcompute.device.jobs.flags import flags
from fedcompute.device.jobs.scheduler import JobScheduler
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanResult, PlanRunner
from fedcompute.device.state import apps, tasks
from fedcompute.device.state.apps import App
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import TaskHistory
from fedcompute.device.state.settings import set_consent
from fedcompute.device.state.tasks import ScheduleRequest, Task
from fedcompute.protos import eligibility_pb2, federatedcompute_pb2, plan_pb2, task_assignments_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
START = 1_767_225_600_000  # 2026-01-01 00:00 UTC
KEY_LIFETIME = 4 * HOUR
APPS = ("keyboard", "camera", "health", "maps", "music")


@dataclass(frozen=True)
class Act:
    """What somebody does to the device at a time: an app, its user, or the world."""

    time: int
    who: str
    what: str
    job: str = ""
    request: ScheduleRequest | None = None
    conditions: Conditions | None = None


@dataclass(frozen=True)
class Answer:
    """What the server says to a check-in. `window`: bounds in seconds, where it turns the device away."""

    what: str = "assigns"
    window: tuple[float, float] | None = None


@dataclass(frozen=True)
class Step:
    """One line of the trace. `source`: the act, the scheduler's event or the server's answer behind it; `stored`: the
    task that an act left behind.
    """

    time: int
    who: str
    job: str
    text: str
    source: Act | Event | Answer
    stored: Task | None = None


def owner_of(job: str) -> Owner:
    """The service that a population belongs to: ten populations each."""
    name = APPS[int(job.rpartition("-")[2]) // 10]
    return Owner(f"org.example.{name}", f"org.example.{name}.Service", "AB" * 32)


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


def tasks_of_the_day() -> list[Act]:
    """Fifty tasks, scheduled over the first two hours."""
    kinds = [
        *(["faithful"] * 6 + ["patient"] * 6 + ["hopeless"] * 2 + ["stranger"] * 2 + ["unlucky"] * 4),
        *(["postponed"] * 2 + ["junk"] * 8),
        *(["hourly"] * 5 + ["eager"] * 2 + ["separate"] * 4 + ["crowded"] * 4 + ["moody"] * 4 + ["rare"] * 1),
    ]
    intervals = {"hourly": HOUR, "eager": 30 * MINUTE, "separate": 2 * HOUR, "crowded": 3 * HOUR, "moody": 4 * HOUR}
    order = random.Random(1).sample(range(len(kinds)), len(kinds))
    found = []
    for place, number in enumerate(order):
        job = f"{kinds[number]}-{number:02}"
        interval = intervals.get(kinds[number], 9 * 24 * HOUR if kinds[number] == "rare" else 0)
        request = ScheduleRequest(owner_of(job), job, "", interval > 0, interval)
        found.append(Act(START + place * 137 * SECOND, "app", "schedules", job, request))
    return found


def acts_of_the_day() -> list[Act]:
    """All that happens to the device, in order."""
    acts = tasks_of_the_day()
    requests = {act.job: act.request for act in acts}

    def at(hours: float, who: str, what: str, job: str = "", **more: Any) -> None:
        acts.append(Act(START + round(hours * HOUR), who, what, job, **more))

    def again(hours: float, job: str, **change: Any) -> None:
        at(hours, "app", "schedules", job, request=replace(requests[job], **change))

    for hours in (2.31, 2.87, 6.02):  # as it is: a recurrent task, one that is due, one with failures
        again(hours, "hourly-30")
    again(2.5, "hopeless-12")
    again(3.01, "rare-49")
    again(3.3, "hourly-31", minimum_interval=45 * MINUTE)
    again(3.4, "hourly-32", recurrent=False, minimum_interval=0)
    again(9.2, "junk-22")
    at(3.6, "app", "cancels", "eager-35")
    again(3.9, "eager-35")
    at(4.2, "app", "cancels", "junk-23")
    at(4.3, "app", "cancels", "junk-23")
    at(5.0, "world", "reboots")
    at(6.0, "world", "loses the network", conditions=Conditions(network=False))
    at(6.8, "user", "runs now", "hourly-33")
    at(7.5, "world", "is as usual", conditions=Conditions())
    at(8.0, "server", "rotates its keys")
    at(8.2, "user", "is busy", conditions=Conditions(idle=False, load=0.9))
    at(8.9, "world", "is as usual", conditions=Conditions())
    at(9.5, "world", "cuts the wire")
    at(10.1, "world", "mends the wire")
    at(11.4, "world", "cuts the power of the next training")
    at(13.0, "world", "drains the battery", conditions=Conditions(battery_percent=25))
    at(13.6, "world", "charges", conditions=Conditions(battery_percent=60, charging=True))
    at(14.0, "world", "heats up", conditions=Conditions(thermal_status=3))
    at(14.4, "world", "is as usual", conditions=Conditions())
    at(15.0, "world", "is metered", conditions=Conditions(unmetered=False))
    at(15.5, "user", "runs now", "crowded-42")
    at(15.9, "world", "is as usual", conditions=Conditions())
    at(16.0, "server", "rotates its keys")
    at(17.2, "world", "reboots")
    at(20.0, "user", "revokes measurement consent")
    again(20.1, "hourly-30")  # refused
    at(20.5, "user", "gives measurement consent")
    for job in ("hourly-30", "hourly-33", "faithful-00"):
        again(20.6, job)
    at(22.0, "world", "reboots")
    at(23.0, "user", "revokes measurement consent")
    return sorted(acts, key=lambda act: act.time)


class Server:
    """The wire of a federated compute server, with moods."""

    def __init__(self, day: "Day", plan: bytes, checkpoint: bytes) -> None:
        self._day = day
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
        return (self._day.now - START) // (3 * HOUR)

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
        self._day.note("server", job, answer.what, answer)
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
        self.uploads.append((self._day.now, assignment, job, used))
        return Response()


class Worker(IsolatedWorker):
    """Two examples, or two that are none."""

    def on_training_examples(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        good = training_example({"x": np.ones(2, np.float32), "y": np.ones(1, np.float32)})
        data = b"junk" if request.population_name.startswith("junk") else good
        return TrainingExampleOutput([TrainingExampleRecord(data, b"1"), TrainingExampleRecord(data, b"2")])


@dataclass
class Day:
    """The device, its world, and the trace of both."""

    folder: Path
    now: int = START
    steps: list[Step] = field(default_factory=list)
    conditions: Conditions = field(default_factory=Conditions)
    history: list[tuple[str, int]] = field(default_factory=list)  # population and count, before the wipe
    running: list[str] = field(default_factory=list)
    worked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.server = Server(self, *_artifacts())
        self._delays, self._windows, self._pace = random.Random(11), random.Random(12), random.Random(13)
        self._cut = self._power_cut = False
        self._work: asyncio.Task[bool] | None = None
        self._runner = PlanRunner()

    def note(self, who: str, job: str, text: str, source: Act | Event | Answer, stored: Task | None = None) -> None:
        self.steps.append(Step(self.now, who, job, text, source, stored))

    async def live(self, acts: Sequence[Act], end: int) -> None:
        """Lives until `end`; the device's file stays for whoever looks at it."""
        async with Transport(retries=Retries(delay=0.0)) as transport:
            self._transport = transport
            self._boot()
            with self.database.write() as tx:
                for app in APPS:
                    apps.install(tx, App(owner_of(f"x-{APPS.index(app)}0"), self.folder), START)
            ahead = list(acts)
            while self.now < end:
                while ahead and ahead[0].time <= self.now:
                    self._apply(ahead.pop(0))
                await self._drain()
                due = self._scheduler.next_time()
                moments = [due if due is not None else end, ahead[0].time if ahead else end]
                self.now = max(self.now, min(moments))
        self._runner.close()

    async def _drain(self) -> None:
        try:
            busy = True
            while busy:
                self._work = asyncio.ensure_future(self._scheduler.run_due())
                busy = await self._work
        except asyncio.CancelledError:
            self.running.clear()
            self._boot()

    def _boot(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
        self.database = DeviceDatabase(self.folder / "device.db")
        jobs = background_jobs(
            self.database, lambda: self.now, fetch_keys=self._fetch_keys, download=self._count("download")
        )
        self._scheduler = JobScheduler(
            self.database, self._run, jobs, lambda: self.conditions, lambda: self.now, self._delays, self._on_event
        )
        self._scheduler.start()

    def _on_event(self, event: Event) -> None:
        self.note("device", event.job, describe(event), event)

    def _count(self, name: str) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            self.worked[name] += 1

        return work

    def _keys(self, server: str) -> EncryptionKeys:
        return EncryptionKeys(
            self._transport, default_url(server), database=self.database, clock=lambda: self.now / 1000,
            chance=random.Random(1),
        )  # fmt: skip

    async def _fetch_keys(self) -> None:
        self.worked["fetch_keys"] += 1
        await self._keys(self.server.url).fetch()

    async def _run(self, task: Task) -> RunOutcome:
        self.running.append(task.population)
        assert len(self.running) == 1, f"{self.running} run at once"
        server = f"http://localhost:{_closed_port()}" if self._cut else task.server
        device = Device(
            DeviceSettings(server, task.population, task.owner),
            in_process(Worker()),
            transport=self._transport,
            train=self._train,
            history=TaskHistory(self.database),
            keys=self._keys(server),
            clock=lambda: self.now / 1000,
            chance=self._windows,
        )
        outcome = await device.run()
        self.now += self._pace.randint(5 * SECOND, 90 * SECOND)
        self.running.clear()
        return outcome

    async def _train(self, plan: plan_pb2.ClientOnlyPlan, checkpoint: bytes, examples: Sequence[bytes]) -> PlanResult:
        if self._power_cut and self._work is not None:
            self._power_cut = False
            self._work.cancel()
            await asyncio.Event().wait()
        return await self._runner.train(plan, checkpoint, examples)

    def _apply(self, act: Act) -> None:
        text, stored = act.what, None
        if act.conditions is not None:
            self.conditions = act.conditions
        with self.database.write() as tx:
            match act.what:
                case "schedules" if act.request is not None:
                    why = tasks.schedule(tx, replace(act.request, server=self.server.url), self.now, flags(tx))
                    stored = tasks.find(tx, act.request.job_id)
                    mode = f"every {_span(act.request.minimum_interval)}" if act.request.recurrent else "once"
                    text = f"schedules {mode}" if why is None else f"may not schedule: {why}"
                    if stored is not None and why is None:
                        text += f", due at {_clock(stored.earliest_run)}"
                case "cancels":
                    text += "" if tasks.cancel(tx, owner_of(act.job), act.job) else " what is gone"
                case "runs now":
                    tasks.force(tx, owner_of(act.job).job_id(act.job))
                case "revokes measurement consent":
                    set_consent(tx, "measurement", False, self.now)
                    counts = tx.execute("SELECT population, COUNT(*) FROM task_history GROUP BY population")
                    self.history = [(str(job), int(count)) for job, count in counts]
                case "gives measurement consent":
                    set_consent(tx, "measurement", True, self.now)
        self.note(act.who, act.job, text, act, stored)
        match act.what:
            case "reboots":
                self._boot()
            case "rotates its keys":
                self.server.rotate()
            case "cuts the wire" | "mends the wire":
                self._cut = act.what == "cuts the wire"
            case "cuts the power of the next training":
                self._power_cut = True


def simulate(folder: Path) -> Day:
    """Lives two days in a folder; returns them with their trace."""
    day = Day(folder)
    with _serve(day.server):
        asyncio.run(day.live(acts_of_the_day(), START + 48 * HOUR))
    return day


def table(steps: Sequence[Step]) -> Iterator[str]:
    """The trace as lines for people."""
    yield f"{'day time':<15}{'who':<8}{'task or job':<22}what"
    for step in steps:
        yield f"{_clock(step.time):<15}{step.who:<8}{step.job:<22}{step.text}".rstrip()


@contextmanager
def _serve(server: Server) -> Iterator[None]:
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


def _artifacts() -> tuple[bytes, bytes]:
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


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _span(milliseconds: int) -> str:
    return f"{milliseconds / HOUR:.4g} h" if milliseconds >= HOUR else f"{milliseconds / MINUTE:.4g} min"


def _clock(moment: int) -> str:
    days, rest = divmod(moment - START, 24 * HOUR)
    hours, rest = divmod(rest, HOUR)
    return f"{days} {hours:02}:{rest // MINUTE:02}:{rest % MINUTE / SECOND:06.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=int, help="how many lines to print, by default all")
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory(prefix="fedcompute-day-") as folder:
        day = simulate(Path(folder))
        day.database.close()
    for line in list(table(day.steps))[:lines]:
        print(line)


if __name__ == "__main__":
    main()
