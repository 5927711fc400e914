"""Enrolments over HTTP: who may answer challenges with a secret, for operators away from the server's own prompt."""

import base64
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.api.acts import audited, name_subject
from fedcompute.server.api.messages import read_document
from fedcompute.server.api.paging import Page, page_of
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.security.enrolment import MOST_AT_ONCE, new_enrolment
from fedcompute.storage.enrolments import (
    EnrolmentRow,
    NewEnrolment,
    create_enrolment,
    list_enrolments,
    revoke_enrolment,
)

_LIMIT = 4096
_PAGE = 100
_LONGEST_PAGE = 1000


async def enrolments(request: Request) -> JSONResponse:
    """Every enrolment, without its secret, revoked ones included."""
    page = page_of(request, usual=_PAGE, most=_LONGEST_PAGE)
    return JSONResponse(await run_in_threadpool(_listed, context_of(request), page))


async def create(request: Request) -> JSONResponse:
    """Enrols devices: `{"label": L, "count": N}`, N optional; only this answer holds their secrets, in base64."""
    label, count = _wanted(await read_document(request, limit=_LIMIT))
    made = await run_in_threadpool(_create, request, label, count)
    listed = [enrolment_document(row) | {"secret": base64.b64encode(new.secret).decode()} for row, new in made]
    return JSONResponse({"enrolments": listed}, status_code=201, headers={"cache-control": "no-store"})


async def revoke(request: Request) -> JSONResponse:
    """Ends an enrolment and every token it was granted, at once and for good; 404 if no live one has that id."""
    await run_in_threadpool(_revoke, request, str(request.path_params["enrolment"]))
    return JSONResponse({"revoked": request.path_params["enrolment"]})


def enrolment_document(row: EnrolmentRow) -> dict[str, Any]:
    """An enrolment as JSON, without its secret."""
    return {
        "id": row.id,
        "label": row.label,
        "created": row.created.isoformat(),
        "revoked": row.revoked.isoformat() if row.revoked else None,
    }


def _listed(context: Context, page: Page) -> dict[str, Any]:
    with context.database.read() as tx:
        rows = list_enrolments(tx, after=page.after, limit=page.limit + 1)
    listed = [enrolment_document(row) for row in rows[: page.limit]]
    return {"enrolments": listed, "next": rows[page.limit - 1].id if len(rows) > page.limit else None}


def _wanted(document: dict[str, Any]) -> tuple[str, int]:
    label, count = document.get("label"), document.get("count", 1)
    if not isinstance(label, str):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "an enrolment needs a label", remedy="send a label")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_AT_ONCE:
        detail = f"count is a whole number from 1 to {MOST_AT_ONCE}"
        raise RequestRejected(Reason.MALFORMED_REQUEST, detail, remedy="correct what the message names")
    return label, count


def _create(request: Request, label: str, count: int) -> list[tuple[EnrolmentRow, NewEnrolment]]:
    context, moment = context_of(request), now()
    news = [new_enrolment(label) for _ in range(count)]
    with audited(request) as tx:
        made = [(create_enrolment(tx, context.sealer, new, moment), new) for new in news]
        name_subject(
            request, f"{news[0].id} ({label}) and {count - 1} more" if count > 1 else f"{news[0].id} ({label})"
        )
    return made


def _revoke(request: Request, enrolment_id: str) -> None:
    with audited(request) as tx:
        if not revoke_enrolment(tx, enrolment_id, now()):
            raise RequestRejected(Reason.NOT_FOUND, "there is no live enrolment of that id")
