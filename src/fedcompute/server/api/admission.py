"""Overload, seen from a device: whatever happens here, it hears when to come back (spec/server.md 1.1, 1.4).

A device repeats 429, 503 and every other refusal twice at once and then counts a failure, so load is shed with 200,
a rejection and a retry window. Check-ins go first: they cost nobody anything. A report that is turned away costs a
trained update, so reports wait as long as a device does.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.api.messages import ProtoResponse, error_response
from fedcompute.server.context import context_of
from fedcompute.server.rounds.assign import rejection
from fedcompute.server.security.rates import ATTEMPTS
from fedcompute.server.settings import Settings

_LOG = logging.getLogger(__name__)
# How long the server works on an answer. A device waits for 30 s and then asks again while the first may take effect.
CHECK_IN_S = 8.0
REPORT_S = 16.0
UPLOAD_S = 16.0
# How long a report or upload waits for its place before that.
PLACE_S = 8.0
# How often one object is uploaded at once, attempts whose device has gone included.
SAME_UPLOADS = 2 * ATTEMPTS
# How often a report looks whether the database is back.
_RETRY_S = 0.5
# What passes: the same work may succeed a little later.
_TRANSIENT = (Reason.STORAGE_FAILED, Reason.SERVER_BUSY, Reason.SERVER_STOPPING)

T = TypeVar("T")


class Call(StrEnum):
    """What a device may ask of a server."""

    CHECK_IN = "check-in"
    REPORT = "report"
    UPLOAD = "upload"


class Admission:
    """ASGI middleware: keeps what is under way for devices within the settings' limits, and check-ins to their rate.

    Also the answer for a device when the server stops before its request was through.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._uploads: Counter[str] = Counter()
        self._rooms = {
            Call.CHECK_IN: _Room(settings.max_check_ins, patience=0.0),
            Call.REPORT: _Room(settings.max_reports, patience=PLACE_S),
            Call.UPLOAD: _Room(settings.max_uploads, patience=PLACE_S),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope)
        if call is None:
            await self._app(scope, receive, send)
            return
        room = self._rooms[call]
        answered = entered = False

        async def enter() -> None:
            nonlocal entered
            if not entered:
                await room.enter()
                entered = True

        async def receive_and_enter() -> Message:
            # Whoever has not sent all of its request keeps no place from those who have.
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                await enter()
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            if call is Call.UPLOAD:
                with self._attempt(scope["path"]):
                    await enter()
                    await self._app(scope, receive, send_and_note)
                return
            request = HTTPConnection(scope)
            if call is Call.CHECK_IN and not context_of(request).rates.may_check_in(request):
                await self._turn_away(scope, receive, send)
                return
            await self._app(scope, receive_and_enter, send_and_note)
        except asyncio.CancelledError:
            # Only a server that stops does that, after its grace.
            if answered or call is Call.UPLOAD:
                raise
            await self._turn_away(scope, receive, send)
        except _NoRoom as full:
            if call is Call.UPLOAD:
                await error_response(OperationFailed(Reason.SERVER_BUSY, str(full)))(scope, receive, send)
                return
            await self._turn_away(scope, receive, send)
        finally:
            if entered:
                room.leave()

    @contextmanager
    def _attempt(self, path: str) -> Iterator[None]:
        # A device makes three attempts; many more at once would be one session in the places of many.
        if self._uploads[path] >= SAME_UPLOADS:
            raise _NoRoom(f"{SAME_UPLOADS} uploads of this object are under way")
        self._uploads[path] += 1
        try:
            yield
        finally:
            self._uploads[path] -= 1
            if not self._uploads[path]:
                del self._uploads[path]

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        await turned_away(self._settings)(scope, receive, send)


def call_of(scope: Scope) -> Call | None:
    """Which device call a request is, None if none; whether its path names anything is for the routes to say."""
    if scope["type"] != "http":
        return None
    method, path = scope["method"], scope["path"]
    if path.startswith("/taskassignment/"):
        if method == "POST" and path.endswith(":create-task-assignment"):
            return Call.CHECK_IN
        if method == "PUT" and path.endswith(":report-result"):
            return Call.REPORT
    if method == "PUT" and path.startswith("/blobs/"):
        return Call.UPLOAD
    return None


def turned_away(settings: Settings) -> ProtoResponse:
    """The friendly refusal, for check-ins and reports alike: `rejection_info` is field 2 of both answers."""
    info = rejection(federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE, settings.retry_no_task)
    return ProtoResponse(task_assignments_pb2.ReportResultResponse(rejection_info=info))


def is_passing(scope: Scope, error: FedComputeError) -> bool:
    """Whether a device that meets this error is to be turned away with a retry window instead; says so in the log."""
    passing = call_of(scope) in (Call.CHECK_IN, Call.REPORT) and error.reason in _TRANSIENT
    if passing:
        _said(error)
    return passing


class _Seldom:
    """Logs one line a second at most, and how many it left out: an overload must not fill the log as well."""

    def __init__(self) -> None:
        self._next = 0.0
        self._left_out = 0

    def __call__(self, error: FedComputeError) -> None:
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        _LOG.warning("devices are turned away: %s; %d more since the last line", error, self._left_out)
        self._next, self._left_out = now + 1.0, 0


_said = _Seldom()


async def within(seconds: float, threads: CapacityLimiter | None, work: Callable[[float], T]) -> T:
    """Does blocking work in a thread and returns what it returns; raises OperationFailed(SERVER_BUSY) in time.

    `work` is told how many seconds are left when its thread begins, and must change nothing later than that: it goes
    on when nobody waits for it any more.
    """
    deadline = time.monotonic() + seconds
    try:
        async with asyncio.timeout(seconds):
            return await to_thread.run_sync(
                lambda: work(max(0.0, deadline - time.monotonic())), abandon_on_cancel=True, limiter=threads
            )
    except TimeoutError:
        raise OperationFailed(Reason.SERVER_BUSY, f"no answer within {seconds:.0f} s") from None


async def persistently(seconds: float, threads: CapacityLimiter | None, work: Callable[[float], T]) -> T:
    """As `within`, and does work anew that failed because storage did, until `seconds` are over.

    The work must be safe to repeat. Raises its last OperationFailed, or OperationFailed(SERVER_BUSY).
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await within(deadline - time.monotonic(), threads, work)
        except OperationFailed as error:
            pause = _RETRY_S * random.uniform(0.5, 1.5)
            if error.reason is not Reason.STORAGE_FAILED or time.monotonic() + pause >= deadline:
                raise
        await asyncio.sleep(pause)


class _NoRoom(Exception):
    """Too much of one kind is under way."""


class _Room:
    """Takes `places` requests at once; the next wait for `patience` seconds and are turned away."""

    def __init__(self, places: int, patience: float) -> None:
        self._places = places
        self._patience = patience
        self._free = asyncio.Semaphore(places)

    async def enter(self) -> None:
        """Takes a place; raises _NoRoom."""
        if self._free.locked() and not self._patience:
            raise _NoRoom(f"{self._places} are under way")
        try:
            async with asyncio.timeout(self._patience or None):
                await self._free.acquire()
        except TimeoutError:
            raise _NoRoom(f"{self._places} are under way, for {self._patience:.0f} s") from None

    def leave(self) -> None:
        """Gives the place back."""
        self._free.release()
