"""The chained ledger, budgets of populations, and why a task ended.

Entries of the first schema keep what they say and are chained in their order: by time, task and round. How their
devices were assumed to come was not stored then: they have no claim, count as NO_AMPLIFICATION, and their cumulative
epsilon stays empty, because accounting does not belong into an upgrade. Completed rounds that the first schema had no
entry for get one: models without noise as such, and metrics, both with the report goal as their number of
contributions, which was not stored. Numbers, text and hashes are made here once
more, so that a later change of the code cannot change what this upgrade writes.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_DELTA = 1e-6
_TASK = ("population_name", "task_id")
_COMPLETED, _TRAINING = 50, 1
_NO_NOISE = {"class": "GaussianDpEvent", "noise_multiplier": 0.0}
_SINGLE = {"GaussianDpEvent": "FIXED_GAUSSIAN", "TreeAggregationStep": "TREE_AGGREGATION"}
_COMPOSED = {"GaussianDpEvent": "ADAPTIVE_GAUSSIAN", "TreeAggregationStep": "ADAPTIVE_TREE"}


def upgrade() -> None:
    op.add_column("task", sa.Column("reason", _name(64), nullable=True))
    op.create_table(
        "privacy_budget",
        sa.Column("population_name", _name(64), nullable=False),
        sa.Column("epsilon", sa.Float(precision=53), nullable=False),
        sa.Column("delta", sa.Float(precision=53), nullable=False),
        sa.Column("assumption", _name(32), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("population_name", name=op.f("pk_privacy_budget")),
    )
    rows = [*_old_entries(), *_unentered_releases()]
    rows.sort(key=lambda row: [row[name] for name in ("population_name", "created_time", "task_id", "iteration_id")])
    op.drop_table("privacy_ledger")
    ledger = op.create_table(
        "privacy_ledger",
        sa.Column("population_name", _name(64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), nullable=False),
        sa.Column("released", _name(16), nullable=False),
        sa.Column("mechanism", _name(32), nullable=False),
        sa.Column("event", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("claim", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("clip_norm", sa.Float(precision=53), nullable=True),
        sa.Column("report_goal", sa.BigInteger(), nullable=False),
        sa.Column("contributions", sa.BigInteger(), nullable=False),
        sa.Column("cumulative_epsilon", sa.Float(precision=53), nullable=True),
        sa.Column("delta", sa.Float(precision=53), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("previous_hash", _name(64), nullable=False),
        sa.Column("hash", _name(64), nullable=False),
        sa.PrimaryKeyConstraint("population_name", "sequence", name=op.f("pk_privacy_ledger")),
    )
    op.create_index(
        "uq_privacy_ledger_release",
        "privacy_ledger",
        ["population_name", "task_id", "iteration_id", "released"],
        unique=True,
    )
    if rows:
        op.bulk_insert(ledger, _chained(rows))


def _name(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _old_entries() -> list[dict[str, Any]]:
    old = sa.table(
        "privacy_ledger",
        sa.column("population_name", sa.String()),
        sa.column("task_id", sa.BigInteger()),
        sa.column("iteration_id", sa.BigInteger()),
        sa.column("event", sa.JSON()),
        sa.column("clip_norm", sa.Float(53)),
        sa.column("report_goal", sa.BigInteger()),
        sa.column("contributions", sa.BigInteger()),
        sa.column("created_time", sa.DateTime(timezone=True)),
    )
    return [dict(row) for row in op.get_bind().execute(sa.select(old)).mappings()]


def _unentered_releases() -> list[dict[str, Any]]:
    task = sa.table("task", *(sa.column(name) for name in (*_TASK, "kind")))
    iteration = sa.table(
        "iteration",
        *(sa.column(name) for name in (*_TASK, "iteration_id", "status", "report_goal")),
        sa.column("status_time", sa.DateTime(timezone=True)),
    )
    ledger = sa.table("privacy_ledger", *(sa.column(name) for name in (*_TASK, "iteration_id")))
    of_task = sa.and_(*(task.c[name] == iteration.c[name] for name in _TASK))
    of_round = sa.and_(*(ledger.c[name] == iteration.c[name] for name in (*_TASK, "iteration_id")))
    query = (
        sa.select(iteration, task.c.kind, ledger.c.task_id.label("entered"))
        .select_from(iteration.join(task, of_task).outerjoin(ledger, of_round))
        .where(iteration.c.status == _COMPLETED)
    )
    found = []
    for row in op.get_bind().execute(query).mappings():
        release = {name: row[name] for name in (*_TASK, "iteration_id", "report_goal")}
        release |= {"contributions": row["report_goal"], "created_time": row["status_time"], "clip_norm": None}
        if row["kind"] == _TRAINING and row["entered"] is None:
            found.append({**release, "event": _NO_NOISE, "mechanism": "NONE"})
        found.append({**release, "event": None, "released": "metrics", "mechanism": "NONE"})
    return found


def _chained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    heads: dict[str, tuple[int, str]] = {}
    chained = []
    for row in rows:
        sequence, previous = heads.get(row["population_name"], (0, 64 * "0"))
        moment: datetime = row["created_time"]
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        fields = {
            "task_id": row["task_id"],
            "iteration_id": row["iteration_id"],
            "released": row.get("released", "model"),
            "mechanism": row.get("mechanism") or _mechanism(row["event"]),
            "event": row["event"],
            "claim": None,
            "clip_norm": row["clip_norm"],
            "report_goal": row["report_goal"],
            "contributions": row["contributions"],
            "cumulative_epsilon": None,
            "delta": _DELTA,
            "sequence": sequence + 1,
            "previous_hash": previous,
        }
        content = {
            **fields,
            "population": row["population_name"],
            "created": moment.isoformat(timespec="microseconds"),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        digest = hashlib.sha256(text.encode("ascii")).hexdigest()
        heads[row["population_name"]] = (sequence + 1, digest)
        chained.append({**fields, "population_name": row["population_name"], "created_time": moment, "hash": digest})
    return chained


def _mechanism(event: dict[str, Any]) -> str:
    if event.get("class") == "ComposedDpEvent":
        return _COMPOSED.get(event["events"][0]["class"], "ADAPTIVE_GAUSSIAN")
    return _SINGLE.get(event.get("class", ""), "FIXED_GAUSSIAN")
