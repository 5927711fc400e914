"""Privacy of populations: budgets, the ledger release by release, whether it holds, and the report of a task."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from anyio import to_thread
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from fedcompute.errors import ArtifactInvalid, FedComputeError, Reason, RequestRejected
from fedcompute.monitoring.pages.charts import MOST_POINTS, Chart, Series
from fedcompute.monitoring.pages.rendering import chart_answer, live_page
from fedcompute.monitoring.pages.table import chart, page
from fedcompute.monitoring.task_privacy import PlanFacts
from fedcompute.privacy.budget import Budget, BudgetAssumption, spent_of
from fedcompute.privacy.chain import Entry, verify_chain, verify_events
from fedcompute.privacy.charges import releases
from fedcompute.privacy.ledger_document import Ledger, ledger_document, ledger_from
from fedcompute.server.api.paths import task_key
from fedcompute.server.api.privacy import described_tasks
from fedcompute.server.context import Context, context_of
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.charts import (
    metric_names,
    newest_entries,
    overview_version,
    population_overviews,
    tasks_version,
)
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.releases import LIST_LIMIT, count_entries, ledger_entries
from fedcompute.storage.tasks import get_task, list_tasks

PAGE = 50
_POPULATIONS = 100


async def privacy_page(request: Request) -> Response:
    """What each population has spent."""
    context, query = context_of(request), request.query_params
    return await live_page(request, "privacy.html", partial(_versions, context), partial(_all, context, query))


async def population_privacy_page(request: Request) -> Response:
    """The ledger and budget of one population."""
    name, context, query = str(request.path_params["population"]), context_of(request), request.query_params
    verify = bool(query.get("verify"))
    answer = await live_page(
        request,
        "population_privacy.html",
        partial(_version, context, name),
        partial(_values, context, name, query),
        threads=context.ledger_threads if verify else None,
    )
    if verify:
        # Who asks again wants it looked at again: a changed ledger need not have grown.
        answer.headers["cache-control"] = "no-store"
    return answer


async def privacy_chart(request: Request) -> Response:
    """Epsilon by release, and the budget."""
    name = str(request.path_params["population"])
    return await chart_answer(request, partial(_chart, context_of(request), name))


async def report(request: Request) -> Response:
    """A task's report for a reviewer, complete in itself; recomputing its epsilon may take a minute."""
    key, context = task_key(request), context_of(request)
    text = await to_thread.run_sync(_report, context, key, limiter=context.ledger_threads)
    name = "".join(sign if sign.isalnum() else "_" for sign in f"privacy_{key.population}_{key.task_id}")
    return HTMLResponse(text, headers={"content-disposition": f'attachment; filename="{name}.html"'})


def _versions(context: Context) -> str:
    with context.database.read() as tx:
        return overview_version(tx)


def _version(context: Context, name: str) -> str:
    with context.database.read() as tx:
        newest = newest_entries(tx, name, limit=1)
        return repr((newest and newest[0].sequence, tasks_version(tx, name)))


def _all(context: Context, query: QueryParams) -> dict[str, Any]:
    with context.database.read() as tx:
        found = population_overviews(tx, after=query.get("after", "")[:64] or None, limit=_POPULATIONS + 1)
    shown = found[:_POPULATIONS]
    return {"populations": shown, "following": shown[-1].name if len(found) > _POPULATIONS else None}


def _values(context: Context, name: str, query: QueryParams) -> dict[str, Any]:
    before = int(text) if (text := query.get("before", "")).isdecimal() and len(text) < 19 else None
    with context.database.read() as tx:
        # One more, so that the oldest shown is checked against the one before it.
        entries = newest_entries(tx, name, before=before, limit=PAGE + 1)
        newest = entries if before is None else newest_entries(tx, name, limit=1)
        budget = budget_of(tx, name)
        counts = count_entries(tx, name)
        tasks = {row.key.task_id: row for row in list_tasks(tx, population=name)}
    if not tasks and not newest and budget is None:
        raise RequestRejected(Reason.NOT_FOUND, f"there is no population {name}")
    last = newest[0] if newest else None
    spent = _spent(context, name, budget)
    whole = bool(query.get("verify"))
    return {
        "population": name,
        "entries": entries[:PAGE],
        "older": entries[PAGE - 1].sequence if len(entries) > PAGE else None,
        "before": before,
        "last": last,
        "budget": budget,
        "spent": None if spent == math.inf else spent,
        "left": None if budget is None or spent is None else max(0.0, budget.epsilon - spent),
        "counts": counts,
        "tasks": tasks,
        "multiplier": lambda entry: (entry.event or {}).get("noise_multiplier"),
        "whole": whole,
        "problems": _whole(context, name) if whole else _following(entries),
        "announcement": f"{last.sequence if last else 0} entries",
    }


def _spent(context: Context, name: str, budget: Budget | None) -> float | None:
    """What counts against the budget: at its delta, under its assumption; entries tell epsilon at their plans' delta.

    Infinite where something was released without noise; None without a budget, and if an entry cannot be read.
    """
    if budget is None:
        return None
    try:
        with context.database.read() as tx:
            spending = context.accounts.spending(tx, name)
        return spent_of(budget, releases(spending.spent))
    except ArtifactInvalid:
        # The page says so of the ledger.
        return None


def _following(entries: Sequence[Entry]) -> list[str]:
    """What is wrong with the entries that are shown; `entries`: those, newest first, and the one before them."""
    after = entries[PAGE] if len(entries) > PAGE else None
    return verify_chain(entries[:PAGE][::-1], after=after)


def _whole(context: Context, name: str) -> list[str]:
    """What is wrong with the chain from its first entry to its last."""
    entries = _entries(context, name)
    return verify_chain(entries) + verify_events(entries)


def _entries(context: Context, name: str) -> list[Entry]:
    entries: list[Entry] = []
    while True:
        with context.database.read() as tx:
            found = ledger_entries(tx, name, after=entries[-1].sequence if entries else 0)
        entries += found
        if len(found) < LIST_LIMIT:
            return entries


def _chart(context: Context, name: str) -> Chart:
    with context.database.read() as tx:
        entries = newest_entries(tx, name, limit=MOST_POINTS)[::-1]
        budget = budget_of(tx, name)
    numbers = [one.sequence for one in entries]
    series = [Series("spent", numbers, [one.cumulative_epsilon for one in entries], colour=3)] if entries else []
    # A line beside epsilons at another delta would say what is not so.
    if budget is not None and entries and _is_comparable(budget, entries):
        series.append(Series("budget", [numbers[0], numbers[-1]], [budget.epsilon] * 2, dashed=True, colour=7))
    delta = f" at delta {entries[-1].delta:g}" if entries else ""
    note = f"The newest {MOST_POINTS:,} entries." if len(entries) == MOST_POINTS and entries[0].sequence > 1 else ""
    empty = "Nothing was released yet."
    return Chart("Epsilon by release", "entry of the ledger", f"epsilon{delta}", series, empty=empty, note=note)


def _is_comparable(budget: Budget, entries: Sequence[Entry]) -> bool:
    return budget.assumption is BudgetAssumption.CLAIMED and {one.delta for one in entries} == {budget.delta}


def _report(context: Context, key: TaskKey) -> str:
    # Here, since both load what only a report needs.
    from fedcompute.monitoring.privacy_page import privacy_page as report_page
    from fedcompute.monitoring.task_privacy import task_privacy

    entries = _entries(context, key.population)
    if not any(entry.task_id == key.task_id for entry in entries):
        detail = f"the ledger of {key.population} has no entry of task {key.task_id}"
        raise RequestRejected(Reason.NOT_FOUND, detail)
    return report_page(task_privacy(_ledger(context, key, entries), key.task_id, facts=_facts(context, key)))


def _ledger(context: Context, key: TaskKey, entries: list[Entry]) -> Ledger:
    with context.database.read() as tx:
        budget, tasks = budget_of(tx, key.population), described_tasks(tx, key.population)
    return ledger_from(ledger_document(key.population, entries, budget, tasks))


def _facts(context: Context, key: TaskKey) -> PlanFacts:
    from fedcompute.monitoring.plan_facts import facts_of

    with context.database.read() as tx:
        row = get_task(tx, key)
        names = {one.key.task_id: tuple(metric_names(tx, one.key)) for one in list_tasks(tx, population=key.population)}
    try:
        plan = context.plans.server_plan(key)
    except FedComputeError:
        return PlanFacts(metric_names=names)
    return facts_of(plan.process, names, row.max_aggregation_size if row else None, has_graphs=plan.has_graphs)


operations = (
    page("/privacy", privacy_page, "privacy"),
    page("/privacy/{population}", population_privacy_page, "population_privacy"),
    page("/privacy/{population}/tasks/{task}/report", report, "privacy_report"),
    chart("/charts/privacy/{population}", privacy_chart, "privacy"),
)
