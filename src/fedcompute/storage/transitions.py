"""How every status changes: a conditional update of the main row, and its history, in one transaction.

The update takes the row's lock and asks for the old status under it, so of two racers one changes the row and the other
changes nothing; there is no read before it whose answer could be stale (spec/server.md 4.5, lessons C7 and C9).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, insert, select, update

from fedcompute.storage import schema


@dataclass(frozen=True)
class Machine:
    """A main table, its history, their common key, and the columns that a history row repeats."""

    table: Table
    history: Table
    key: tuple[str, ...]
    logged: tuple[str, ...] = ()
    first_status_id: int = 1


TASK = Machine(schema.task, schema.task_status_history, schema.TASK_COLUMNS, first_status_id=0)
ITERATION = Machine(schema.iteration, schema.iteration_status_history, schema.ITERATION_COLUMNS, ("aggregation_level",))
ASSIGNMENT = Machine(
    schema.assignment, schema.assignment_status_history, schema.ASSIGNMENT_COLUMNS, ("batch_id", "rejection")
)
BATCH = Machine(
    schema.aggregation_batch,
    schema.aggregation_batch_status_history,
    schema.BATCH_COLUMNS,
    ("aggregation_level", "created_by_partition", "aggregated_by", "accepted_size"),
)


def enter(tx: Connection, machine: Machine, values: Mapping[str, Any], status: IntEnum, now: datetime) -> None:
    """Inserts a main row in its first status, with its first history row.

    Raises `sqlalchemy.exc.IntegrityError` if the key is taken; callers that go on afterwards use a savepoint.
    """
    enter_all(tx, machine, [values], status, now)


def enter_all(
    tx: Connection, machine: Machine, values: Sequence[Mapping[str, Any]], status: IntEnum, now: datetime
) -> None:
    """As `enter`, for rows that all have the same columns; at least one."""
    first = {"status": int(status), "status_id": machine.first_status_id, "status_time": now, "created_time": now}
    rows = [{**one, **first} for one in values]
    tx.execute(insert(machine.table), rows)
    tx.execute(insert(machine.history), [_history(machine, row) for row in rows])


def move(
    tx: Connection,
    machine: Machine,
    where: Sequence[ColumnElement[bool]],
    old: IntEnum,
    new: IntEnum,
    now: datetime,
    **changes: Any,
) -> list[RowMapping]:
    """Moves every row that fits `where` and has status `old`; returns each one's key, status and logged columns.

    Locks several rows in the order of their keys, so that two transactions never wait for each other.
    """
    table = machine.table
    condition = [*where, table.c.status == int(old)]
    if tx.dialect.name == "postgresql":
        # An update alone would lock them in the order in which it comes upon them.
        key = [table.c[name] for name in machine.key]
        tx.execute(select(*key).where(*condition).order_by(*key).with_for_update(key_share=True))
    moved = (
        tx.execute(
            update(table)
            .where(*condition)
            .values(status=int(new), status_id=table.c.status_id + 1, status_time=now, **changes)
            .returning(
                *[table.c[name] for name in (*machine.key, "status_id", "status", "status_time", *machine.logged)]
            )
        )
        .mappings()
        .all()
    )
    if moved:
        tx.execute(
            insert(machine.history), [_history(machine, {**row, "created_time": row["status_time"]}) for row in moved]
        )
    return list(moved)


def _history(machine: Machine, row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {name: row[name] for name in (*machine.key, "status_id", "status", "created_time")}
    return columns | {name: row.get(name) for name in machine.logged}
