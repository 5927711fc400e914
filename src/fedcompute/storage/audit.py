"""The audit log: who changed what, over HTTP or at the server's own prompt, and with what outcome."""

import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, insert, select

from fedcompute.storage import schema
from fedcompute.storage.api_keys import without_keys
from fedcompute.storage.database import Transaction

LIST_LIMIT = 1000
# Who was refused before a name was known.
ANONYMOUS, NO_ROLE = "anonymous", "none"
_TABLE = schema.audit_log
_LENGTHS = {"actor": 64, "role": 16, "action": 64, "subject": 256, "request_id": 64}


@dataclass(frozen=True)
class Act:
    """What somebody did or tried: names and codes only, never a secret.

    `actor`: a key's id and label, `loopback` for this machine without a key, `prompt` for a command on the server's own
    data, `anonymous` for who was refused before a name was known. `subject`: what it was done to. `status`: the HTTP
    status of the answer. `request_id`: as in the log and in the answer's `x-request-id`; empty at the prompt.
    """

    actor: str
    role: str
    action: str
    subject: str
    status: int
    request_id: str


@dataclass(frozen=True)
class AuditRow:
    """An act as stored; ids sort by time."""

    id: str
    created: datetime
    act: Act


def record(tx: Transaction, act: Act, now: datetime) -> None:
    """Adds an act to the log, in the transaction of the change itself if `tx` is the one that makes it.

    Text that is too long is cut, and what cannot be printed becomes `?`, so that an act of a hostile name is one line.
    Of an API key that somebody took for a name only the id is kept.
    """
    row_id = f"{_time_part(now)}{secrets.token_hex(8)}"
    texts = {name: _printable(getattr(act, name), length) for name, length in _LENGTHS.items()}
    tx.execute(insert(_TABLE).values(id=row_id, created_time=now, status=act.status, **texts))


def list_acts(tx: Transaction, *, after: str | None = None, limit: int = LIST_LIMIT) -> list[AuditRow]:
    """Acts, newest first, at most `limit`; `after` is the last id of the page before."""
    query = select(_TABLE).order_by(_TABLE.c.id.desc()).limit(limit)
    if after is not None:
        query = query.where(_TABLE.c.id < after)
    return [_row(row) for row in tx.execute(query)]


def forget_strangers(tx: Transaction, before: datetime) -> int:
    """Forgets refusals, of the time before `before`, of callers who showed no name; returns how many.

    Everybody who reaches the server can add such rows, for as long as they like.
    """
    old = _TABLE.c.id < _time_part(before)
    return tx.execute(delete(_TABLE).where(old, _TABLE.c.actor == ANONYMOUS, _TABLE.c.role == NO_ROLE)).rowcount


def _time_part(moment: datetime) -> str:
    return f"{int(moment.timestamp() * 1_000_000):016x}"


def _printable(text: str, length: int) -> str:
    return "".join(one if one.isprintable() else "?" for one in without_keys(text)[:length])


def _row(row: Row[Any]) -> AuditRow:
    return AuditRow(
        row.id,
        row.created_time,
        Act(row.actor, row.role, row.action, row.subject, row.status, row.request_id),
    )
