"""Check-in of a device (spec/server.md 1.3, 2.1)."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from fedcompute.errors import Reason, RequestRejected
from fedcompute.protos import task_assignments_pb2
from fedcompute.server.api.messages import ProtoResponse, read_proto
from fedcompute.server.api.paths import split_verb
from fedcompute.server.context import context_of
from fedcompute.server.rounds.assign import check_in
from fedcompute.server.security.limits import MESSAGE_LIMIT

# What devices send that do not know their version.
_UNKNOWN_VERSION = "-1"
_CORRELATION_LIMIT = 64


async def create_task_assignment(request: Request) -> ProtoResponse:
    """POST /taskassignment/v1/population/{population}:create-task-assignment."""
    population = split_verb(request.path_params["population"], "create-task-assignment")
    message = await read_proto(request, task_assignments_pb2.CreateTaskAssignmentRequest, limit=MESSAGE_LIMIT)
    answer = await run_in_threadpool(
        check_in,
        context_of(request),
        population,
        _client_version(message),
        idempotency_key=_idempotency_key(request),
        correlation_id=request.headers.get("odp-correlation-id", "")[:_CORRELATION_LIMIT],
    )
    return ProtoResponse(answer, status=201 if answer.HasField("task_assignment") else 200)


def _client_version(message: task_assignments_pb2.CreateTaskAssignmentRequest) -> int:
    text = message.client_version.version_code or _UNKNOWN_VERSION
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"client version {text[:40]!r} is not an integer")
    return int(text)


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("odp-idempotency-key")
    return None if key is None else f"{request.headers.get('fcp-owner-id-digest', '')}/{key}"


routes = [
    Route("/taskassignment/v1/population/{population}", create_task_assignment, methods=["POST"]),
]
