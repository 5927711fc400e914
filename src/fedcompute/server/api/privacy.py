"""What was released about a population's devices, and how much may be: its ledger and its budget, as JSON."""

import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.privacy.ledger_document import budget_document, budget_from, ledger_document
from fedcompute.server.api.acts import audited
from fedcompute.server.api.paths import number
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.security.limits import read_body
from fedcompute.storage.budgets import budget_of, remove_budget, set_budget
from fedcompute.storage.database import Transaction
from fedcompute.storage.releases import count_entries, ledger_entries
from fedcompute.storage.tasks import list_tasks

PAGE = 10_000
_BUDGET_LIMIT = 4096


async def ledger(request: Request) -> JSONResponse:
    """A population's ledger: its entries in their order, its budget, its tasks.

    Pages of at most 10,000 entries: while `next` is not null, the next page begins behind it (`?after={next}`).
    """
    after = number(request.query_params.get("after", "0"), "after")
    limit = number(request.query_params.get("limit", str(PAGE)), "limit")
    if not 1 <= limit <= PAGE:
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"limit {limit} does not lie between 1 and {PAGE}")
    return JSONResponse(await run_in_threadpool(_ledger, context_of(request), _population(request), after, limit))


async def budget(request: Request) -> JSONResponse:
    """A population's privacy budget; null where nothing limits what is released."""
    return JSONResponse({"budget": await run_in_threadpool(_budget, context_of(request), _population(request))})


async def put_budget(request: Request) -> JSONResponse:
    """Sets a population's privacy budget: `{"epsilon": E, "delta": D, "assumption": "CLAIMED"}`.

    It holds from the next release on, also for what has been released already.
    """
    body = await read_body(request, _BUDGET_LIMIT)
    return JSONResponse({"budget": await run_in_threadpool(_put_budget, request, _population(request), body)})


async def delete_budget(request: Request) -> Response:
    """Takes a population's budget away: nothing limits it any more; 404 if nothing did."""
    await run_in_threadpool(_delete_budget, request, _population(request))
    return JSONResponse({"budget": None})


def _population(request: Request) -> str:
    return str(request.path_params["population"])


def _ledger(context: Context, population: str, after: int, limit: int) -> dict[str, Any]:
    with context.database.read() as tx:
        found = ledger_entries(tx, population, after=after, limit=limit + 1)
        page = found[:limit]
        document = ledger_document(population, page, budget_of(tx, population), described_tasks(tx, population))
    return {**document, "next": page[-1].sequence if len(found) > limit else None}


def described_tasks(tx: Transaction, population: str) -> dict[str, dict[str, Any]]:
    """The tasks that a ledger has entries of, by id: how many, and what is known of the task, which they outlive."""
    kinds = {task.key.task_id: task for task in list_tasks(tx, population=population)}
    return {
        str(task_id): {
            "entries": entries,
            "kind": kinds[task_id].kind.name if task_id in kinds else None,
            "status": kinds[task_id].status.name if task_id in kinds else None,
            "reason": kinds[task_id].reason if task_id in kinds else None,
        }
        for task_id, entries in count_entries(tx, population).items()
    }


def _budget(context: Context, population: str) -> dict[str, Any] | None:
    with context.database.read() as tx:
        found = budget_of(tx, population)
    return None if found is None else budget_document(found)


def _put_budget(request: Request, population: str, body: bytes) -> dict[str, Any]:
    try:
        wanted = budget_from(json.loads(body))
    except (ValueError, RecursionError) as cause:
        raise RequestRejected(Reason.BUDGET_INVALID, "the body is no JSON text") from cause
    with audited(request) as tx:
        set_budget(tx, population, wanted, now())
    context_of(request).wake()
    return budget_document(wanted)


def _delete_budget(request: Request, population: str) -> None:
    with audited(request) as tx:
        if not remove_budget(tx, population):
            raise RequestRejected(Reason.NOT_FOUND, f"population {population} has no budget")
