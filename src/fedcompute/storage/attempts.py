"""Another attempt at a round: what the devices gave stays with the round (spec/server.md 4.2, lessons G8).

Minimum separation bars the devices of a failed attempt from the next one, so whatever they sent is taken over. The wire
names a round without its attempt; devices that are still at work never notice.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, delete, insert, select

from fedcompute.errors import Reason
from fedcompute.storage import schema, transitions
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import AGGREGATION_LEVELS, move_iteration
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.schema import AssignmentStatus, BatchStatus, IterationStatus
from fedcompute.storage.transitions import Machine

# They hold a place, or count already.
_TAKEN_OVER = (AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED, AssignmentStatus.UPLOAD_COMPLETED)
_LIVE_BATCHES = (BatchStatus.FULL, BatchStatus.PUBLISH_COMPLETED, BatchStatus.UPLOAD_COMPLETED)
_CHUNK = 500


def open_attempt(
    tx: Transaction,
    key: IterationKey,
    *,
    old: IterationStatus,
    ended: IterationStatus,
    into: IterationStatus,
    reason: Reason,
    now: datetime,
    expires: datetime | None = None,
    dissolve: Collection[str] = (),
) -> IterationKey | None:
    """Ends an attempt, `old` -> `ended` for `reason`, and opens the next one in `into`; None if it was not `old`.

    Assignments that hold a place, and live batches, go over as they are. Batches named in `dissolve` fail with the old
    attempt, and their members wait, uploaded, to be put into others.
    """
    lock_population(tx, key.population)
    table = schema.iteration
    row = tx.execute(select(table).where(schema.of_iteration(table, key))).mappings().one_or_none()
    if row is None or not move_iteration(tx, key, old, ended, now, reason=reason):
        return None
    new = IterationKey(key.population, key.task_id, key.iteration_id, key.attempt_id + 1)
    fresh = {
        "attempt_id": new.attempt_id,
        "aggregation_level": AGGREGATION_LEVELS[into],
        "expiration_time": expires,
        "reason": None,
        "cleaned_time": None,
        "purged_time": None,
    }
    transitions.enter(tx, transitions.ITERATION, {**row, **fresh}, into, now)
    _dissolve(tx, key, dissolve, now)
    assignments, batches = schema.assignment, schema.aggregation_batch
    for status in _TAKEN_OVER:
        where = [schema.of_iteration(assignments, key), assignments.c.status == int(status)]
        _hand_over(tx, transitions.ASSIGNMENT, "session_id", where, new)
    live = batches.c.status.in_([int(one) for one in _LIVE_BATCHES])
    _hand_over(tx, transitions.BATCH, "batch_id", [schema.of_iteration(batches, key), live], new)
    return new


def _dissolve(tx: Transaction, key: IterationKey, batch_ids: Collection[str], now: datetime) -> None:
    batches, assignments = schema.aggregation_batch, schema.assignment
    for batch_id in sorted(batch_ids):
        where = [schema.of_iteration(batches, key), batches.c.batch_id == batch_id]
        for status in _LIVE_BATCHES:
            transitions.move(tx, transitions.BATCH, where, status, BatchStatus.FAILED, now)
        uploaded = AssignmentStatus.UPLOAD_COMPLETED
        members = [schema.of_iteration(assignments, key), assignments.c.batch_id == batch_id]
        transitions.move(tx, transitions.ASSIGNMENT, members, uploaded, uploaded, now, batch_id=None)


def _hand_over(
    tx: Transaction, machine: Machine, name: str, where: Sequence[ColumnElement[bool]], new: IterationKey
) -> None:
    """Gives rows and their histories another attempt: it is part of their keys, so they are written anew."""
    table = machine.table
    # Reports take no lock but that of their row: one that came first is seen, one that comes later waits.
    held = select(table.c[name]).where(*where).order_by(table.c[name]).with_for_update()
    names = list(tx.execute(held).scalars())
    for start in range(0, len(names), _CHUNK):
        these = names[start : start + _CHUNK]
        rows = _changed(tx, machine.table, name, these, new)
        history = _changed(tx, machine.history, name, these, new)
        # The history goes with the row that it belongs to.
        tx.execute(delete(table).where(schema.of_task(table, new.task), table.c[name].in_(these)))
        tx.execute(insert(table), rows)
        tx.execute(insert(machine.history), history)


def _changed(tx: Transaction, table: Table, name: str, these: Sequence[str], new: IterationKey) -> list[dict[str, Any]]:
    query = select(table).where(schema.of_task(table, new.task), table.c[name].in_(these))
    return [{**row, "attempt_id": new.attempt_id} for row in tx.execute(query).mappings()]
