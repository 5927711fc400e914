"""The server's own encryption keys as operators see them, and their rotation ahead of time (spec/server.md 7.2)."""

from datetime import datetime
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.api.acts import audited, name_subject
from fedcompute.server.context import context_of, now
from fedcompute.server.security.keys import rotate_now
from fedcompute.storage.secrets import EncryptionKeyRow, all_keys


async def encryption_keys(request: Request) -> JSONResponse:
    """Every encryption key of this server, newest first, without its private half."""
    return JSONResponse({"encryption_keys": await run_in_threadpool(_listed, request)})


async def rotate(request: Request) -> JSONResponse:
    """Publishes a fresh key and withdraws every other one at once; 409 where an external key service holds the keys."""
    return JSONResponse({"encryption_key": await run_in_threadpool(_rotate, request)})


def _listed(request: Request) -> list[dict[str, Any]]:
    context = context_of(request)
    with context.database.read() as tx:
        return [_document(row, now()) for row in all_keys(tx, context.sealer)]


def _rotate(request: Request) -> dict[str, Any]:
    context = context_of(request)
    if context.key_list is not None:
        raise RequestRejected(Reason.KEYS_HELD_ELSEWHERE, "an external key service holds this server's keys")
    with audited(request) as tx:
        row = rotate_now(tx, context.sealer, context.settings, now())
        name_subject(request, row.id)
    return _document(row, now())


def _document(row: EncryptionKeyRow, moment: datetime) -> dict[str, Any]:
    return {
        "id": row.id,
        "published": moment < row.published_until,
        "created": row.created.isoformat(),
        "published_until": row.published_until.isoformat(),
        "expires": row.expires.isoformat(),
    }
