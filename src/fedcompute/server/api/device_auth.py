"""Authentication at the two routes that devices call: who goes on, and what the others hear (spec/server.md 3.2)."""

from functools import partial

from starlette.requests import Request

from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.api.admission import CHECK_IN_S, persistently, within
from fedcompute.server.api.messages import ProtoResponse
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.rounds.assign import rejection
from fedcompute.server.security.authentication import (
    Admitted,
    Authentication,
    Challenged,
    Credentials,
    Decision,
    Refused,
    TooOften,
    Unavailable,
)
from fedcompute.server.security.tokens import check_owner
from fedcompute.storage.assignments import find_assignment
from fedcompute.storage.keys import TaskKey

Answer = type[task_assignments_pb2.CreateTaskAssignmentResponse] | type[task_assignments_pb2.ReportResultResponse]
_Rejection = federatedcompute_pb2.RejectionReason


async def authenticate_check_in(request: Request, population: str) -> Admitted | ProtoResponse:
    """The device that checks in, or the answer that it gets instead.

    Raises RequestRejected(MALFORMED_REQUEST) for headers of no form, and for no owner digest.
    """
    context = context_of(request)
    authentication = context.authentication
    if authentication is None:
        return Admitted()
    owner = check_owner(request.headers.get("fcp-owner-id-digest"))
    shown = _credentials(context, request)
    decision = await within(CHECK_IN_S, None, lambda _: authentication.check_in(shown, population, owner, now()))
    return _answer(context, decision, task_assignments_pb2.CreateTaskAssignmentResponse)


async def authenticate_report(
    request: Request, task: TaskKey, iteration_id: int, session_id: str, *, failed: bool
) -> Admitted | ProtoResponse:
    """The device that reports, or the answer that it gets instead; `failed`: it reports that its run failed.

    Raises RequestRejected(MALFORMED_REQUEST) for headers of no form.
    """
    context = context_of(request)
    authentication = context.authentication
    if authentication is None:
        return Admitted()
    shown = _credentials(context, request)
    decide = partial(_decide_report, authentication, shown, task, iteration_id, session_id, failed)
    # As long as for a check-in, so that the report itself is still answered in time.
    decision = await persistently(CHECK_IN_S, context.report_threads, decide)
    return _answer(context, decision, task_assignments_pb2.ReportResultResponse)


def _decide_report(
    authentication: Authentication,
    shown: Credentials,
    task: TaskKey,
    iteration_id: int,
    session_id: str,
    failed: bool,
    _seconds: float,
) -> Decision:
    with authentication.database.read() as tx:
        session = find_assignment(tx, task, iteration_id, session_id)
    return authentication.report(shown, session_id, session, failed=failed, now=now())


def _credentials(context: Context, request: Request) -> Credentials:
    headers = request.headers
    return Credentials(
        token=headers.get("odp-authorization-key"),
        proof=headers.get("odp-authentication-key"),
        name=headers.get("odp-idempotency-key") or request.url.path,
        may_be_challenged=lambda: context.rates.may_be_challenged(request),
    )


def _answer(context: Context, decision: Decision, message: Answer) -> Admitted | ProtoResponse:
    window = context.settings.retry_unauthorized
    match decision:
        case Admitted():
            return decision
        case Challenged(challenge):
            info = federatedcompute_pb2.RejectionInfo(reason=_Rejection.UNAUTHENTICATED)
            info.auth_metadata.key_attestation_metadata.challenge = challenge
            return ProtoResponse(message(rejection_info=info), status=401)
        case Refused():
            return ProtoResponse(message(rejection_info=rejection(_Rejection.UNAUTHORIZED, window)), status=403)
        case Unavailable(verifying=False):
            return ProtoResponse(message(rejection_info=rejection(_Rejection.UNAUTHORIZED, window)))
        case Unavailable() | TooOften():
            return ProtoResponse(message(rejection_info=rejection(_Rejection.UNAUTHENTICATED, window)))
