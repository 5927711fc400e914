"""Whether the server lives, and whether it can do its work."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedcompute.errors import FedComputeError
from fedcompute.server.context import Context, context_of
from fedcompute.storage.paths import MODEL

# Task folders are numbers, so this collides with no population of the same name.
_PROBE = "_health/probe"


async def healthz(_: Request) -> Response:
    """GET /healthz: the process answers requests."""
    return PlainTextResponse("fedcompute is alive\n")


async def ready(request: Request) -> Response:
    """GET /ready: 200 if database, blob store and round engine work, else 503 with what does not."""
    problems = await run_in_threadpool(_problems, context_of(request))
    if problems:
        return JSONResponse({"ready": False, "problems": problems}, status_code=503)
    return PlainTextResponse("fedcompute is ready\n")


def _problems(context: Context) -> dict[str, str]:
    problems = {}
    try:
        context.database.check()
    except FedComputeError as error:
        problems["database"] = error.detail
    try:
        context.blobs.put(MODEL, _PROBE, b"ready")
        if context.blobs.get(MODEL, _PROBE, limit=16) != b"ready":
            problems["blobs"] = "the store returned other bytes than it was given"
    except FedComputeError as error:
        problems["blobs"] = error.detail
    if not context.is_alive():
        problems["engine"] = "the round engine has not finished a pass for a minute"
    return problems


routes = [
    Route("/healthz", healthz, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
]
