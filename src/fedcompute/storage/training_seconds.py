"""How long the devices of a round trained, one by one."""

from datetime import datetime, timedelta

from sqlalchemy import func, select

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import AssignmentStatus

_STEPS = (AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED)


def training_seconds(tx: Transaction, task: TaskKey, iteration_id: int, *, limit: int = 20_000) -> list[float]:
    """Seconds from ASSIGNED to LOCAL_COMPLETED of each session of a round, of any attempt, that has both.

    Looks at the first `limit` sessions by their ids, which are drawn at random.
    """
    history = schema.assignment_status_history
    query = (
        select(history.c.session_id, history.c.status, func.min(history.c.created_time))
        .where(
            schema.of_task(history, task),
            history.c.iteration_id == iteration_id,
            history.c.status.in_([int(status) for status in _STEPS]),
        )
        .group_by(history.c.session_id, history.c.status)
        .order_by(history.c.session_id, history.c.status)
        .limit(len(_STEPS) * limit)
    )
    begins: dict[str, datetime] = {}
    found = []
    for session, status, moment in tx.execute(query):
        if status == _STEPS[0]:
            begins[session] = moment
        elif session in begins:
            found.append((moment - begins[session]) / timedelta(seconds=1))
    return found
