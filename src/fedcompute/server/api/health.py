"""Whether the server lives, and whether it can do its work."""

import time
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fedcompute.server.api.paths import TemplateRoute
from fedcompute.server.context import Context, context_of
from fedcompute.server.readiness import Part, Readiness
from fedcompute.server.security.operators import strangers_come
from fedcompute.storage.blobs import BlobStore
from fedcompute.storage.paths import MODEL

# Task folders are numbers, so this collides with no population of the same name.
_PROBE = "_health/probe"
# A store is charged for by the write; reading is enough in between, until something is wrong.
_WRITE_SECONDS = 10.0


async def healthz(_: Request) -> Response:
    """GET /healthz: the process answers requests."""
    return PlainTextResponse("fedcompute is alive\n")


async def ready(request: Request) -> Response:
    """GET /ready: 200 if database, blob store and, where this server has it, the round engine work; else 503.

    The answer names what does not work, and why where only this machine can ask. It comes within `readiness.PATIENCE_S`
    whatever hangs, and is at most a second old. Storage that can be read and not written, as on a full disk, is noticed
    within `_WRITE_SECONDS`.
    """
    readiness: Readiness = request.app.state.readiness
    problems = await readiness.problems()
    if problems and strangers_come(context_of(request).settings):
        # The reasons hold names of hosts, users and paths.
        problems = dict.fromkeys(problems, "the server's log tells why")
    if problems:
        return JSONResponse({"ready": False, "problems": problems}, status_code=503)
    return PlainTextResponse("fedcompute is ready\n")


def readiness_of(context: Context) -> Readiness:
    """What a server's readiness consists of."""
    parts: dict[str, Part] = {"database": context.database.check, "blobs": _Blobs(context.blobs)}
    if context.settings.runs_engine:
        parts["engine"] = partial(_engine, context)
    return Readiness(parts)


def _engine(context: Context) -> str | None:
    return None if context.is_alive() else "the round engine has not finished a pass for a minute"


class _Blobs:
    """Writes now and then, and after every failure; reads each time."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._written: float | None = None

    def __call__(self) -> str | None:
        written, self._written = self._written, None
        if written is None or time.monotonic() - written >= _WRITE_SECONDS:
            written = time.monotonic()
            self._blobs.put(MODEL, _PROBE, b"ready")
        if self._blobs.get(MODEL, _PROBE, limit=16) != b"ready":
            return "the store returned other bytes than it was given"
        self._written = written
        return None


routes = [
    TemplateRoute("/healthz", healthz, methods=["GET"]),
    TemplateRoute("/ready", ready, methods=["GET"]),
]
