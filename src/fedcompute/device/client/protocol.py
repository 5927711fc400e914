"""The four exchanges of a run: check-in, download, report, upload (spec/device.md 1.4-1.8)."""

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from fedcompute.crypto.envelope import GZIP_MAGIC, gunzip, gzip_bytes
from fedcompute.device.client.authorization import Authorization
from fedcompute.device.client.http import Response, Transport, join_url
from fedcompute.device.owner import Owner
from fedcompute.errors import DeviceRunFailed, Reason, UploadRejected
from fedcompute.protos import federatedcompute_pb2, plan_pb2, task_assignments_pb2

# No server of ours or theirs names a version above it, so no task is too new for a device of this package.
CLIENT_VERSION = "999999999"
CHECKPOINT_BYTES_LIMIT = 50_000_000
PLAN_BYTES_LIMIT = 50_000_000
MAX_RETRY_DELAY = 172_800.0  # seconds, 2 days

_PROTOBUF = {"content-type": "application/x-protobuf"}
_GZIP = federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP

Result = task_assignments_pb2.ReportResultRequest.Result
CheckInAnswer = task_assignments_pb2.CreateTaskAssignmentResponse
ReportAnswer = task_assignments_pb2.ReportResultResponse
_NOT_TAKEN = (
    federatedcompute_pb2.RejectionReason.UNAUTHENTICATED,
    federatedcompute_pb2.RejectionReason.UNAUTHORIZED,
)


@dataclass(frozen=True)
class RetryWindow:
    """Seconds between which a device draws the time of its next try."""

    delay_min: float
    delay_max: float

    def draw(self, chance: random.Random) -> float:
        """Uniform seconds within the window, at most two days."""
        return min(chance.uniform(self.delay_min, max(self.delay_min, self.delay_max)), MAX_RETRY_DELAY)


@dataclass(frozen=True)
class Rejected:
    """The server has nothing to do or to take. `window` is None where the server's bounds are not positive."""

    reason: str  # the rejection reason's name in lower case
    window: RetryWindow | None
    proven: bool = False  # whether the device had answered a challenge before it heard this


async def check_in(
    transport: Transport,
    server: str,
    population: str,
    *,
    owner: Owner,
    client_version: str = CLIENT_VERSION,
    authorization: Authorization | None = None,
) -> task_assignments_pb2.TaskAssignment | Rejected:
    """Asks for an assignment, a second time with a proof if the server asks for one and the device has `authorization`.

    Raises DeviceRunFailed for an answer that is neither assignment nor retry window.
    """
    request = task_assignments_pb2.CreateTaskAssignmentRequest(
        client_version=federatedcompute_pb2.ClientVersion(version_code=client_version),
        resource_capabilities=_capabilities(),
    )

    async def send(shown: Mapping[str, str]) -> Response:
        return await transport.request(
            "POST",
            join_url(server, f"taskassignment/v1/population/{population}:create-task-assignment"),
            what="check-in",
            headers={
                **_PROTOBUF,
                # One key for all transport attempts, so that a repeated request finds its first answer.
                "odp-idempotency-key": f"{time.time_ns() // 1_000_000} - {uuid.uuid4()}",
                "fcp-owner-id-digest": owner.digest,
                **shown,
            },
            body=request.SerializeToString(),
        )

    answer = task_assignments_pb2.CreateTaskAssignmentResponse()
    proven = await _exchange(send, answer, authorization, "check-in")
    match answer.WhichOneof("result"):
        case "task_assignment":
            _check_assignment(answer.task_assignment, population)
            return answer.task_assignment
        case "rejection_info":
            return _rejected(answer.rejection_info, "check-in", proven)
    raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, "check-in: neither an assignment nor a rejection")


async def download(
    transport: Transport,
    assignment: task_assignments_pb2.TaskAssignment,
    checkpoint_bytes_limit: int = CHECKPOINT_BYTES_LIMIT,
) -> tuple[plan_pb2.ClientOnlyPlan, bytes]:
    """Fetches plan and checkpoint at the same time; both gunzipped where they are gzip.

    Raises DeviceRunFailed: PLAN_MALFORMED for a plan that does not parse, SERVER_ANSWER_INVALID for an empty or too
    large checkpoint, else as the transport.
    """
    plan_bytes, checkpoint = await asyncio.gather(
        _fetch(transport, assignment.plan, "plan download", PLAN_BYTES_LIMIT),
        _fetch(transport, assignment.init_checkpoint, "checkpoint download", checkpoint_bytes_limit),
    )
    if not checkpoint:
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, "checkpoint download: no bytes")
    try:
        return plan_pb2.ClientOnlyPlan.FromString(plan_bytes), checkpoint
    except DecodeError:
        raise DeviceRunFailed(Reason.PLAN_MALFORMED, f"{len(plan_bytes)} bytes that are no client plan") from None


async def report(
    transport: Transport,
    server: str,
    assignment: task_assignments_pb2.TaskAssignment,
    result: Result,
    *,
    authorization: Authorization | None = None,
) -> task_assignments_pb2.UploadInstruction | Rejected:
    """Tells the server how the assignment ended; after COMPLETED, where to upload the update. A proof as in `check_in`.

    Raises DeviceRunFailed for any answer but 200 and 201, and for a rejection without a retry window. The answer to
    a failure report means nothing and comes back as it is.
    """
    population, task = assignment.population_name, assignment.task_id
    request = task_assignments_pb2.ReportResultRequest(result=result, resource_capabilities=_capabilities())

    async def send(shown: Mapping[str, str]) -> Response:
        return await transport.request(
            "PUT",
            join_url(
                server,
                f"taskassignment/v1/population/{population}/task/{task}/aggregation/{assignment.aggregation_id}"
                f"/task-assignment/{assignment.assignment_id}:report-result",
            ),
            what="report",
            headers={**_PROTOBUF, **shown},
            body=request.SerializeToString(),
        )

    completed = result == task_assignments_pb2.ReportResultRequest.COMPLETED
    answer = task_assignments_pb2.ReportResultResponse()
    proven = await _exchange(send, answer, authorization, "report", ignore_body=not completed)
    if completed and answer.HasField("rejection_info"):
        return _rejected(answer.rejection_info, "report", proven)
    return answer.upload_instruction


async def upload(transport: Transport, instruction: task_assignments_pb2.UploadInstruction, body: bytes) -> None:
    """Puts an update where the server said, with exactly its headers; gzips it if the instruction says so.

    Raises DeviceRunFailed unless the answer is 200 or 201.
    """
    if not instruction.upload_location:
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, "report: no upload location")
    if instruction.compression_format == _GZIP:
        body = await asyncio.to_thread(gzip_bytes, body)
    response = await transport.request(
        "PUT",
        instruction.upload_location,
        what="upload",
        headers=dict(instruction.extra_request_headers),
        body=body,
    )
    if not response.ok:
        raise _unexpected("upload", response)


async def _fetch(transport: Transport, resource: federatedcompute_pb2.Resource, what: str, limit: int) -> bytes:
    match resource.WhichOneof("resource"):
        case "inline_resource":
            data = resource.inline_resource.data
        case "uri" if resource.uri:
            headers = {"accept-encoding": "gzip"} if resource.compression_format == _GZIP else {}
            response = await transport.request("GET", resource.uri, what=what, headers=headers, limit=limit)
            if not response.ok:
                raise _unexpected(what, response)
            data = response.body
        case _:
            raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: the assignment names no resource")
    # The bytes decide, not what the message or a header says of them: neither a plan nor a checkpoint can begin
    # with gzip's magic, and proxies drop or undo content encodings.
    if data.startswith(GZIP_MAGIC):
        try:
            data = await asyncio.to_thread(gunzip, data, limit)
        except UploadRejected as cause:
            raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: {cause.detail}") from None
    if len(data) > limit:
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: {len(data)} bytes, over {limit}")
    return data


def _capabilities() -> federatedcompute_pb2.ResourceCapabilities:
    return federatedcompute_pb2.ResourceCapabilities(supported_compression_formats=[_GZIP])


def _check_assignment(assignment: task_assignments_pb2.TaskAssignment, population: str) -> None:
    ids: Sequence[str] = (assignment.task_id, assignment.aggregation_id, assignment.assignment_id)
    if assignment.population_name != population:
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, "check-in: an assignment of another population")
    # They become parts of URLs as they are.
    if not all(text.isascii() and text.isprintable() and text and not set(text) & set("/?#% ") for text in ids):
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, "check-in: an assignment id is empty or not URL-safe")


async def _exchange(
    send: Callable[[Mapping[str, str]], Awaitable[Response]],
    answer: CheckInAnswer | ReportAnswer,
    authorization: Authorization | None,
    what: str,
    *,
    ignore_body: bool = False,
) -> bool:
    """Reads the server's answer into `answer`; returns whether the device had to prove itself for it.

    A challenge is answered once, by the same request with a proof. A token is kept only after the server has taken it,
    so that a refused one does not come again. Raises DeviceRunFailed for a status or body that means nothing.
    """
    response = await send(authorization.headers() if authorization is not None else {})
    # A 401 carries a challenge, in the same message.
    if not response.ok and response.status != 401:
        raise _unexpected(what, response)
    _parse(answer, response.body, what, ignore_body and response.ok)
    challenge = answer.rejection_info.auth_metadata.key_attestation_metadata.challenge
    if authorization is None or not challenge:
        if not response.ok and (ignore_body or not answer.HasField("rejection_info")):
            raise _unexpected(what, response)
        return False
    proof = authorization.answer(challenge)
    response = await send(proof.headers)
    if not response.ok and response.status != 403:
        raise _unexpected(what, response)
    answer.Clear()
    _parse(answer, response.body, what, ignore_body and response.ok)
    if response.ok and answer.rejection_info.reason not in _NOT_TAKEN:
        authorization.keep(proof)
    if ignore_body and not response.ok:
        raise _unexpected(what, response)
    return True


def _not_enrolled(what: str) -> DeviceRunFailed:
    return DeviceRunFailed(
        Reason.SERVER_ANSWER_INVALID,
        f"{what}: the server asks for a proof, which this device does not have or which was not enough",
        remedy="enrol the device with `fedcompute enrolment create` and give it its secret",
    )


def _rejected(info: federatedcompute_pb2.RejectionInfo, what: str, proven: bool) -> Rejected:
    kind = info.WhichOneof("metadata")
    if kind == "auth_metadata":
        raise _not_enrolled(what)
    if kind is None:
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: a rejection without a retry window")
    known = federatedcompute_pb2.RejectionReason.Enum.values()
    name = federatedcompute_pb2.RejectionReason.Enum.Name(info.reason) if info.reason in known else "UNKNOWN"
    low, high = _seconds(info.retry_window.delay_min), _seconds(info.retry_window.delay_max)
    return Rejected(name.lower(), RetryWindow(low, high) if low > 0 and high > 0 else None, proven)


def _seconds(duration: Duration) -> float:
    """Whole milliseconds, as devices count them."""
    return (duration.seconds * 1000 + duration.nanos // 1_000_000) / 1000


def _parse(message: CheckInAnswer | ReportAnswer, body: bytes, what: str, ignore: bool = False) -> None:
    try:
        message.ParseFromString(body)
    except DecodeError:
        message.Clear()
        if ignore:
            return
        detail = f"{what}: {len(body)} bytes that are no {type(message).__name__}"
        raise DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, detail) from None


def _unexpected(what: str, response: Response) -> DeviceRunFailed:
    return DeviceRunFailed(Reason.SERVER_ANSWER_INVALID, f"{what}: HTTP status {response.status}")
