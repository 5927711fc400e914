"""One connection of the web server: how long it may keep everybody waiting."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds from one answer, or from the beginning, to the head of the next request; and for any of an answer to be taken.
PATIENCE_S = 30.0


class BoundedConnection(H11Protocol):
    """HTTP/1.1 for one client, cut off when nothing moves for `PATIENCE_S`.

    The web server's own time-out ends with the first byte of the next request, so a sender of half a head would hold
    its connection for ever; so would one that sends on after a refusal, and one that does not take its answer. While a
    request is being answered the clock of its body applies (`security.limits`).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seen: tuple[object, int] = (None, 0)
        self._since = self.loop.time()
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

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
