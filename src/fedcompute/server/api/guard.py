"""The door to everything that is not a device's: who may pass, with which role, and what the audit log keeps of it."""

import logging
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedcompute.errors import FedComputeError, Reason, RequestRejected
from fedcompute.server.api.acts import act_of
from fedcompute.server.api.messages import error_response, for_strangers
from fedcompute.server.api.operations import OPERATIONS, Operation, Table
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.security.operators import KEY_HEADER, Caller, identify, opens_without_key
from fedcompute.server.security.sessions import caller_of_session
from fedcompute.storage.api_keys import Role
from fedcompute.storage.audit import record

_LOG = logging.getLogger(__name__)
# What devices and orchestrators call; everything else is an operator's, also what nobody has thought of.
OPEN_PATHS = ("/taskassignment/", "/blobs/", "/.well-known/", "/ready", "/healthz")
_CHALLENGES = {
    Reason.API_KEY_MISSING: 'Bearer realm="fedcompute"',
    Reason.API_KEY_INVALID: 'Bearer realm="fedcompute", error="invalid_token"',
    Reason.ROLE_INSUFFICIENT: 'Bearer realm="fedcompute", error="insufficient_scope"',
}
# Of every answer that is not a device's, where it says nothing else: what is in it is for who asked.
_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "same-origin"}
# Refusals that are written down in a minute; beyond that a stranger could fill the disk. The access log has them all.
_REFUSALS_PER_MINUTE = 60

ErrorPage = Callable[[HTTPConnection, FedComputeError], Response | None]


class Guard:
    """ASGI middleware: a management route is reached only by who may call it, and every change leaves a trace.

    The endpoint writes the row of a change that succeeds in the change's own transaction (see `audited`); rows of
    changes that fail, and of callers that are refused, are written here, between the decision and the answer.

    Formal guarantees: a request whose path does not begin with one of OPEN_PATHS reaches an endpoint only if `identify`
    names its caller and the caller's role covers the operation's; a path without an operation needs the highest role.
    """

    def __init__(
        self, app: ASGIApp, operations: Sequence[Operation] = OPERATIONS, error_page: ErrorPage = lambda *_: None
    ) -> None:
        """`error_page` makes a refusal readable for a person; None leaves it as it is."""
        self._app = app
        self._table = Table(operations)
        self._error_page = error_page
        # Apart, so that strangers cannot keep out of the log what the holder of a key tries.
        self._of_strangers = _Allowance(_REFUSALS_PER_MINUTE)
        self._of_holders = _Allowance(_REFUSALS_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        operation = self._table.operation_of(scope)
        request = HTTPConnection(scope)
        request.state.action = "unknown" if operation is None else operation.name
        request.state.success = 200 if operation is None else operation.status
        request.state.default_subject = "/".join(str(value) for value in scope.get("path_params", {}).values())
        is_page = operation is None or operation.page
        request.state.error_page = self._error_page if is_page else None
        kept = operation is not None and operation.changes

        async def send_and_keep(message: Message) -> None:
            # Before the caller hears of it.
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                await keep(message["status"])
            await send(message)

        async def keep(status: int) -> None:
            # Anybody may sign in and out, so who is nobody must not fill the log by it.
            nobody = operation is not None and operation.role is None and not hasattr(request.state, "caller")
            if nobody and not self._of_strangers.take():
                return
            if kept and not getattr(request.state, "recorded", False):
                request.state.recorded = True
                await run_in_threadpool(_record, request, status)

        try:
            await _admit(request, scope["method"], operation)
        except FedComputeError as error:
            refusals = self._of_holders if hasattr(request.state, "caller") else self._of_strangers
            # A page that is only looked at, and asks for a key, is no attempt at anything.
            looks = operation is not None and operation.page and not operation.changes
            noted = operation is not None and not looks and isinstance(error, RequestRejected)
            kept = noted and refusals.take()
            if error.status >= 500:
                _LOG.error("%s", error)
                if not opens_without_key(context_of(request).settings):
                    error = for_strangers(error, request.state.request_id)
            answer = self._led_to_sign_in(request, scope, error) or error_response(error)
            if error.reason in _CHALLENGES and answer.status_code == error.status:
                answer.headers["www-authenticate"] = _CHALLENGES[error.reason]
            await answer(scope, receive, send_and_keep)
            return
        try:
            await self._app(scope, receive, send_and_keep)
        except Exception:
            await keep(500)
            raise

    def _led_to_sign_in(self, request: HTTPConnection, scope: Scope, error: FedComputeError) -> Response | None:
        if request.state.error_page is None:
            return None
        page = self._error_page(request, error)
        if page is None or error.reason not in (Reason.API_KEY_MISSING, Reason.API_KEY_INVALID):
            return page
        if scope["method"] not in ("GET", "HEAD") or {KEY_HEADER, "authorization"} & lowered(request).keys():
            return page
        path = scope.get("raw_path") or quote(scope["path"]).encode()
        here = (path + (b"?" + scope["query_string"] if scope["query_string"] else b"")).decode("latin-1")
        return RedirectResponse(f"/login?next={quote(here, safe='/')}", 303)


def is_open(path: str) -> bool:
    """Whether a path is a device's or an orchestrator's, so that no key is asked for."""
    return any(path.startswith(one) if one.endswith("/") else path == one for one in OPEN_PATHS)


async def _admit(request: HTTPConnection, method: str, operation: Operation | None) -> None:
    context = context_of(request)
    headers = lowered(request)
    needed = Role.OPERATOR if operation is None else operation.role
    caller = await run_in_threadpool(_identify, context, method, headers, needed)
    if caller is not None:
        request.state.caller = caller
    if needed is None or caller is None:
        return
    if not caller.role.covers(needed):
        raise RequestRejected(
            Reason.ROLE_INSUFFICIENT, f"this needs the role {needed.value}, and the key has {caller.role.value}"
        )


def lowered(request: HTTPConnection) -> dict[str, str]:
    """A request's headers with their names in lower case."""
    return {name.lower(): value for name, value in request.headers.items()}


def _identify(context: Context, method: str, headers: dict[str, str], needed: Role | None) -> Caller | None:
    """Who calls; None only where nobody needs to be known and nobody is."""
    if KEY_HEADER not in headers and "authorization" not in headers:
        caller = caller_of_session(context.database, context.settings, context.session_key, method, headers, now())
        if caller is not None:
            return caller
    try:
        return identify(context.database, context.settings, method, headers, now())
    except RequestRejected:
        if needed is None:
            return None
        raise


def _record(request: HTTPConnection, status: int) -> None:
    try:
        with context_of(request).database.write() as tx:
            record(tx, act_of(request, status), now())
    except FedComputeError as error:
        _LOG.error("request %s is not in the audit log: %s", request.state.request_id, error)


class _Allowance:
    """So many a minute, in minutes of the clock."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._minute = 0
        self._taken = 0

    def take(self) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._taken = minute, 0
        self._taken += 1
        return self._taken <= self._most
