"""Devices that prove themselves: against scripted answers here, against the real server in tests/end_to_end."""

import asyncio
import base64
import hashlib
import hmac
import json
from dataclasses import dataclass, field

import pytest
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.device.client import protocol
from fedcompute.device.client.authorization import TOKEN_LIFE, Authorization, Enrolment, read_enrolments
from fedcompute.device.client.http import Retries, Transport
from fedcompute.device.client.protocol import Rejected
from fedcompute.device.owner import Owner
from fedcompute.device.state.history import TaskHistory
from fedcompute.errors import DeviceRunFailed, OperationFailed, Reason
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2

CheckInAnswer = task_assignments_pb2.CreateTaskAssignmentResponse
ReportAnswer = task_assignments_pb2.ReportResultResponse
RESULTS = task_assignments_pb2.ReportResultRequest
ENROLMENT = Enrolment("0f1e2d3c", b"s" * 32)
OWNER = Owner("org.example", "org.example.Worker")
CHALLENGE = b"c" * 40


def rejected(reason, challenge=None):
    info = federatedcompute_pb2.RejectionInfo(reason=federatedcompute_pb2.RejectionReason.Enum.Value(reason))
    if challenge is None:
        info.retry_window.delay_min.FromMilliseconds(100)
        info.retry_window.delay_max.FromMilliseconds(200)
    else:
        info.auth_metadata.key_attestation_metadata.challenge = challenge
    return info


CHALLENGED = rejected("UNAUTHENTICATED", CHALLENGE)
ASSIGNMENT = task_assignments_pb2.TaskAssignment(
    population_name="digits", task_id="1", aggregation_id="2", assignment_id="3"
)


@dataclass
class Wire:
    """A server that gives its answers one after the other, the last one for ever; requests are kept."""

    serve: object
    answers: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    async def handle(self, request):
        await request.body()
        self.requests.append(request)
        status, message = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return Response(message.SerializeToString(), status, media_type="application/x-protobuf")

    def ask(self, call):
        """Runs `call(transport, url)` against this server."""
        routes = [Route("/{path:path}", self.handle, methods=["POST", "PUT"])]

        async def run(url):
            async with Transport(retries=Retries(delay=0.01)) as transport:
                return await call(transport, url)

        with self.serve(routes) as url:
            self.url = url
            return asyncio.run(run(url))

    def shown(self):
        """Token and proof of each request."""
        names = ("odp-authorization-key", "odp-authentication-key")
        return [tuple(request.headers.get(name) for name in names) for request in self.requests]


@pytest.fixture
def wire(serve):
    return Wire(serve)


@pytest.fixture
def memory():
    history = TaskHistory()
    yield history
    history.database.close()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def check_in(wire, memory, prove=ENROLMENT.prove, clock=None):
    def call(transport, url):
        # The port is another one each time, the server is the same.
        authorization = Authorization(memory, "server", OWNER.id, prove, clock or Clock()) if prove else None
        return protocol.check_in(transport, url, "digits", owner=OWNER, authorization=authorization)

    return wire.ask(call)


def report(wire, memory, result, prove=ENROLMENT.prove):
    def call(transport, url):
        authorization = Authorization(memory, "server", OWNER.id, prove, Clock()) if prove else None
        return protocol.report(transport, url, ASSIGNMENT, result, authorization=authorization)

    return wire.ask(call)


def is_proof(proof, token):
    mac = hmac.new(ENROLMENT.secret, CHALLENGE + token.encode(), hashlib.sha256).digest()
    return json.loads(proof) == ["enrolment:v1", ENROLMENT.id, base64.b64encode(mac).decode()]


def test_a_challenge_is_answered_once_with_a_new_token_and_a_new_request_key(wire, memory):
    wire.answers = [(401, CheckInAnswer(rejection_info=CHALLENGED)), (201, CheckInAnswer(task_assignment=ASSIGNMENT))]
    assert check_in(wire, memory) == ASSIGNMENT
    (first, second) = wire.shown()
    assert first == (None, None)
    assert is_proof(second[1], second[0])
    keys = [request.headers["odp-idempotency-key"] for request in wire.requests]
    assert keys[0] != keys[1]
    assert memory.token("server", OWNER.id, 1000.0 + TOKEN_LIFE - 1) == second[0]
    assert memory.token("server", OWNER.id, 1000.0 + TOKEN_LIFE) is None
    assert memory.token("another server", OWNER.id, 1000.0) is None


@pytest.mark.parametrize("status", [200, 201, 401])
def test_a_challenge_may_come_with_any_status_that_is_read(wire, memory, status):
    wire.answers = [
        (status, CheckInAnswer(rejection_info=CHALLENGED)),
        (200, CheckInAnswer(rejection_info=rejected("NO_TASK_AVAILABLE"))),
    ]
    answer = check_in(wire, memory)
    assert (answer.reason, answer.proven) == ("no_task_available", True)
    assert memory.token("server", OWNER.id, 1000.0) == wire.shown()[1][0]


def test_a_token_is_shown_until_it_expires_or_is_challenged(wire, memory):
    memory.save_token("server", OWNER.id, "t" * 36, 1001.0)
    wire.answers = [(201, CheckInAnswer(task_assignment=ASSIGNMENT))]
    check_in(wire, memory)
    later = Clock()
    later.now = 1001.0
    check_in(wire, memory, clock=later)
    assert wire.shown() == [("t" * 36, None), (None, None)]
    wire.answers = [(401, CheckInAnswer(rejection_info=CHALLENGED)), (403, CheckInAnswer())]
    with pytest.raises(DeviceRunFailed):
        check_in(wire, memory)
    assert memory.token("server", OWNER.id, 1000.0) is None


def test_a_refused_proof_is_heard_and_its_token_forgotten(wire, memory):
    wire.answers = [
        (401, CheckInAnswer(rejection_info=CHALLENGED)),
        (403, CheckInAnswer(rejection_info=rejected("UNAUTHORIZED"))),
    ]
    answer = check_in(wire, memory)
    assert isinstance(answer, Rejected)
    assert (answer.reason, answer.proven) == ("unauthorized", True)
    assert answer.window.delay_min == 0.1
    assert len(wire.requests) == 2
    assert memory.token("server", OWNER.id, 1000.0) is None


def test_a_proof_that_could_not_be_judged_earns_no_token(wire, memory):
    wire.answers = [
        (401, CheckInAnswer(rejection_info=CHALLENGED)),
        (200, CheckInAnswer(rejection_info=rejected("UNAUTHENTICATED"))),
    ]
    assert check_in(wire, memory).reason == "unauthenticated"
    assert memory.token("server", OWNER.id, 1000.0) is None


@pytest.mark.parametrize("status", [200, 401])
def test_a_second_challenge_fails_the_run(wire, memory, status):
    wire.answers = [
        (401, CheckInAnswer(rejection_info=CHALLENGED)),
        (status, CheckInAnswer(rejection_info=CHALLENGED)),
    ]
    with pytest.raises(DeviceRunFailed) as failure:
        check_in(wire, memory)
    assert failure.value.reason is Reason.SERVER_ANSWER_INVALID
    assert len(wire.requests) == 2


def test_a_device_without_enrolment_fails_at_a_challenge_and_is_told_what_to_do(wire, memory):
    wire.answers = [(401, CheckInAnswer(rejection_info=CHALLENGED))]
    with pytest.raises(DeviceRunFailed) as failure:
        check_in(wire, memory, prove=None)
    assert "fedcompute enrolment create" in failure.value.remedy
    assert len(wire.requests) == 1


def test_a_success_report_answers_a_challenge(wire, memory):
    upload = task_assignments_pb2.UploadInstruction(upload_location="http://localhost:1/x")
    wire.answers = [(401, ReportAnswer(rejection_info=CHALLENGED)), (200, ReportAnswer(upload_instruction=upload))]
    assert report(wire, memory, RESULTS.COMPLETED) == upload
    assert is_proof(*reversed(wire.shown()[1]))
    assert memory.token("server", OWNER.id, 1000.0) == wire.shown()[1][0]


def test_a_failure_report_answers_a_challenge_once(wire, memory):
    wire.answers = [(401, ReportAnswer(rejection_info=CHALLENGED)), (200, ReportAnswer())]
    report(wire, memory, RESULTS.FAILED)
    assert is_proof(*reversed(wire.shown()[1]))
    wire.answers = [(401, ReportAnswer(rejection_info=CHALLENGED)), (403, ReportAnswer())]
    with pytest.raises(DeviceRunFailed):
        report(wire, memory, RESULTS.FAILED)


@pytest.mark.parametrize("text", ["nothing", "id:", ":c2VjcmV0", "id:!!!", "id:" + "A" * 2000])
def test_a_file_of_enrolments_that_cannot_be_read_is_refused_without_its_text(tmp_path, text):
    (tmp_path / "e").write_text(f"a:c2VjcmV0\n\n{text}\n")
    with pytest.raises(OperationFailed) as failure:
        read_enrolments(tmp_path / "e")
    assert failure.value.reason is Reason.SETTINGS_INVALID
    assert "line 3" in failure.value.detail
    assert text not in str(failure.value)
    with pytest.raises(OperationFailed):
        read_enrolments(tmp_path / "none")


def test_the_secret_of_an_enrolment_is_not_in_its_representation():
    assert "s" * 8 not in repr(ENROLMENT)
