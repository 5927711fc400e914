"""Objects behind signed URLs: plans and checkpoints down, updates and artifacts up (spec/server.md 2.5)."""

import asyncio
import time
from functools import partial
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.server.api.admission import UPLOAD_S, persistently
from fedcompute.server.api.paths import TemplateRoute, number
from fedcompute.server.context import Context, context_of
from fedcompute.server.security.limits import bounded_stream, declared_length
from fedcompute.server.security.url_signing import BLOB_PREFIX, check_url
from fedcompute.server.tracing import upload_span
from fedcompute.storage.assignments import find_assignment
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import GRADIENT
from fedcompute.storage.schema import AssignmentStatus, TaskStatus
from fedcompute.storage.tasks import get_task

_PATH_PARTS = 6  # the least of every path that is signed for writing (spec/server.md 8)


async def get_blob(request: Request) -> Response:
    """GET of a signed URL: the stored bytes, with `Content-Encoding: gzip` when they are gzip.

    Clients depend on the pair: gzip bytes without the header would reach a device's model as they are.
    """
    bucket, path = _granted(request)
    stream = await context_of(request).blobs.open_stream(bucket, path)
    headers = {"content-length": str(stream.size), "cache-control": "private, no-transform"}
    if stream.content_encoding is not None:
        headers["content-encoding"] = stream.content_encoding
    return StreamingResponse(stream.chunks, media_type="application/octet-stream", headers=headers)


async def put_blob(request: Request) -> Response:
    """PUT of a signed URL: stores the body whole or not at all, answers 200 without a body and may wake the engine."""
    bucket, path = _granted(request)
    if bucket != GRADIENT:
        await _put(request, bucket, path)
        return Response(status_code=200)
    with upload_span(context_of(request), path) as traced:
        traced["bytes"] = await _put(request, bucket, path)
    return Response(status_code=200)


async def _put(request: Request, bucket: str, path: str) -> int:
    """Stores the body; returns its bytes, 0 if it is a repetition that nobody needs."""
    context = context_of(request)
    settings = context.settings
    limit = settings.max_upload_bytes if bucket == GRADIENT else settings.max_checkpoint_bytes
    if declared_length(request) == 0:
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the body is empty")
    chunks = bounded_stream(request, limit)
    still_wanted = partial(_still_wanted, context, bucket, path)
    if not await persistently(UPLOAD_S, context.report_threads, still_wanted):
        # A repetition of an upload that has been collected: its device needs to hear that all is well.
        async for _ in chunks:
            pass
        return 0
    # An update that comes later than that counts no more.
    longest = settings.upload_timeout if bucket == GRADIENT else None
    try:
        async with asyncio.timeout(longest):
            size = await context.blobs.put_stream(bucket, path, chunks, limit)
    except TimeoutError:
        raise RequestRejected(Reason.REQUEST_TOO_SLOW, f"the body did not come within {longest:g} s") from None
    except OperationFailed:
        # Where only the store's answer was lost, the engine may have found the upload there and used it.
        if await persistently(UPLOAD_S, context.report_threads, still_wanted):
            raise
        return 0
    if size == 0:
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the body is empty")
    context.measures.uploaded(size)
    # Without an engine here nobody would take it out again; the one elsewhere looks into the store.
    if bucket == GRADIENT and context.settings.runs_engine:
        folder, session_id, _ = path.rsplit("/", 2)
        if not context.uploads.add(session_id, folder):
            return size
    context.wake()
    return size


def _granted(request: Request) -> tuple[str, str]:
    bucket, path = request.path_params["bucket"], request.path_params["path"]
    check_url(
        context_of(request).url_key,
        # HEAD is answered like GET, and granted with it.
        method="GET" if request.method == "HEAD" else request.method,
        bucket=bucket,
        path=path,
        query=dict(parse_qsl(request.url.query, keep_blank_values=True)),
        headers=dict(request.headers.items()),
        now=time.time(),
    )
    return bucket, path


def _still_wanted(context: Context, bucket: str, path: str, _seconds: float) -> bool:
    """Whether a signed PUT may still write: an update until it is collected, an artifact until its task opens.

    Raises RequestRejected: TASK_CONFLICT for an artifact of a task that is no longer CREATED, MALFORMED_REQUEST for a
    path that is no object's.
    """
    parts = path.split("/")
    if len(parts) < _PATH_PARTS:
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the path names no object of a task")
    population, task_id, result_id, _, session_id, *_ = parts
    task = TaskKey(population, number(task_id, "task"))
    with context.database.read() as tx:
        if bucket == GRADIENT:
            row = find_assignment(tx, task, number(result_id, "iteration"), session_id)
            return row is not None and row.status is AssignmentStatus.LOCAL_COMPLETED
        owner = get_task(tx, task)
    if owner is None or owner.status is not TaskStatus.CREATED:
        raise RequestRejected(
            Reason.TASK_CONFLICT,
            f"task {task} has opened; its artifacts no longer change",
            remedy="create another task and upload there",
        )
    return True


routes = [
    TemplateRoute(f"{BLOB_PREFIX}/{{bucket}}/{{path:path}}", get_blob, methods=["GET"]),
    TemplateRoute(f"{BLOB_PREFIX}/{{bucket}}/{{path:path}}", put_blob, methods=["PUT"]),
]
