"""The server's own secrets: HPKE key pairs and named secrets such as the URL signing key (spec/server.md 7.2).

They are stored sealed under the operator secret; `sealed_with` of a row names it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, exists, insert, select, text, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.exc import IntegrityError

from fedcompute.crypto.sealing import ONE_SECRET, Sealer, place
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction

LIST_LIMIT = 1000
_KEYS_LOCK = 0x6665646B657973


@dataclass(frozen=True)
class EncryptionKeyRow:
    """One X25519 key pair: devices are told of it until `published_until`, it decrypts at least until `expires`."""

    id: str
    public_key: bytes
    private_key: bytes = field(repr=False)
    created: datetime
    expires: datetime
    published_until: datetime


def lock_keys(tx: Transaction) -> None:
    """Keeps every other decision about encryption keys waiting until this write transaction ends."""
    if tx.dialect.name == "postgresql":
        tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _KEYS_LOCK})


def insert_key(tx: Transaction, sealer: Sealer, key: EncryptionKeyRow) -> bool:
    """Stores a key pair, its private half sealed; False if the id is taken."""
    sealed, sealed_with = sealer.seal(_key_place(key.id, key.public_key), key.private_key)
    values = {
        "id": key.id,
        "public_key": key.public_key,
        "private_key": sealed,
        "sealed_with": sealed_with,
        "created": key.created,
        "expires": key.expires,
        "published_until": key.published_until,
    }
    try:
        with tx.begin_nested():
            tx.execute(insert(schema.encryption_key).values(**values))
    except IntegrityError:
        return False
    return True


def published_keys(
    tx: Transaction, sealer: Sealer, now: datetime, *, limit: int = LIST_LIMIT
) -> list[EncryptionKeyRow]:
    """The pairs that devices may be told of now, newest first.

    Raises ArtifactInvalid(SECRET_UNREADABLE) if one does not open.

    Formal guarantees: every public key was stored together with its private half by a holder of the operator secret,
    so whoever can write to the database alone cannot make devices encrypt to a key of theirs.
    """
    table = schema.encryption_key
    return _key_rows(tx, sealer, table.c.published_until > now, table.c.expires > now, limit=limit)


def all_keys(tx: Transaction, sealer: Sealer, *, limit: int = LIST_LIMIT) -> list[EncryptionKeyRow]:
    """Every pair that is kept, newest first; raises ArtifactInvalid(SECRET_UNREADABLE) if one does not open."""
    return _key_rows(tx, sealer, limit=limit)


def private_keys(
    tx: Transaction, sealer: Sealer, *, ids: Collection[str] | None = None, limit: int = LIST_LIMIT
) -> dict[str, bytes]:
    """The private keys that are kept, by id, newest first; `ids` narrows them, unknown ids are left out.

    Raises ArtifactInvalid(SECRET_UNREADABLE) if one does not open.
    """
    narrowed = () if ids is None else (schema.encryption_key.c.id.in_(sorted(ids)),)
    return {row.id: row.private_key for row in _key_rows(tx, sealer, *narrowed, limit=limit)}


def withdraw_keys(tx: Transaction, now: datetime, *, keep: str) -> int:
    """Ends the publication of every key but `keep`; returns of how many. They go on decrypting until they expire."""
    table = schema.encryption_key
    return tx.execute(
        update(table).where(table.c.id != keep, table.c.published_until > now).values(published_until=now)
    ).rowcount


def delete_expired_keys(tx: Transaction, now: datetime) -> int:
    """Deletes pairs past their `expires` that no active round needs; returns how many.

    An active round that began before a key expired may hold uploads or sums under it, and so may a later attempt,
    which takes over assignments of an earlier one.
    """
    table = schema.encryption_key
    return tx.execute(delete_rows(table).where(table.c.expires <= now, ~_needed(table))).rowcount


def kept_past_expiry(tx: Transaction, now: datetime, *, limit: int = LIST_LIMIT) -> list[str]:
    """Ids of pairs past their `expires` that an active round still needs."""
    table = schema.encryption_key
    query = select(table.c.id).where(table.c.expires <= now, _needed(table)).order_by(table.c.id).limit(limit)
    return list(tx.execute(query).scalars())


def ensure_secret(tx: Transaction, sealer: Sealer, name: str, candidate: bytes, now: datetime) -> bytes:
    """The secret called `name`; stores `candidate` as it if there is none yet. Every caller gets the same bytes.

    Raises ArtifactInvalid(SECRET_UNREADABLE) if it does not open.
    """
    table = schema.server_secret
    context = place(table.name, name)
    query = select(table.c.value, table.c.sealed_with).where(table.c.name == name)
    stored = tx.execute(query).one_or_none()
    if stored is None:
        sealed, sealed_with = sealer.seal(context, candidate)
        try:
            with tx.begin_nested():
                tx.execute(insert(table).values(name=name, value=sealed, sealed_with=sealed_with, created=now))
        except IntegrityError:
            stored = tx.execute(query).one()
        else:
            return candidate
    return sealer.open(context, bytes(stored.value), stored.sealed_with)


def check_secret(tx: Transaction, sealer: Sealer) -> None:
    """Raises ArtifactInvalid(SECRET_UNREADABLE) if anything is sealed with another operator secret; opens nothing."""
    others = sorted(one for one in sealed_with(tx) if one is not None and one != sealer.id)
    if others:
        raise ArtifactInvalid(
            Reason.SECRET_UNREADABLE,
            f"the database is sealed with operator secret {', '.join(others)}, this process has {sealer.id}",
            remedy=ONE_SECRET,
        )


def seal_plain(tx: Transaction, sealer: Sealer) -> int:
    """Seals what a release without operator secrets stored in plain; returns how many values that were."""
    lock_keys(tx)
    count = 0
    for table, row, context, value in _values(tx):
        if row.sealed_with is None:
            _store(tx, table, row, *sealer.seal(context, value))
            count += 1
    return count


def reseal(tx: Transaction, old: Sealer, new: Sealer) -> int:
    """Seals every value that `old` opens with `new` instead; returns how many, 0 if all were sealed with `new` before.

    Raises ArtifactInvalid(SECRET_UNREADABLE), and nothing has changed, if a value opens with neither.
    """
    lock_keys(tx)
    count = 0
    for table, row, context, value in _values(tx):
        if row.sealed_with == new.id:
            new.open(context, value, row.sealed_with)
            continue
        _store(tx, table, row, *new.seal(context, old.open(context, value, row.sealed_with)))
        count += 1
    return count


def check_sealed(tx: Transaction, sealer: Sealer) -> int:
    """Opens every stored secret once; returns how many there are.

    Raises ArtifactInvalid(SECRET_UNREADABLE) that names the first that does not open.
    """
    count = 0
    for _, row, context, value in _values(tx):
        sealer.open(context, value, row.sealed_with)
        count += 1
    return count


def sealed_with(tx: Transaction) -> set[str | None]:
    """The ids of the operator secrets that stored values are sealed with; None if some are in plain."""
    found: set[str | None] = set()
    for table in _COLUMN:
        found |= set(tx.execute(select(table.c.sealed_with).distinct()).scalars())
    return found


def _key_rows(tx: Transaction, sealer: Sealer, *conditions: ColumnElement[bool], limit: int) -> list[EncryptionKeyRow]:
    table = schema.encryption_key
    query = select(table).where(*conditions).order_by(table.c.created.desc(), table.c.id).limit(limit)
    rows = []
    for row in tx.execute(query):
        public = bytes(row.public_key)
        private = sealer.open(_key_place(row.id, public), bytes(row.private_key), row.sealed_with)
        rows.append(EncryptionKeyRow(row.id, public, private, row.created, row.expires, row.published_until))
    return rows


def _key_place(key_id: str, public_key: bytes) -> str:
    # With the public half in it, nobody can put another one beside a sealed private half.
    return place(schema.encryption_key.name, f"{key_id}/{public_key.hex()}")


def _needed(keys: Table) -> ColumnElement[bool]:
    rounds, assignments = schema.iteration, schema.assignment
    of_round = [assignments.c[column.name] == column for column in rounds.primary_key.columns]
    given = exists().where(*of_round, assignments.c.created_time <= keys.c.expires)
    active = rounds.c.status.in_([int(status) for status in schema.ACTIVE_ITERATION])
    return exists().where(active, (rounds.c.created_time <= keys.c.expires) | given)


_COLUMN = {
    schema.encryption_key: schema.encryption_key.c.private_key,
    schema.server_secret: schema.server_secret.c.value,
    schema.enrolment: schema.enrolment.c.secret,
}


def _values(tx: Transaction) -> Iterator[tuple[Table, Any, str, bytes]]:
    """Every secret of the database: its table, row, place, and the bytes as stored. Rows may be changed meanwhile."""
    for table, column in _COLUMN.items():
        (key,) = table.primary_key.columns
        rows = tx.execute(select(table).order_by(key).limit(LIST_LIMIT)).all()
        while rows:
            for row in rows:
                name = getattr(row, key.name)
                is_key = table is schema.encryption_key
                context = _key_place(name, bytes(row.public_key)) if is_key else place(table.name, name)
                yield table, row, context, bytes(getattr(row, column.name))
            rows = tx.execute(select(table).where(key > name).order_by(key).limit(LIST_LIMIT)).all()


def _store(tx: Transaction, table: Table, row: Any, value: bytes, sealed_with: str) -> None:
    (key,) = table.primary_key.columns
    values = {_COLUMN[table].name: value, "sealed_with": sealed_with}
    if tx.execute(update(table).where(key == getattr(row, key.name)).values(values)).rowcount != 1:
        raise ArtifactInvalid(Reason.SECRET_UNREADABLE, f"a row of {table.name} went while it was sealed")
