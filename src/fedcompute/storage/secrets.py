"""The server's own secrets: HPKE key pairs and named secrets such as the URL signing key (spec/server.md 7.2)."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction

LIST_LIMIT = 1000


@dataclass(frozen=True)
class EncryptionKeyRow:
    """One X25519 key pair: devices are told of it until `published_until`, it decrypts until `expires`."""

    id: str
    public_key: bytes
    private_key: bytes = field(repr=False)
    created: datetime
    expires: datetime
    published_until: datetime
    sealed_with: str | None = None  # the operator secret that the private key is sealed under


def insert_key(tx: Transaction, key: EncryptionKeyRow) -> bool:
    """Stores a key pair; False if the id is taken."""
    try:
        with tx.begin_nested():
            tx.execute(
                insert(schema.encryption_key).values(
                    id=key.id,
                    public_key=key.public_key,
                    private_key=key.private_key,
                    created=key.created,
                    expires=key.expires,
                    published_until=key.published_until,
                )
            )
    except IntegrityError:
        return False
    return True


def published_keys(tx: Transaction, now: datetime, *, limit: int = LIST_LIMIT) -> list[EncryptionKeyRow]:
    """The pairs that devices may be told of now, newest first."""
    table = schema.encryption_key
    query = (
        select(table)
        .where(table.c.published_until > now, table.c.expires > now)
        .order_by(table.c.created.desc(), table.c.id)
        .limit(limit)
    )
    return [EncryptionKeyRow(**row) for row in tx.execute(query).mappings()]


def private_keys(
    tx: Transaction, now: datetime, *, ids: Collection[str] | None = None, limit: int = LIST_LIMIT
) -> dict[str, bytes]:
    """Private keys that have not expired, by id; `ids` narrows them, unknown ids are left out."""
    table = schema.encryption_key
    query = select(table.c.id, table.c.private_key).where(table.c.expires > now).limit(limit)
    if ids is not None:
        query = query.where(table.c.id.in_(sorted(ids)))
    return {row.id: row.private_key for row in tx.execute(query)}


def delete_expired_keys(tx: Transaction, now: datetime) -> int:
    """Deletes pairs past their `expires`; returns how many. Uploads under them can no longer be read."""
    table = schema.encryption_key
    return tx.execute(delete(table).where(table.c.expires <= now)).rowcount


def ensure_secret(tx: Transaction, name: str, candidate: bytes, now: datetime) -> bytes:
    """The secret called `name`; stores `candidate` as it if there is none yet. Every caller gets the same bytes."""
    table = schema.server_secret
    query = select(table.c.value).where(table.c.name == name)
    stored = tx.execute(query).scalar_one_or_none()
    if stored is not None:
        return bytes(stored)
    try:
        with tx.begin_nested():
            tx.execute(insert(table).values(name=name, value=candidate, created=now))
    except IntegrityError:
        return bytes(tx.execute(query).scalar_one())
    return candidate
