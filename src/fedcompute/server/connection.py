"""One connection of the web server: how long it may keep everybody waiting, and how long its requests' heads may be."""

import asyncio
import json
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedcompute.errors import CATALOGUE, Reason

# Seconds from one answer, or from the beginning, to the head of the next request; and for any of an answer to be taken.
PATIENCE_S = 30.0
# Request line and header lines of one request; a device's certificate chain takes 4-8 KiB (spec/device.md 1.2).
HEAD_BYTES_LIMIT = 64 * 1024
# How long a refused sender may go on: to close at once would take the answer away from one that has not read it.
_LINGER_S = 2.0
_HEAD_TOO_LARGE = 431
# Files that the process may open, less those that database, blobs and workers need.
MOST_CONNECTIONS = max(128, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 256)


class _Seldom(logging.Filter):
    """Lets one line a second through, and every error: whoever sends nonsense must not fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1.0
        return True


_LOG = logging.getLogger(__name__)
_LOG.addFilter(_Seldom())


class BoundedConnection(H11Protocol):
    """HTTP/1.1 for one client, cut off when nothing moves for `PATIENCE_S` or a head exceeds `HEAD_BYTES_LIMIT`.

    The web server's own time-out ends with the first byte of the next request, so a sender of half a head would hold
    its connection for ever; so would one that sends on after a refusal, and one that does not take its answer. While a
    request is being answered the clock of its body applies (`security.limits`). Beyond `MOST_CONNECTIONS` whoever owes
    the server something and has said nothing for the longest time makes room for the next one.

    What is no HTTP/1.1 is answered with a typed error and its length, never passed on, and ends the connection: nobody
    can hide a second request in it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = self._parser = _Parser()
        self.logger = _LOG
        self._seen: tuple[object, int] = (None, 0)
        self._since = self._heard = self.loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()
        if len(self.connections) > MOST_CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        if not self._refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuses what the parser could not take: 431 for a head that is too large, 400 for all else."""
        self._refused = True
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # An answer is on its way; a second one would be taken for that of another request.
            self.transport.abort()
            return
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        for event in _refusal(self._parser.refused == _HEAD_TOO_LARGE):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _make_room(self) -> None:
        others = (one for one in self.connections if isinstance(one, BoundedConnection) and one is not self)
        awaited = [one for one in others if one.cycle is None or one.cycle.response_complete or one.cycle.more_body]
        if awaited:
            min(awaited, key=lambda one: one._heard).transport.abort()
        else:
            self.transport.abort()

    def _look(self) -> None:
        untaken = self.transport.get_write_buffer_size()
        answering = self.cycle is not None and not self.cycle.response_complete
        seen = (self.cycle, untaken)
        if (answering and not untaken) or seen != self._seen:
            self._since = self.loop.time()
        elif self.loop.time() - self._since >= PATIENCE_S:
            self.transport.abort()
            return
        self._seen = seen
        self._watch = self.loop.call_later(PATIENCE_S / 4, self._look)


def _refusal(head_too_large: bool) -> list[h11.Event]:
    if head_too_large:
        reason, detail = Reason.HEADERS_TOO_LARGE, f"more than {HEAD_BYTES_LIMIT} bytes of request line and headers"
        remedy = CATALOGUE[reason].remedy
    else:
        reason, detail = Reason.MALFORMED_REQUEST, "this is not HTTP/1.1"
        remedy = "send requests as RFC 9112 has them"
    body = json.dumps({"code": reason.value, "message": detail, "remedy": remedy}).encode()
    length = str(len(body))
    headers = [("content-type", "application/json"), ("content-length", length), ("connection", "close")]
    head = h11.Response(status_code=CATALOGUE[reason].status, headers=headers)
    return [head, h11.Data(data=body), h11.EndOfMessage()]


class _Parser(h11.Connection):
    """The parser of one connection, which counts what belongs to a head, however it arrives.

    h11 itself counts only while a head is incomplete: one that comes in a single read has no limit there.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES_LIMIT)
        self.refused: int | None = None  # the status that fits what ended this connection
        self._received = 0
        self._head_began = 0  # bytes received before the present request

    def receive_data(self, data: bytes) -> None:
        self._received += len(data)
        super().receive_data(data)

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self._head_began = self._parsed

    def next_event(self) -> Any:
        in_head = self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            # The parser has one limit for whatever is incomplete, lines of a chunked body included.
            self.refused = error.error_status_hint if in_head else 400
            raise
        if isinstance(event, h11.Request):
            self._check_head(event)
        return event

    def _check_head(self, request: h11.Request) -> None:
        if self._parsed - self._head_began > HEAD_BYTES_LIMIT:
            self.refused = _HEAD_TOO_LARGE
            raise h11.RemoteProtocolError("head too large", error_status_hint=_HEAD_TOO_LARGE)
        names = {name for name, _ in request.headers}
        if names >= {b"content-length", b"transfer-encoding"}:
            # Two lengths: another server on the way may have believed the other one (RFC 9112, 6.3).
            self.refused = 400
            raise h11.RemoteProtocolError("two lengths")

    @property
    def _parsed(self) -> int:
        return self._received - len(self.trailing_data[0])
