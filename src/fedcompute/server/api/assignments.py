"""Check-in of a device (spec/server.md 1.3, 2.1)."""

import time

from starlette.requests import Request

from fedcompute.errors import Reason, RequestRejected
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.api.admission import CHECK_IN_S
from fedcompute.server.api.device_auth import authenticate_check_in
from fedcompute.server.api.messages import ProtoResponse, read_proto
from fedcompute.server.api.paths import TemplateRoute, split_verb
from fedcompute.server.context import context_of
from fedcompute.server.measures import CREATED
from fedcompute.server.rounds.check_ins import check_ins_of
from fedcompute.server.security.authentication import Admitted
from fedcompute.server.security.limits import MESSAGE_LIMIT
from fedcompute.server.security.tokens import token_hash
from fedcompute.server.tracing import record_check_in
from fedcompute.storage.check_ins import CheckIn

# What devices send that do not know their version.
_UNKNOWN_VERSION = "-1"
_CORRELATION_LIMIT = 64


async def create_task_assignment(request: Request) -> ProtoResponse:
    """POST /taskassignment/v1/population/{population}:create-task-assignment."""
    started = time.time_ns()
    population = split_verb(request.path_params["population"], "create-task-assignment")
    message = await read_proto(request, task_assignments_pb2.CreateTaskAssignmentRequest, limit=MESSAGE_LIMIT)
    version = _client_version(message)
    admitted = await authenticate_check_in(request, population)
    if isinstance(admitted, ProtoResponse):
        request.state.outcome = "NOT_ADMITTED"
        return admitted
    device = CheckIn(
        population=population,
        client_version=version,
        idempotency_key=_idempotency_key(request, admitted),
        correlation_id=request.headers.get("odp-correlation-id", "")[:_CORRELATION_LIMIT],
        token_hash=admitted.token_hash,
        participant=admitted.participant,
    )
    answer = await check_ins_of(request).answer(device, CHECK_IN_S)
    record_check_in(context_of(request), answer, started)
    request.state.outcome = outcome_of(answer)
    return ProtoResponse(answer, status=201 if answer.HasField("task_assignment") else 200)


def outcome_of(answer: task_assignments_pb2.CreateTaskAssignmentResponse) -> str:
    """What a device was told, as figures name it: CREATED, or the reason of its rejection (spec/server.md 10.1)."""
    if answer.HasField("task_assignment"):
        return CREATED
    return federatedcompute_pb2.RejectionReason.Enum.Name(answer.rejection_info.reason)


def _client_version(message: task_assignments_pb2.CreateTaskAssignmentRequest) -> int:
    text = message.client_version.version_code or _UNKNOWN_VERSION
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"client version {text[:40]!r} is not an integer")
    return int(text)


def _idempotency_key(request: Request, admitted: Admitted) -> str | None:
    key = request.headers.get("odp-idempotency-key")
    if key is None:
        return None
    # Where nobody looks at tokens, they still tell two devices with one key apart.
    token = admitted.token_hash or token_hash(request.headers.get("odp-authorization-key", ""))
    return f"{request.headers.get('fcp-owner-id-digest', '')}/{token}/{key}"


routes = [
    TemplateRoute("/taskassignment/v1/population/{population}", create_task_assignment, methods=["POST"]),
]
