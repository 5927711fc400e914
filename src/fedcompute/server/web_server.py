"""The HTTP server's process: how it listens with TLS, and how it ends."""

import gc
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from fedcompute.server.tls import Certificate

_LOG = logging.getLogger(__name__)
# How long the application's own end may take, after the grace of the requests: a database that hangs must not keep it.
_LONGEST_END = 30.0
# A terminal, a supervisor and a wrapper may all pass on one signal.
_SAME_SIGNAL_SECONDS = 0.2
# New objects between two looks for garbage; a request makes a few hundred, and hardly any in circles.
_COLLECT_AFTER = 10_000


class WebServer(uvicorn.Server):
    """Ends at the first SIGINT or SIGTERM in good order, at the second at once.

    In good order: no connection is taken any more, requests under way get their answers within the grace, the
    application ends. After that `run` returns, whatever the signal was. At once is safe too: everything stored is
    whole at any moment, and worker processes leave with this one.
    """

    def __init__(self, config: uvicorn.Config, certificate: Certificate | None = None) -> None:
        super().__init__(config)
        self._stopped_at: float | None = None
        if certificate is not None:
            config.load()
            config.ssl = certificate.context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM; not remembered, since the library would end the process by them afterwards."""
        moment = time.monotonic()
        if self._stopped_at is None:
            self._stopped_at = moment
            self.should_exit = True
            # The library's type of the grace is narrower than what it takes.
            grace = self.config.timeout_graceful_shutdown or 0
            overdue = threading.Timer(grace + _LONGEST_END, _give_up)
            overdue.daemon = True
            overdue.start()
        elif moment - self._stopped_at > _SAME_SIGNAL_SECONDS:
            _leave(sig)


def keep_what_started() -> None:
    """Takes what a start has left (modules, routes, schemas) out of the garbage collector's sight, once.

    It lives as long as the process does. Looking through it again and again takes a third of a busy server's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 50)


def _give_up() -> None:
    _LOG.error("the server could not stop in good order and is ended; nothing stored is lost")
    _leave(signal.SIGTERM)


def _leave(sig: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        _quietly_flush(stream)
    os._exit(128 + signal.Signals(sig).value)


def _quietly_flush(stream: Any) -> None:
    try:
        stream.flush()
    except (OSError, ValueError, RuntimeError):
        # A closed pipe, or a write that the signal interrupted.
        return
