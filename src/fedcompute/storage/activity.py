"""What goes on right now over all populations, and the rows that lists of populations begin with."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import case, func, select

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import ACTIVE_TASK, RELEASED_ITERATION, AssignmentStatus
from fedcompute.storage.tasks import TaskRow, task_row

_WORKING = (AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED)


@dataclass(frozen=True)
class Activity:
    """Populations, active tasks, rounds that were released lately, and devices that hold an assignment."""

    populations: int
    active_tasks: int
    released: int
    working: int


def activity(tx: Transaction, since: datetime) -> Activity:
    """Counts over everything there is; `released` from `since` on."""
    task, iteration, assignment = schema.task, schema.iteration, schema.assignment
    populations, active = tx.execute(
        select(
            func.count(task.c.population_name.distinct()),
            func.sum(case((task.c.status.in_([int(one) for one in ACTIVE_TASK]), 1), else_=0)),
        )
    ).one()
    released = select(func.count()).where(
        iteration.c.status.in_([int(one) for one in RELEASED_ITERATION]), iteration.c.status_time >= since
    )
    working = select(func.count()).where(assignment.c.status.in_([int(one) for one in _WORKING]))
    return Activity(
        populations=populations,
        active_tasks=int(active or 0),
        released=tx.execute(released).scalar_one(),
        working=tx.execute(working).scalar_one(),
    )


def leading_tasks(tx: Transaction, population: str, *, limit: int) -> list[TaskRow]:
    """A population's active tasks, then the others; of each the newest first."""
    table = schema.task
    active = case((table.c.status.in_([int(one) for one in ACTIVE_TASK]), 0), else_=1)
    query = select(table).where(table.c.population_name == population).order_by(active, table.c.task_id.desc())
    return [task_row(row) for row in tx.execute(query.limit(limit))]


def rounds_opened(tx: Transaction, task: TaskKey, since: datetime, *, limit: int) -> list[tuple[int, datetime]]:
    """The newest `limit` rounds of a task that opened from `since` on, and when their first attempts did; ascending."""
    table = schema.iteration
    opened = func.min(table.c.created_time).label("opened")
    query = (
        select(table.c.iteration_id, opened)
        .where(schema.of_task(table, task))
        .group_by(table.c.iteration_id)
        .having(opened >= since)
        .order_by(table.c.iteration_id.desc())
        .limit(limit)
    )
    return [(row.iteration_id, row.opened) for row in reversed(tx.execute(query).all())]
