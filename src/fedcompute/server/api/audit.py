"""The audit log over HTTP."""

from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute.server.api.paging import Page, page_of
from fedcompute.server.context import Context, context_of
from fedcompute.storage.audit import AuditRow, list_acts

PAGE = 100
LONGEST_PAGE = 1000


async def audit(request: Request) -> JSONResponse:
    """What operators have changed or tried to change, newest first: who, what, on what, with what status, when."""
    page = page_of(request, usual=PAGE, most=LONGEST_PAGE)
    return JSONResponse(await run_in_threadpool(_acts, context_of(request), page))


def act_document(row: AuditRow) -> dict[str, Any]:
    """An act as JSON."""
    return {"id": row.id, "time": row.created.isoformat(), **asdict(row.act)}


def _acts(context: Context, page: Page) -> dict[str, Any]:
    with context.database.read() as tx:
        rows = list_acts(tx, after=page.after, limit=page.limit + 1)
    listed = [act_document(row) for row in rows[: page.limit]]
    return {"acts": listed, "next": rows[page.limit - 1].id if len(rows) > page.limit else None}
