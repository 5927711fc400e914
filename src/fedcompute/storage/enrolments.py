"""Enrolments: devices that prove with a secret of their own who they are; the secrets are stored sealed."""

from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import insert, select, update

from fedcompute.crypto.sealing import Sealer, place
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction

LIST_LIMIT = 100_000


@dataclass(frozen=True)
class EnrolmentRow:
    """One enrolment without its secret; `revoked` is when it ended, None while it holds."""

    id: str
    label: str
    created: datetime
    revoked: datetime | None


@dataclass(frozen=True)
class NewEnrolment:
    """An enrolment to be stored. `secret`: random bytes that the device is given once."""

    id: str
    label: str
    secret: bytes = field(repr=False)


def create_enrolment(tx: Transaction, sealer: Sealer, new: NewEnrolment, now: datetime) -> EnrolmentRow:
    """Stores an enrolment under its id, which must be new; the secret sealed."""
    table = schema.enrolment
    sealed, sealed_with = sealer.seal(place(table.name, new.id), new.secret)
    values = {"id": new.id, "label": new.label, "secret": sealed, "sealed_with": sealed_with, "created": now}
    tx.execute(insert(table).values(values))
    return EnrolmentRow(new.id, new.label, now, None)


def enrolment_secret(tx: Transaction, sealer: Sealer, enrolment_id: str) -> bytes | None:
    """The secret of an enrolment that holds; None if it is unknown or revoked.

    Raises ArtifactInvalid(SECRET_UNREADABLE) if it was sealed with another operator secret.
    """
    table = schema.enrolment
    query = select(table).where(table.c.id == enrolment_id, table.c.revoked.is_(None))
    row = tx.execute(query).one_or_none()
    return None if row is None else sealer.open(place(table.name, row.id), bytes(row.secret), row.sealed_with)


def list_enrolments(tx: Transaction, *, after: str | None = None, limit: int = LIST_LIMIT) -> list[EnrolmentRow]:
    """At most `limit` enrolments, revoked ones included, by id; those after the id `after`."""
    table = schema.enrolment
    query = select(table.c.id, table.c.label, table.c.created, table.c.revoked).order_by(table.c.id).limit(limit)
    rows = tx.execute(query if after is None else query.where(table.c.id > after))
    return [EnrolmentRow(row.id, row.label, row.created, row.revoked) for row in rows]


def revoke_enrolment(tx: Transaction, enrolment_id: str, now: datetime) -> bool:
    """Ends an enrolment and with it every token it was granted; False if there is no live one of that id."""
    table = schema.enrolment
    live = (table.c.id == enrolment_id) & table.c.revoked.is_(None)
    return tx.execute(update(table).where(live).values(revoked=now)).rowcount == 1
