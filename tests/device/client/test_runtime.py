"""Whole runs of a device against a scripted server.

The server is a double, because the real one's tests cover the loop from its side; here every answer can be chosen.
"""

import asyncio
import gzip
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.crypto.envelope import open_update
from fedcompute.crypto.keys import generate_key_pair, public_keys_json
from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Retries, Transport
from fedcompute.device.client.protocol import RetryWindow
from fedcompute.device.client.runtime import PHASES, Device, DeviceSettings
from fedcompute.device.developer.worker import IsolatedWorker, TrainingExampleOutput, TrainingExampleRecord
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.device.state.history import TaskHistory
from fedcompute.errors import Reason
from fedcompute.protos import (
    eligibility_pb2,
    example_query_result_pb2,
    federatedcompute_pb2,
    plan_pb2,
    task_assignments_pb2,
)
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

POPULATION = "digits"
GZIP = federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
RESULTS = task_assignments_pb2.ReportResultRequest
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
KEY = generate_key_pair(datetime.now(UTC), timedelta(days=1))


def window(low, high):
    return federatedcompute_pb2.RetryWindow(delay_min=duration(low), delay_max=duration(high))


def duration(seconds):
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def rejection(reason="NO_TASK_AVAILABLE", **metadata):
    number = federatedcompute_pb2.RejectionReason.Enum.Value(reason)
    return federatedcompute_pb2.RejectionInfo(reason=number, **metadata)


def message(proto, status=200):
    return Response(proto.SerializeToString(), status, media_type="application/x-protobuf")


@dataclass
class Server:
    """The wire of a federated compute server: each answer is an attribute, each request is kept."""

    plan: bytes
    checkpoint: bytes
    url: str = ""
    requests: list = field(default_factory=list)
    policies: list = field(default_factory=list)
    collection_uri: str = ""
    upload_format: int | None = GZIP
    check_in: object = None
    plan_answer: object = None
    checkpoint_answer: object = None
    report_answer: object = None
    upload_answer: object = None
    keys_answer: object = None
    change: object = None

    def assignment(self):
        assignment = task_assignments_pb2.TaskAssignment(
            population_name=POPULATION,
            task_id="3",
            aggregation_id="5",
            assignment_id="session-1",
            plan=federatedcompute_pb2.Resource(uri=f"{self.url}/plan?signature=s", compression_format=GZIP),
            init_checkpoint=federatedcompute_pb2.Resource(uri=f"{self.url}/checkpoint", compression_format=GZIP),
            example_selector=plan_pb2.ExampleSelector(collection_uri=self.collection_uri),
        )
        if self.policies:
            assignment.eligibility_task_info.eligibility_policies.extend(self.policies)
        if self.change is not None:
            self.change(assignment)
        return assignment

    async def answer(self, request):
        body = await request.body()
        path = request.url.path
        self.requests.append((request.method, path, dict(request.headers), body))
        packed = {"Content-Encoding": "gzip"}
        if path.endswith(":create-task-assignment"):
            answer = task_assignments_pb2.CreateTaskAssignmentResponse(task_assignment=self.assignment())
            return self.check_in or message(answer, 201)
        if path == "/plan":
            return self.plan_answer or Response(gzip.compress(self.plan), headers=packed)
        if path == "/checkpoint":
            return self.checkpoint_answer or Response(gzip.compress(self.checkpoint), headers=packed)
        if path.endswith("/public-keys"):
            return self.keys_answer or Response(public_keys_json([KEY.published]))
        if path.endswith(":report-result"):
            instruction = task_assignments_pb2.UploadInstruction(
                upload_location=f"{self.url}/upload?signature=s",
                extra_request_headers={"content-type": "application/octet-stream", "x-extra": "1"},
                compression_format=self.upload_format,
            )
            answer = task_assignments_pb2.ReportResultResponse(upload_instruction=instruction)
            return self.report_answer or message(answer)
        assert path == "/upload"
        return self.upload_answer or Response(b"")

    def sent(self, ending):
        return [request for request in self.requests if request[1].endswith(ending)]

    def reports(self):
        return [RESULTS.FromString(body).result for _, _, _, body in self.sent(":report-result")]


class Records(IsolatedWorker):
    def __init__(self, examples):
        self.examples = examples
        self.requests = []

    def on_training_example(self, request):
        self.requests.append(request)
        return TrainingExampleOutput(
            [TrainingExampleRecord(data, f"token{i}".encode()) for i, data in enumerate(self.examples)]
        )


@pytest.fixture(scope="module")
def runner():
    runner = PlanRunner()
    yield runner
    runner.close()


@pytest.fixture
def server(serve, reference_plan, dense_weights):
    leaves = {f"client/0/trainable/{i}": w for i, w in enumerate(dense_weights)}
    checkpoint = write_checkpoint({**leaves, "client/1": np.array(0.1, np.float32)})
    server = Server(reference_plan("client_only_plan.pb").SerializeToString(), checkpoint)

    async def answer(request):
        return await server.answer(request)

    with serve([Route("/{rest:path}", answer, methods=["GET", "POST", "PUT"])]) as server.url:
        yield server


@pytest.fixture
def worker(dense_data):
    return Records(dense_data[2])


def run(server, worker, runner, *, history=None, on_state=None, **settings):
    async def once():
        async with Transport(retries=Retries(delay=0.001)) as transport:
            device = Device(
                DeviceSettings(server.url, POPULATION, owner=OWNER, **settings),
                in_process(worker),
                transport=transport,
                train=runner.train,
                history=history,
                on_state=on_state,
            )
            return await device.run_once()

    return asyncio.run(once())


def test_a_good_run_uploads_an_update_that_the_server_can_open(server, worker, runner):
    states = []
    outcome = run(server, worker, runner, on_state=states.append)

    assert (outcome.success, outcome.phase, outcome.reason, outcome.counted) == (True, "done", None, False)
    assert (outcome.task_id, outcome.iteration_id, outcome.example_count) == ("3", "5", 20)
    assert outcome.retry_window is None
    assert set(outcome.seconds) == set(PHASES)
    assert states == ["check_in", "download", "encrypt", "examples", "train", "encrypt", "report", "upload"]
    (_, _, headers, body) = server.sent("/upload")[0]
    assert headers["x-extra"] == "1"
    assert headers["content-type"] == "application/octet-stream"
    update = open_update(body, {KEY.id: KEY.private_key}, allow_plaintext=False, limit=1 << 24)
    assert len(read_checkpoint(update)) == 6
    assert server.reports() == [RESULTS.COMPLETED]


def test_requests_carry_exactly_the_protocols_headers_and_messages(server, worker, runner):
    run(server, worker, runner, client_version="341912000")

    method, path, headers, body = server.sent(":create-task-assignment")[0]
    assert (method, path) == ("POST", f"/taskassignment/v1/population/{POPULATION}:create-task-assignment")
    assert headers["content-type"] == "application/x-protobuf"
    assert headers["fcp-owner-id-digest"] == f"org.example.app/org.example.app.Service-{'AB' * 32}"
    millis, dash, _ = headers["odp-idempotency-key"].split(" ")
    assert (millis.isdigit(), dash) == (True, "-")
    request = task_assignments_pb2.CreateTaskAssignmentRequest.FromString(body)
    assert request.client_version.version_code == "341912000"
    assert list(request.resource_capabilities.supported_compression_formats) == [GZIP]
    method, path, headers, _ = server.sent(":report-result")[0]
    assert method == "PUT"
    assert path == (
        f"/taskassignment/v1/population/{POPULATION}/task/3/aggregation/5/task-assignment/session-1:report-result"
    )
    assert "odp-idempotency-key" not in headers
    assert "fcp-owner-id-digest" not in headers
    assert server.sent("/plan")[0][2]["accept-encoding"] == "gzip"


@pytest.mark.parametrize("upload_format", [None, GZIP])
def test_the_outer_gzip_is_there_only_where_the_instruction_says_so(server, worker, runner, upload_format):
    server.upload_format = upload_format
    assert run(server, worker, runner).success
    body = server.sent("/upload")[0][3]
    assert body.startswith(b"\x1f\x8b") == (upload_format == GZIP)
    envelope = json.loads(gzip.decompress(body) if upload_format == GZIP else body)
    assert set(envelope) == {"keyId", "encryptedPayload", "associatedData"}
    assert (envelope["keyId"], envelope["associatedData"]) == (KEY.id, "e30=")


def test_without_encryption_no_key_is_fetched_and_the_checkpoint_is_sent_plain(server, worker, runner):
    server.upload_format = None
    assert run(server, worker, runner, encryption=False).success
    assert server.sent("/public-keys") == []
    assert len(read_checkpoint(server.sent("/upload")[0][3])) == 6


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("header", [True, False])
def test_downloads_are_unpacked_by_what_they_are(server, worker, runner, packed, header):
    headers = {"Content-Encoding": "gzip"} if header and packed else {}
    for name in ("plan", "checkpoint"):
        data = getattr(server, name)
        setattr(server, f"{name}_answer", Response(gzip.compress(data) if packed else data, headers=headers))
    assert run(server, worker, runner).success


def test_inline_resources_are_taken(server, worker, runner):
    def inline(assignment):
        assignment.plan.inline_resource.data = gzip.compress(server.plan)
        assignment.init_checkpoint.inline_resource.data = server.checkpoint

    server.change = inline
    assert run(server, worker, runner).success


@pytest.mark.parametrize("status", [200, 201, 401])
def test_a_rejected_check_in_waits_for_the_servers_window_and_is_not_counted(server, worker, runner, status):
    info = rejection(retry_window=window(0.2, 0.4))
    server.check_in = message(task_assignments_pb2.CreateTaskAssignmentResponse(rejection_info=info), status)
    outcome = run(server, worker, runner)
    assert (outcome.success, outcome.counted, outcome.reason) == (False, False, "no_task_available")
    assert 0.2 <= outcome.retry_window <= 0.4
    assert (outcome.phase, outcome.task_id) == ("check_in", None)


@pytest.mark.parametrize(("low", "high"), [(0, 5), (5, 0), (0.0004, 5), (-1, 5)])
def test_a_window_with_a_bound_that_is_not_positive_is_ignored(server, worker, runner, low, high):
    info = rejection(retry_window=window(low, high))
    server.check_in = message(task_assignments_pb2.CreateTaskAssignmentResponse(rejection_info=info))
    assert run(server, worker, runner).retry_window is None


def test_a_window_is_at_most_two_days_and_never_upside_down():
    import random

    assert RetryWindow(1e9, 2e9).draw(random.Random()) == 172_800.0
    assert RetryWindow(9.0, 3.0).draw(random.Random()) == 9.0


@pytest.mark.parametrize(
    "answer",
    [
        Response(b"", 500),
        Response(b"", 204),
        Response(b"", 403),
        Response(b"\xff", 200),
        Response(b"", 200),
        message(task_assignments_pb2.CreateTaskAssignmentResponse(rejection_info=rejection())),
        message(
            task_assignments_pb2.CreateTaskAssignmentResponse(
                rejection_info=rejection(auth_metadata=federatedcompute_pb2.AuthenticationMetadata())
            ),
            401,
        ),
    ],
    ids=["500", "204", "403", "garbage", "empty", "no metadata", "challenge"],
)
def test_a_check_in_without_a_usable_answer_is_a_counted_failure(server, worker, runner, answer):
    server.check_in = answer
    outcome = run(server, worker, runner)
    assert (outcome.success, outcome.counted, outcome.phase) == (False, True, "check_in")
    assert outcome.reason == Reason.SERVER_ANSWER_INVALID
    assert server.reports() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda assignment: setattr(assignment, "population_name", "other"),
        lambda assignment: setattr(assignment, "task_id", ""),
        lambda assignment: setattr(assignment, "aggregation_id", ""),
        lambda assignment: setattr(assignment, "assignment_id", "../../x"),
        lambda assignment: assignment.ClearField("plan"),
        lambda assignment: setattr(assignment.plan, "uri", "http://127.0.0.1:1/plan"),
    ],
)
def test_an_assignment_that_makes_no_sense_is_a_counted_failure_without_report(server, worker, runner, change):
    server.change = change
    outcome = run(server, worker, runner)
    assert (outcome.success, outcome.counted) == (False, True)
    assert server.reports() == []


def separation(current, minimum):
    policy = eligibility_pb2.MinimumSeparationPolicy(current_index=current, minimum_separation=minimum)
    return eligibility_pb2.EligibilityPolicyEvalSpec(id="separation", min_sep_policy=policy)


def availability(count):
    policy = eligibility_pb2.DataAvailabilityPolicy(min_example_count=count)
    return eligibility_pb2.EligibilityPolicyEvalSpec(id="data", data_availability_policy=policy)


def test_a_device_contributes_again_only_after_the_minimum_separation(server, worker, runner):
    history = TaskHistory()
    outcomes = []
    for current in (4, 5, 6, 7):
        server.policies = [separation(current, 2)]
        outcomes.append(run(server, worker, runner, history=history))
    assert [outcome.reason for outcome in outcomes] == [None, "not_eligible", None, "not_eligible"]
    assert all(outcome.success or not outcome.counted for outcome in outcomes)
    assert server.reports() == [RESULTS.COMPLETED, RESULTS.NOT_ELIGIBLE, RESULTS.COMPLETED, RESULTS.NOT_ELIGIBLE]
    assert history.newest(OWNER.job_id(POPULATION), POPULATION, "3").round == 6


def test_a_device_with_too_few_examples_is_not_eligible_and_downloads_nothing(server, worker, runner):
    server.policies = [availability(21)]
    outcome = run(server, worker, runner)
    assert (outcome.reason, outcome.counted, outcome.retry_window) == ("not_eligible", False, None)
    assert "20 examples" in outcome.detail
    assert server.reports() == [RESULTS.NOT_ELIGIBLE]
    assert server.sent("/plan") == []


def test_examples_of_the_eligibility_query_are_the_ones_trained_on(server, worker, runner):
    server.policies = [availability(1), separation(1, 1)]
    assert run(server, worker, runner).example_count == 20
    assert len(worker.requests) == 1


def test_a_policy_of_an_unknown_kind_fails_the_run_without_report(server, worker, runner):
    server.policies = [eligibility_pb2.EligibilityPolicyEvalSpec(id="new")]
    outcome = run(server, worker, runner)
    assert (outcome.success, outcome.counted) == (False, True)
    assert server.reports() == []


def test_the_next_query_resumes_behind_the_last_example_of_a_successful_run(server, worker, runner):
    history = TaskHistory()
    server.collection_uri = "app://org.example.app/clicks"
    server.upload_answer = Response(b"", 500)
    assert not run(server, worker, runner, history=history).success
    server.upload_answer = None
    assert run(server, worker, runner, history=history).success
    assert run(server, worker, runner, history=history).success
    assert [request.resumption_token for request in worker.requests] == [None, None, b"token19"]
    assert worker.requests[0].collection_name == "app://org.example.app/clicks"
    assert (worker.requests[0].population_name, worker.requests[0].task_name) == (POPULATION, "3")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("plan", Response(b"", 404)),
        ("checkpoint", Response(b"", 404)),
        ("checkpoint", Response(b"")),
        ("checkpoint", Response(gzip.compress(b"")[:-1], headers={"Content-Encoding": "gzip"})),
        ("checkpoint", Response(gzip.compress(bytes(50_000_001)))),
        ("plan", Response(b"\xff\xff\xff")),
    ],
    ids=["plan gone", "checkpoint gone", "empty", "truncated gzip", "too large", "no plan"],
)
def test_a_failed_download_is_counted_and_not_reported(server, worker, runner, name, answer):
    setattr(server, f"{name}_answer", answer)
    outcome = run(server, worker, runner)
    assert (outcome.success, outcome.counted, outcome.phase) == (False, True, "download")
    assert outcome.retry_window is None
    assert server.reports() == []
    assert "signature" not in outcome.detail


def test_without_a_key_nothing_is_trained_and_failure_is_reported(server, worker, runner):
    server.keys_answer = Response(b"", 503)
    outcome = run(server, worker, runner)
    assert (outcome.reason, outcome.counted, outcome.phase) == (Reason.NO_ENCRYPTION_KEY, True, "encrypt")
    assert server.reports() == [RESULTS.FAILED]
    assert worker.requests == []


class Raising(IsolatedWorker):
    def on_training_example(self, request):
        raise LookupError("no table")


class Empty(IsolatedWorker):
    pass


class Wrong(IsolatedWorker):
    def on_training_example(self, request):
        return [b"bytes"]


class Slow(IsolatedWorker):
    def on_training_example(self, request):
        import time

        time.sleep(0.3)
        return TrainingExampleOutput([TrainingExampleRecord(b"x")])


@pytest.mark.parametrize("bad_worker", [Raising(), Empty(), Wrong(), Slow()])
def test_a_worker_without_examples_costs_its_run_only(server, runner, bad_worker):
    outcome = run(server, bad_worker, runner, example_timeout=0.1)
    assert (outcome.reason, outcome.counted, outcome.phase) == (Reason.EXAMPLES_FAILED, True, "examples")
    assert server.reports() == [RESULTS.FAILED_EXAMPLE_GENERATION]


@pytest.mark.parametrize(
    ("examples", "result"), [([b"junk"], RESULTS.FAILED_MODEL_COMPUTATION), ([b""], RESULTS.FAILED_EXAMPLE_GENERATION)]
)
def test_a_failed_training_is_reported_and_waits_a_day(server, runner, examples, result):
    outcome = run(server, Records(examples), runner)
    assert (outcome.success, outcome.counted, outcome.phase, outcome.retry_window) == (False, True, "train", 86_400.0)
    assert server.reports() == [result]


def test_a_failed_training_whose_report_fails_waits_as_usual(server, runner):
    server.report_answer = Response(b"", 500)
    outcome = run(server, Records([b"junk"]), runner)
    assert (outcome.reason, outcome.retry_window) == (Reason.PLAN_COMPUTATION_FAILED, None)


def test_a_plan_with_an_unknown_operation_is_named_and_reported(server, worker, runner):
    server.plan = server.plan.replace(b"L2Loss", b"L3Loss")
    outcome = run(server, worker, runner)
    assert (outcome.reason, outcome.phase) == (Reason.OPS_NOT_SUPPORTED, "train")
    assert "FlexL3Loss" in outcome.detail
    assert outcome.retry_window == 86_400.0
    assert server.reports() == [RESULTS.FAILED_OPS_ERROR]


def test_a_plan_without_a_computation_is_reported_as_failed(server, worker, runner):
    server.plan = plan_pb2.ClientOnlyPlan(phase=plan_pb2.ClientPhase()).SerializeToString()
    outcome = run(server, worker, runner)
    assert (outcome.reason, outcome.retry_window) == (Reason.PLAN_UNSUPPORTED, None)
    assert server.reports() == [RESULTS.FAILED]


def analytics_plan(**aggregation):
    plan = plan_pb2.ClientOnlyPlan()
    vectors = plan.phase.example_query_spec.example_queries.add().output_vector_specs
    vectors["visits"].vector_name = "v"
    vectors["visits"].data_type = plan_pb2.ExampleQuerySpec.OutputVectorSpec.INT64
    plan.phase.federated_example_query.aggregations["visits"].CopyFrom(plan_pb2.AggregationConfig(**aggregation))
    return plan.SerializeToString()


def test_an_analytics_plan_uploads_its_vectors(server, runner):
    server.plan = analytics_plan(tf_v1_checkpoint_aggregation=plan_pb2.TFV1CheckpointAggregation())
    answer = example_query_result_pb2.ExampleQueryResult()
    answer.vector_data.vectors["v"].int64_values.value.extend([3, 4])
    outcome = run(server, Records([answer.SerializeToString()]), runner)
    assert outcome.success
    body = server.sent("/upload")[0][3]
    update = read_checkpoint(open_update(body, {KEY.id: KEY.private_key}, allow_plaintext=False, limit=1 << 24))
    assert list(update) == ["visits"]
    assert update["visits"].tolist() == [3, 4]


def test_a_failed_analytics_plan_comes_back_without_a_day_of_delay(server, worker, runner):
    server.plan = analytics_plan(secure_aggregation=plan_pb2.SecureAggregationConfig())
    outcome = run(server, worker, runner)
    assert (outcome.reason, outcome.retry_window, outcome.counted) == (Reason.PLAN_ARGUMENT_INVALID, None, True)
    assert server.reports() == [RESULTS.FAILED_MODEL_COMPUTATION]


def test_a_report_answered_404_drops_the_update(server, worker, runner):
    server.report_answer = Response(b"", 404)
    outcome = run(server, worker, runner)
    assert (outcome.reason, outcome.counted, outcome.phase) == (Reason.SERVER_ANSWER_INVALID, True, "report")
    assert server.sent("/upload") == []
    assert len(server.sent(":report-result")) == 3


def test_a_rejected_report_drops_the_update_and_is_not_counted(server, worker, runner):
    history = TaskHistory()
    info = rejection(retry_window=window(1, 2))
    server.report_answer = message(task_assignments_pb2.ReportResultResponse(rejection_info=info))
    outcome = run(server, worker, runner, history=history)
    assert (outcome.success, outcome.counted, outcome.phase) == (False, False, "report")
    assert 1 <= outcome.retry_window <= 2
    assert server.sent("/upload") == []
    assert history.newest(OWNER.job_id(POPULATION), POPULATION, "3") is None


@pytest.mark.parametrize("status", [204, 403, 500])
def test_a_failed_upload_is_counted_and_not_remembered(server, worker, runner, status):
    history = TaskHistory()
    server.upload_answer = Response(b"", status)
    outcome = run(server, worker, runner, history=history)
    assert (outcome.success, outcome.counted, outcome.phase) == (False, True, "upload")
    assert len(server.sent("/upload")) == (1 if status == 403 else 3)
    assert len({body for _, _, _, body in server.sent("/upload")}) == 1
    assert history.newest(OWNER.job_id(POPULATION), POPULATION, "3") is None
    assert server.reports() == [RESULTS.COMPLETED]


def test_a_report_without_upload_location_is_a_failure(server, worker, runner):
    server.report_answer = message(task_assignments_pb2.ReportResultResponse())
    assert run(server, worker, runner).reason == Reason.SERVER_ANSWER_INVALID


def test_a_second_run_of_a_busy_device_ends_at_once(server, worker, runner):
    async def twice():
        async with Transport() as transport:
            settings = DeviceSettings(server.url, POPULATION, owner=OWNER)
            device = Device(settings, in_process(worker), transport=transport, train=runner.train)
            return await asyncio.gather(device.run_once(), device.run_once())

    first, second = asyncio.run(twice())
    assert first.success
    assert (second.reason, second.counted) == ("busy", False)
    assert len(server.sent(":create-task-assignment")) == 1


def test_an_unforeseen_error_is_an_outcome_too(server, worker, runner):
    class Broken:
        async def train(self, plan, checkpoint, examples):
            raise ZeroDivisionError

    outcome = run(server, worker, Broken())
    assert (outcome.reason, outcome.detail, outcome.counted) == (Reason.INTERNAL, "ZeroDivisionError", True)
    assert server.reports() == [RESULTS.FAILED]


def test_a_cancelled_device_can_run_again(server, worker, runner):
    async def cancel():
        async with Transport() as transport:
            settings = DeviceSettings(server.url, POPULATION, owner=OWNER)
            device = Device(settings, in_process(worker), transport=transport, train=runner.train)
            task = asyncio.create_task(device.run_once())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            return await device.run_once()

    assert asyncio.run(cancel()).success


def test_the_job_of_an_owner_and_population_has_the_platforms_number():
    # "a--" is 97 * 31 ** 2 + 45 * 31 + 45; the second one wraps around.
    assert Owner("", "", "").job_id("a") == 94_657
    text = "digits" + "p-C-d"
    wrapped = sum(ord(letter) * 31 ** (len(text) - 1 - place) for place, letter in enumerate(text)) % 2**32
    assert Owner("p", "C", "d").job_id("digits") == (wrapped - 2**32 if wrapped >= 2**31 else wrapped)
