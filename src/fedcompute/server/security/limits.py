"""Bounds on what a request may send, checked before and while its body is read."""

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from fedcompute.errors import Reason, RequestRejected

# A check-in or report is a few dozen bytes, a task a few kilobytes.
MESSAGE_LIMIT = 64 * 1024
TASK_LIMIT = 1024 * 1024
# A body may be slow, not endless: so many seconds of waiting for it, and one more for every so many bytes.
PATIENCE_S = 60.0
SLOWEST_BYTES_S = 1024


def declared_length(request: Request) -> int | None:
    """Returns the request's Content-Length, or None without one; raises RequestRejected(MALFORMED_REQUEST)."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "content-length is not a number")
    return int(text)


async def bounded_stream(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yields the body's pieces; raises RequestRejected(REQUEST_TOO_LARGE) at the first byte beyond `limit` bytes.

    A declared length beyond the limit is refused before anything is read. Raises RequestRejected(REQUEST_TOO_SLOW)
    once the sender has been waited for longer than its bytes deserve.
    """
    _check_declared(request, limit)
    total, waited = 0, 0.0
    pieces = request.stream()
    while True:
        start = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S + total / SLOWEST_BYTES_S - waited):
                chunk = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _too_slow(total, waited + time.monotonic() - start) from None
        waited += time.monotonic() - start
        total += len(chunk)
        if total > limit:
            raise _too_large(total, limit)
        if chunk:
            yield chunk


async def read_body(request: Request, limit: int) -> bytes:
    """Returns the whole body of at most `limit` bytes; raises as `bounded_stream`."""
    _check_declared(request, limit)
    start, total = time.monotonic(), 0
    pieces: list[bytes] = []
    try:
        # One clock for the whole body: nothing happens between its pieces, so all of the time is waiting.
        async with asyncio.timeout(PATIENCE_S) as clock:
            begun = clock.when()
            async for chunk in request.stream():
                pieces.append(chunk)
                total += len(chunk)
                if total > limit:
                    raise _too_large(total, limit)
                if begun is not None and total > SLOWEST_BYTES_S:
                    clock.reschedule(begun + total / SLOWEST_BYTES_S)
    except TimeoutError:
        raise _too_slow(total, time.monotonic() - start) from None
    return b"".join(pieces)


def _check_declared(request: Request, limit: int) -> None:
    length = declared_length(request)
    if length is not None and length > limit:
        raise _too_large(length, limit)


def _too_slow(total: int, seconds: float) -> RequestRejected:
    return RequestRejected(Reason.REQUEST_TOO_SLOW, f"{total} bytes of the body in {seconds:.0f} s")


def _too_large(size: int, limit: int) -> RequestRejected:
    return RequestRejected(Reason.REQUEST_TOO_LARGE, f"the body has at least {size} bytes; the limit is {limit}")
