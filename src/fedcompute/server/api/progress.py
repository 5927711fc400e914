"""How far a task is: its rounds under way, how fast contributions come, and how fast rounds end."""

from datetime import datetime
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedcompute.server.api.paths import task_key
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context, context_of, now
from fedcompute.storage.assignments import count_assignments
from fedcompute.storage.iterations import IterationRow, active_iterations
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.releases import CompletedIteration, completed_iterations
from fedcompute.storage.schema import ACTIVE_TASK, AssignmentStatus
from fedcompute.storage.tasks import get_task

# The pace is that of so many rounds; older ones say little about now.
_RECENT = 10


async def progress(request: Request) -> JSONResponse:
    """A task's status and for how long it has had it, its rounds under way, its pace, and when it may be done.

    `contributions` are uploads that have arrived; `contributions_per_minute` is their rate since the round opened;
    `rounds_per_hour` that of the latest ten released rounds; what cannot be told yet is null.
    """
    return JSONResponse(await run_in_threadpool(_progress, context_of(request), task_key(request), now()))


def _progress(context: Context, key: TaskKey, moment: datetime) -> dict[str, Any]:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        released = completed_iterations(tx, key)
        under_way = [(one, count_assignments(tx, one.key)) for one in active_iterations(tx, key)]
    pace = _rounds_per_second(released)
    left = row.total_iteration - len(released)
    active = row.status in ACTIVE_TASK
    return {
        "population": key.population,
        "task_id": key.task_id,
        "status": row.status.name,
        "reason": row.reason,
        "seconds_in_status": _seconds(row.entered, moment),
        "rounds_completed": len(released),
        "rounds_total": row.total_iteration,
        "rounds": [_round(one, counts, moment) for one, counts in under_way],
        "rounds_per_hour": None if pace is None else 3600 * pace,
        "seconds_left": left / pace if active and pace else None,
        "last_release": released[-1].completed.isoformat() if released else None,
    }


def _round(row: IterationRow, counts: dict[AssignmentStatus, int], moment: datetime) -> dict[str, Any]:
    arrived = counts.get(AssignmentStatus.UPLOAD_COMPLETED, 0)
    open_for = _seconds(row.created, moment)
    return {
        "iteration_id": row.key.iteration_id,
        "attempt_id": row.key.attempt_id,
        "status": row.status.name,
        "seconds_in_status": _seconds(row.entered, moment),
        "seconds_open": open_for,
        "report_goal": row.report_goal,
        "contributions": arrived,
        "assignments": {status.name: count for status, count in sorted(counts.items()) if count},
        "contributions_per_minute": 60 * arrived / open_for if open_for else None,
        "expires": row.expires.isoformat() if row.expires else None,
    }


def _rounds_per_second(released: list[CompletedIteration]) -> float | None:
    recent = sorted(one.completed for one in released)[-_RECENT:]
    span = (recent[-1] - recent[0]).total_seconds() if recent else 0.0
    return (len(recent) - 1) / span if span > 0 else None


def _seconds(since: datetime, moment: datetime) -> float:
    return max(0.0, (moment - since).total_seconds())
