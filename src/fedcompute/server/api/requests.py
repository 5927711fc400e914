"""What happens to every request: an id, one line in the access log, and an answer whatever goes wrong."""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedcompute.errors import FedComputeError, OperationFailed, Reason, RequestRejected
from fedcompute.server.api.admission import is_passing, turned_away
from fedcompute.server.api.guard import is_open
from fedcompute.server.api.messages import error_response, for_strangers
from fedcompute.server.context import context_of
from fedcompute.server.logs import bound, redacted
from fedcompute.server.security.operators import strangers_come

_LOG = logging.getLogger(__name__)
_ACCESS = logging.getLogger("fedcompute.access")
_LONGEST_CORRELATION = 64
_POPULATION = re.compile(r"/population/([^/]+?)(?::[a-z-]+)?(?=/|$)")
_BLOB = re.compile(r"/blobs/v1/[^/]+/([^/]+)/(\d+)/")
_TASK = re.compile(r"/tasks?/(\d+)(?=[/:]|$)")
_API_TASK = re.compile(r"/api/v1/tasks/([^/]+)/(\d+)(?=[/:]|$)")
_NUL = RequestRejected(Reason.MALFORMED_REQUEST, "the path or the query holds a NUL", remedy="leave it out")
_STOPPING = OperationFailed(Reason.SERVER_STOPPING, "the server stops before the request was through")


class RequestLog:
    """ASGI middleware around everything else.

    Logs method, path (never the query, which may hold a signature), status and time. An unexpected exception is
    logged once with its traceback and the request's id, and answered 500 with the same id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append("x-request-id", request_id)
            await send(message)

        with bound(lambda: _facts(scope, request_id)):
            try:
                if "\0" in scope["path"] or b"%00" in scope["query_string"]:
                    # No name of ours has one, and PostgreSQL takes none in a question.
                    await error_response(_NUL)(scope, receive, send_and_note)
                else:
                    await self._app(scope, receive, send_and_note)
            except ClientDisconnect:
                status = status or 499
            except asyncio.CancelledError:
                # Only a server that stops does that, after its grace; the device hears of it and comes again.
                if not status:
                    await error_response(_STOPPING)(scope, receive, send_and_note)
            except Exception:
                _LOG.exception("request failed: %s %s", scope["method"], _path(scope))
                if status:
                    raise
                await internal_error(request_id)(scope, receive, send_and_note)
            finally:
                if _ACCESS.isEnabledFor(logging.INFO):
                    _log_access(scope, status, time.perf_counter() - started)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    path = _path(scope)
    fields = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 6)}
    _ACCESS.info("%s %s %s %.4fs", scope["method"], path, status, seconds, extra={"fields": fields})


def _path(scope: Scope) -> str:
    # As it was sent, so that it holds neither spaces nor control characters; never the query, which holds signatures.
    raw: bytes | None = scope.get("raw_path")
    return redacted(scope["path"] if raw is None else raw.partition(b"?")[0].decode("latin-1"))


def _facts(scope: Scope, request_id: str) -> dict[str, str]:
    found = {"request_id": request_id}
    for name, value in scope["headers"]:
        if name == b"odp-correlation-id":
            found["correlation_id"] = value[:_LONGEST_CORRELATION].decode("latin-1")
    path = scope["path"]
    both = _BLOB.match(path) or _API_TASK.match(path)
    if both:
        return found | {"population": both[1], "task": both[2]}
    for name, pattern in (("population", _POPULATION), ("task", _TASK)):
        one = pattern.search(path)
        if one:
            found[name] = one[1]
    return found


def internal_error(request_id: str) -> Response:
    """The answer to a failure nobody expected: its id and nothing else about it."""
    document = {
        "code": Reason.INTERNAL.value,
        "message": f"unexpected error; request id {request_id}",
        "remedy": "look at the server's log for the request's id",
    }
    return JSONResponse(document, status_code=500)


async def render_typed_error(request: Request, error: Exception) -> Response:
    """Exception handler for FedComputeError; a device hears when to come back of what will pass."""
    assert isinstance(error, FedComputeError)
    if is_passing(request.scope, error):
        return turned_away(context_of(request).settings)
    if error.status >= 500:
        _LOG.error("%s", error)
        if is_open(request.scope["path"]) and strangers_come(context_of(request).settings):
            error = for_strangers(error, request.state.request_id)
    return _page(request, error) or error_response(error)


async def render_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for unknown paths and wrong verbs."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        page = _page(request, RequestRejected(Reason.NOT_FOUND, "there is no such page", remedy="begin at the top"))
        if page is not None:
            return page
    codes = {404: Reason.NOT_FOUND.value, 405: "method_not_allowed"}
    document = {
        "code": codes.get(error.status_code, Reason.MALFORMED_REQUEST.value),
        "message": error.detail,
        "remedy": "check the method and path of the route",
    }
    return JSONResponse(document, status_code=error.status_code, headers=error.headers)


def _page(request: Request, error: FedComputeError) -> Response | None:
    error_page = getattr(request.state, "error_page", None)
    found: Response | None = None if error_page is None else error_page(request, error)
    return found
