"""A device at work: real workers and training processes, a real file, and a scripted server whose answers are chosen.

Its tasks are federated analytics, which train without TensorFlow; tests/end_to_end/test_device.py has the real server.
"""

import asyncio
import gzip
import json
import logging
import os
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.crypto.envelope import open_update
from fedcompute.crypto.keys import generate_key_pair, public_keys_json
from fedcompute.device import daemon as daemon_module
from fedcompute.device.daemon import DaemonSettings, now_ms, open_daemon
from fedcompute.device.directory import DeviceDirectory
from fedcompute.device.jobs.events import EventKind, describe
from fedcompute.device.jobs.flags import flags, put_flag
from fedcompute.device.owner import Owner
from fedcompute.device.personalization import schedule_task
from fedcompute.device.state import key_values, tasks
from fedcompute.device.state.apps import App, install
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_log import read_entries
from fedcompute.device.state.history import TaskHistory
from fedcompute.device.state.settings import set_consent
from fedcompute.errors import OperationFailed, Reason
from fedcompute.protos import eligibility_pb2, federatedcompute_pb2, plan_pb2, task_assignments_pb2
from fedcompute.tensors.checkpoint import read_checkpoint

OWNER = Owner("org.example.app", "org.example.app.Service")
GZIP = federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
RESULTS = task_assignments_pb2.ReportResultRequest
OLD, NEW = (generate_key_pair(datetime.now(UTC), timedelta(days=1)) for _ in range(2))

VISITS = """
def on_training_example(self, request):
    from fedcompute.protos.example_query_result_pb2 import ExampleQueryResult
    print(request.population_name, request.resumption_token)
    answer = ExampleQueryResult()
    answer.vector_data.vectors["v"].int64_values.value.extend([3, 4])
    answer.vector_data.vectors["unasked"].string_values.value.append("SECRET-EXAMPLE")
    return TrainingExampleOutput([TrainingExampleRecord(answer.SerializeToString(), b"t1")])
"""


def message(proto, status=200):
    return Response(proto.SerializeToString(), status, media_type="application/x-protobuf")


class Server:
    """A federated compute server and a vendor's: `answers` by the end of a path, `requests` as they came."""

    def __init__(self):
        self.url, self.requests, self.answers, self.keys, self.policies = "", [], {}, [OLD], []

    def plan(self):
        plan = plan_pb2.ClientOnlyPlan()
        vectors = plan.phase.example_query_spec.example_queries.add().output_vector_specs
        vectors["visits"].vector_name = "v"
        vectors["visits"].data_type = plan_pb2.ExampleQuerySpec.OutputVectorSpec.INT64
        kind = plan_pb2.AggregationConfig(tf_v1_checkpoint_aggregation=plan_pb2.TFV1CheckpointAggregation())
        plan.phase.federated_example_query.aggregations["visits"].CopyFrom(kind)
        return Response(gzip.compress(plan.SerializeToString()), headers={"Content-Encoding": "gzip"})

    def check_in(self, population):
        def resource(name):
            return federatedcompute_pb2.Resource(
                uri=f"{self.url}/{name}?signature=SECRET-{name}", compression_format=GZIP
            )

        assignment = task_assignments_pb2.TaskAssignment(
            population_name=population, task_id="3", aggregation_id="5", assignment_id="session-1",
            plan=resource("plan"), init_checkpoint=resource("checkpoint"),
        )  # fmt: skip
        if self.policies:
            assignment.eligibility_task_info.eligibility_policies.extend(self.policies)
        return message(task_assignments_pb2.CreateTaskAssignmentResponse(task_assignment=assignment), 201)

    def report(self):
        instruction = task_assignments_pb2.UploadInstruction(
            upload_location=f"{self.url}/upload?signature=SECRET-upload", compression_format=GZIP
        )
        return message(task_assignments_pb2.ReportResultResponse(upload_instruction=instruction))

    async def answer(self, request):
        path = request.url.path
        self.requests.append((path, await request.body()))
        for ending, response in self.answers.items():
            if path.endswith(ending):
                return response
        if path.endswith(":create-task-assignment"):
            return self.check_in(path.rpartition("/")[2].partition(":")[0])
        if path.endswith("/public-keys"):
            return Response(public_keys_json([key.published for key in self.keys]))
        if path.endswith(":report-result"):
            return self.report()
        return self.plan() if path == "/plan" else Response(gzip.compress(b"unused"))

    def sent(self, ending):
        return [body for path, body in self.requests if path.endswith(ending)]

    def results(self):
        return [RESULTS.FromString(body).result for body in self.sent(":report-result")]


@pytest.fixture
def server(serve):
    server = Server()

    async def answer(request):
        return await server.answer(request)

    with serve([Route("/{rest:path}", answer, methods=["GET", "POST", "PUT"])]) as server.url:
        yield server


class Bench:
    """A device's directory, and daemons on it."""

    def __init__(self, folder, server, write_service):
        self.folder, self.server, self._write_service = folder, server, write_service
        self.device = DeviceDirectory.open(folder / "device")
        self.database = self.device.database
        self.events = []
        for name in ("condition_idle", "condition_unmetered"):
            self.flag(name, "true")
        self.flag("http_request_retry_limit", 1)

    def install(self, hooks, owner=OWNER, download=None):
        app = App(owner, self._write_service(self.folder / owner.package, hooks), self.server.url, download)
        with self.database.write() as tx:
            install(tx, app, 0)
        return app

    def flag(self, name, value):
        with self.database.write() as tx:
            put_flag(tx, name, str(value))

    def schedule(self, app, population="visits", every=0, database=None):
        """A task that is due now."""
        schedule_task(database or self.database, app, population, every > 0, every, now_ms())
        self.make_due(database)

    def make_due(self, database=None):
        with (database or self.database).write() as tx:
            tx.execute("UPDATE task SET earliest_run = 1")

    def force(self, *populations):
        with self.database.write() as tx:
            assert all(tasks.force(tx, OWNER.job_id(population)) for population in populations)

    def task(self, population="visits"):
        with self.database.read() as tx:
            return tasks.find(tx, OWNER.job_id(population))

    def entries(self, subject=None):
        with self.database.read() as tx:
            return [entry for entry in read_entries(tx) if subject in (None, entry.subject)]

    def told(self, kind):
        return [event for event in self.events if event.kind is kind and event.task is not None]

    def serve(self, until, **settings):
        """Runs a daemon until `until()` holds, then stops it."""

        async def run():
            settings_ = DaemonSettings(on_event=self.events.append, **settings)
            async with open_daemon(self.device, settings_) as daemon:
                serving = asyncio.create_task(daemon.serve())
                async with asyncio.timeout(30):
                    while not until():
                        assert not serving.done(), serving.exception()
                        await asyncio.sleep(0.01)
                serving.cancel()
                await asyncio.wait({serving})

        asyncio.run(run())

    def with_daemon(self, use):
        """What `use` returns, of a daemon that serves nobody."""

        async def run():
            async with open_daemon(self.device, DaemonSettings(on_event=self.events.append)) as daemon:
                return await use(daemon)

        return asyncio.run(run())


@pytest.fixture
def bench(tmp_path, server, write_service):
    made = Bench(tmp_path, server, write_service)
    yield made
    made.device.close()


def children():
    """The modules that child processes of this one run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found += [one for one in (process / "cmdline").read_text().split("\0") if one.startswith("fedcompute.")]
        except (OSError, IndexError):
            continue
    return {one.rpartition(".")[2] for one in found}


def update(body, key=OLD):
    return read_checkpoint(open_update(body, {key.id: key.private_key}, allow_plaintext=False, limit=1 << 20))


# Tasks


def test_a_one_time_task_contributes_from_processes_of_its_own_and_is_gone(bench, server):
    bench.schedule(bench.install(VISITS))
    seen, phases = set(), []

    def gone():
        seen.update(children())
        return bench.task() is None

    bench.serve(gone, on_phase=lambda population, phase: phases.append((population, phase)))
    assert seen >= {"worker_main", "trainer_main"}
    assert children() == set()
    assert server.results() == [RESULTS.COMPLETED]
    (body,) = server.sent("/upload")
    assert {name: values.tolist() for name, values in update(body).items()} == {"visits": [3, 4]}
    assert TaskHistory(bench.database).newest(OWNER.job_id("visits"), "visits", "3").total == 1
    assert [(event.success, event.detail) for event in bench.told(EventKind.ENDED)] == [(True, "")]
    assert [entry.outcome for entry in bench.entries("visits")] == ["ok", "deleted"]
    assert phases[0] == ("visits", "check_in")
    assert phases[-1] == ("visits", "upload")


def test_a_recurrent_task_goes_on_where_its_examples_ended(bench, server):
    bench.schedule(bench.install(VISITS), every=3_600_000)
    bench.serve(lambda: len(bench.entries("visits")) == 1)
    task = bench.task()
    assert task.earliest_run - task.last_run_end == 3_600_000
    bench.make_due()
    bench.serve(lambda: len(bench.entries("visits")) == 2)
    assert server.results() == [RESULTS.COMPLETED] * 2
    assert [entry.output for entry in bench.entries("on_training_examples")] == ["visits None\n", "visits b't1'\n"]


def test_a_task_that_a_command_schedules_meanwhile_runs_within_seconds(bench):
    app = bench.install(VISITS)
    scheduled = []

    def done():
        if not scheduled and bench.entries("delete_expired"):
            # It has nothing left to do.
            other = DeviceDatabase(bench.database.path)
            bench.schedule(app, database=other)
            other.close()
            scheduled.append(now_ms())
        return bool(bench.entries("visits"))

    bench.serve(done)
    assert bench.told(EventKind.STARTED)[0].time - scheduled[0] < 5000


BAD = VISITS.replace(
    "    answer = ExampleQueryResult()\n",
    """    answer = ExampleQueryResult()
    if request.population_name == "hang":
        time.sleep(60)
    if request.population_name == "raise":
        raise KeyError("SECRET-EXAMPLE")
    if request.population_name == "die":
        os.abort()
    if request.population_name == "flood":
        print("x" * 20_000_000)
        return TrainingExampleOutput([TrainingExampleRecord(bytes(1 << 20))] * 80)
    if request.population_name == "junk":
        return TrainingExampleOutput([TrainingExampleRecord(b"\\xff")])
""",
)


def test_a_bad_worker_costs_its_own_run_and_nothing_else(bench, server):
    app = bench.install(BAD)
    populations = ["die", "flood", "hang", "junk", "raise", "visits"]
    for population in populations:
        bench.schedule(app, population)
        bench.flag("example_store_service_timeout_sec", 1 if population == "hang" else 20)
        bench.force(population)
        bench.with_daemon(lambda daemon: daemon.run_forced())
    ended = {event.job: (event.success, event.counted, event.reason) for event in bench.told(EventKind.ENDED)}
    failed = (False, True, "worker_failed")
    assert ended == {
        "die": failed, "flood": failed, "hang": failed, "raise": failed,
        "junk": (False, True, "examples_failed"), "visits": (True, False, ""),
    }  # fmt: skip
    results = dict(zip(populations, server.results(), strict=True))
    assert results == dict.fromkeys(populations, RESULTS.FAILED_EXAMPLE_GENERATION) | {"visits": RESULTS.COMPLETED}
    assert children() == set()


def test_consent_revoked_during_a_run_ends_it_and_its_task(bench, server):
    bench.schedule(bench.install("def on_training_example(self, request): time.sleep(60)"))
    revoked = []

    def done():
        if "worker_main" in children() and not revoked:
            revoked.append(True)
            other = DeviceDatabase(bench.database.path)
            with other.write() as tx:
                set_consent(tx, "measurement", False, now_ms())
            other.close()
        return bench.task() is None

    bench.serve(done)
    assert [event.reason for event in bench.told(EventKind.ENDED)] == ["consent"]
    assert (children(), server.results()) == (set(), [])


def test_a_run_that_a_stop_cut_off_is_taken_up_at_the_next_start(bench, server):
    app = bench.install("def on_training_example(self, request): time.sleep(60)")
    bench.schedule(app)
    bench.serve(lambda: "worker_main" in children())
    assert children() == set()
    assert not bench.task().pending
    bench.install(VISITS)
    bench.serve(lambda: bench.task() is None)
    assert [event.job for event in bench.told(EventKind.RECOVERED)] == ["visits"]
    assert server.results() == [RESULTS.COMPLETED]


def test_a_device_has_one_daemon_at_a_time(bench):
    async def second(daemon):
        async with open_daemon(DeviceDirectory.open(bench.device.path), DaemonSettings()):
            pass

    with pytest.raises(OperationFailed) as failure:
        bench.with_daemon(second)
    assert failure.value.reason == Reason.DATA_IN_USE


# Keys


def test_the_key_job_fetches_from_every_key_service_also_if_one_is_down(bench, server):
    app = bench.install(VISITS)
    bench.schedule(app)
    with bench.database.write() as tx:
        request = tasks.ScheduleRequest(OWNER, "elsewhere", "http://localhost:1")
        assert tasks.schedule(tx, request, now_ms(), flags(tx)) is None
    bench.serve(lambda: bench.entries("encryption_key_fetch"))
    with bench.database.read() as tx:
        assert tx.execute("SELECT key_id FROM encryption_key").fetchall() == [(OLD.id,)]
    (entry,) = bench.entries("encryption_key_fetch")
    assert (entry.owner, entry.outcome) == (None, "no_encryption_key")


def test_a_run_uses_the_keys_that_are_stored_and_the_new_ones_once_those_expire(bench, server):
    bench.schedule(bench.install(VISITS), every=3_600_000)
    for key in (OLD, OLD, NEW):
        if key is NEW:
            with bench.database.write() as tx:
                tx.execute("UPDATE encryption_key SET expires = 1")
        bench.force("visits")
        bench.with_daemon(lambda daemon: daemon.run_forced())
        assert update(server.sent("/upload")[-1], key)
        server.keys = [NEW]
    assert len(server.sent("/public-keys")) == 2


# Downloads


def vendor(sync_token=3600, **contents):
    items = [{"key": key, "data": data} for key, data in contents.items()]
    return Response(json.dumps({"syncToken": sync_token, "contents": items}))


KEEPS = """
def on_download_completed(self, request):
    self.later("visits")
    return DownloadCompletedOutput(sorted(request.downloaded_contents.key_set()))
"""


def test_an_installed_app_gets_its_data_and_one_that_fails_keeps_no_other_from_it(bench, server):
    owners = [Owner(f"org.example.app{letter}", "org.example.app.Service") for letter in "abcde"]
    for owner in owners[:4]:
        bench.install(KEEPS, owner, f"{server.url}/{owner.package[-1]}.json")
    bench.install("def on_download_completed(self, request): raise KeyError", owners[4], f"{server.url}/b.json")
    bench.install(VISITS)
    server.answers = {"a.json": Response("", 503), "b.json": vendor(greeting="hello"), "c.json": Response("{")}
    server.answers["d.json"] = vendor(sync_token=7)
    bench.serve(lambda: any(entry.owner is None for entry in bench.entries("download")))
    found = {entry.owner: (entry.outcome, entry.detail) for entry in bench.entries("download") if entry.owner}
    assert [found[owner.digest][0] for owner in owners] == [
        "server_answer_invalid", "ok", "discarded", "discarded", "worker_failed",
    ]  # fmt: skip
    assert found[owners[1].digest][1] == "1 values came, remote data has 1 now"
    with bench.database.read() as tx:
        assert key_values.get_value(tx, "remote_data", owners[1], "greeting") == b"hello"
        assert [task.owner for task in tasks.list_tasks(tx)] == [owners[1]]
        assert key_values.key_set(tx, "remote_data", owners[4]) == []


def test_a_file_counts_once_and_the_next_one_is_asked_for_with_its_token(bench, server):
    bench.install(KEEPS, download=f"{server.url}/a.json")
    server.answers["a.json"] = vendor(greeting="hello")
    bench.with_daemon(lambda daemon: daemon.download())
    bench.with_daemon(lambda daemon: daemon.download())
    assert [entry.outcome for entry in bench.entries("download")] == ["ok", "discarded"]
    assert len(bench.entries("on_download_completed")) == 1
    server.answers["a.json"] = vendor(7200, greeting="goodbye")
    bench.with_daemon(lambda daemon: daemon.download())
    with bench.database.read() as tx:
        assert key_values.get_value(tx, "remote_data", OWNER, "greeting") == b"goodbye"


def test_the_download_set_for_tests_is_that_of_its_package_only(bench, server):
    bench.install(KEEPS)
    server.answers["a.json"] = vendor(greeting="hello")
    bench.flag("override_download_url", f"{server.url}/a.json")
    bench.flag("override_download_url_package", "org.example.other")
    bench.with_daemon(lambda daemon: daemon.download())
    assert bench.entries() == []
    bench.flag("override_download_url_package", OWNER.package)
    bench.with_daemon(lambda daemon: daemon.download())
    assert [entry.outcome for entry in bench.entries("download")] == ["ok"]


# What goes wrong around it


@contextmanager
def read_only(database):
    """As a file system that an error has turned read-only."""

    def put(value):
        with database.read() as tx:
            tx.execute(f"PRAGMA query_only = {value}")

    put(1)
    yield lambda: put(0)
    put(0)


def test_a_device_whose_file_cannot_be_written_says_so_once_and_goes_on_when_it_can(bench, monkeypatch, caplog):
    monkeypatch.setattr(daemon_module, "_STORAGE_SECONDS", 0.05)
    bench.schedule(bench.install(VISITS))
    polls = []
    with read_only(bench.database) as repair:

        def done():
            polls.append(None)
            if len(polls) == 30:
                repair()
            return len(polls) > 30 and bench.task() is None

        bench.serve(done)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "readonly" in record.getMessage()


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("/plan", "server_answer_invalid"),
        ("/upload", "server_answer_invalid"),
        (":report-result", "server_answer_invalid"),
        ("/public-keys", "no_encryption_key"),
    ],
)
def test_no_signed_url_and_no_example_reaches_log_or_events(bench, server, caplog, capfd, ending, reason):
    bench.schedule(bench.install(VISITS))
    server.answers[ending] = Response("SECRET-answer", 500)
    caplog.set_level(logging.DEBUG, "fedcompute")
    bench.serve(lambda: bench.entries("visits"))
    assert [event.reason for event in bench.told(EventKind.ENDED)] == [reason]
    with bench.database.read() as tx:
        stored = str(tx.execute("SELECT * FROM device_log").fetchall())
    printed = "".join(capfd.readouterr())
    for text in (stored, printed, caplog.text, " ".join(describe(event) for event in bench.events)):
        assert "SECRET" not in text
        assert "signature" not in text


def test_a_server_cannot_write_to_the_terminal_of_who_reads_the_log(bench, server):
    policy = eligibility_pb2.DataAvailabilityPolicy(min_example_count=2)
    name = "\x1b[2J\nfake"
    server.policies = [eligibility_pb2.EligibilityPolicyEvalSpec(id=name, data_availability_policy=policy)]
    bench.schedule(bench.install(VISITS))
    bench.serve(lambda: bench.entries("visits"))
    (entry,) = bench.entries("visits")
    assert (entry.outcome, "fake" in entry.detail, entry.detail.isprintable()) == ("not_eligible", True, True)
    assert server.results() == [RESULTS.NOT_ELIGIBLE]
