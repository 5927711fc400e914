"""API keys: what operators and their programs show to the management routes; only their digests are stored."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Row, func, insert, or_, select, update

from fedcompute.errors import Reason, RequestRejected
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction

LIST_LIMIT = 1000
LABEL_LIMIT = 40
_TABLE = schema.api_key
_ID_BYTES = 6
_SECRET_BYTES = 32
_TEXT = re.compile(rf"fc_(?P<id>[0-9a-f]{{{2 * _ID_BYTES}}})_[A-Za-z0-9_-]{{43}}")
# Also cut short, or with something behind it.
_SHOWN = re.compile(rf"(fc_[0-9a-f]{{{2 * _ID_BYTES}}}_)[A-Za-z0-9_-]+")
_NOBODY = "0" * 64


class Role(StrEnum):
    """What the holder of a key may do; each role may do what the one before it may, and more.

    | role | may |
    |---|---|
    | viewer | read tasks, rounds, metrics, checkpoints, ledgers and budgets |
    | builder | create and clone tasks, upload their artifacts, take back a task that never opened |
    | operator | cancel, pause and resume tasks, set budgets, manage keys, read the audit log |
    """

    VIEWER = "viewer"
    BUILDER = "builder"
    OPERATOR = "operator"

    def covers(self, needed: "Role") -> bool:
        """Whether this role may do what `needed` may."""
        order = tuple(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class ApiKey:
    """A key as stored: everything but its secret. Times are UTC."""

    id: str
    label: str
    role: Role
    created: datetime
    expires: datetime | None
    revoked: datetime | None

    def is_live(self, now: datetime) -> bool:
        """Whether it opens anything."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def create_api_key(
    tx: Transaction, role: Role, label: str, now: datetime, *, expires: datetime | None = None
) -> tuple[ApiKey, str]:
    """Stores a new key and returns it with its text `fc_{id}_{secret}`, which nobody can read again.

    Raises RequestRejected(MALFORMED_REQUEST) for a label that is empty, too long or not printable, and for an expiry
    that has passed.

    Formal guarantees: the secret has 256 bits from the system's generator and lies nowhere but in what is returned;
    the stored SHA-256 tells it to nobody who cannot guess 256 bits.
    """
    if not 0 < len(label) <= LABEL_LIMIT or not label.isprintable():
        raise _refused(f"a label has 1 to {LABEL_LIMIT} printable characters")
    if expires is not None and expires <= now:
        raise _refused("the key would have expired already")
    key_id = secrets.token_hex(_ID_BYTES)
    text = f"fc_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    tx.execute(
        insert(_TABLE).values(
            id=key_id, label=label, key_hash=_digest(text), role=role.value, created=now, expires=expires
        )
    )
    return ApiKey(key_id, label, role, now, expires, None), text


def verify_api_key(tx: Transaction, text: str, now: datetime) -> ApiKey:
    """The live key that `text` is; one look-up by its id, whatever the number of keys.

    Raises RequestRejected(API_KEY_INVALID) for anything else. Only who knows the secret learns that its key has
    expired or was revoked.

    Formal guarantees: digests are compared in constant time, and a digest is compared also where no key has the id, so
    the time of an answer tells at most which ids exist.
    """
    found = _TEXT.fullmatch(text)
    row = None if found is None else tx.execute(select(_TABLE).where(_TABLE.c.id == found["id"])).one_or_none()
    matches = hmac.compare_digest(_digest(text), _NOBODY if row is None else row.key_hash)
    if row is None or not matches:
        raise RequestRejected(Reason.API_KEY_INVALID, "the API key is not one of this server")
    key = _key(row)
    if key.revoked is not None:
        raise RequestRejected(Reason.API_KEY_INVALID, f"API key {key.id} was revoked")
    if not key.is_live(now):
        raise RequestRejected(Reason.API_KEY_INVALID, f"API key {key.id} has expired")
    return key


def live_api_key(tx: Transaction, key_id: str, now: datetime) -> ApiKey | None:
    """The key of that id while it opens anything; for who has shown it before."""
    row = tx.execute(select(_TABLE).where(_TABLE.c.id == key_id)).one_or_none()
    key = None if row is None else _key(row)
    return key if key is not None and key.is_live(now) else None


def list_api_keys(tx: Transaction) -> list[ApiKey]:
    """Every key, also those that open nothing any more, oldest first; at most 1000."""
    query = select(_TABLE).order_by(_TABLE.c.created, _TABLE.c.id).limit(LIST_LIMIT)
    return [_key(row) for row in tx.execute(query)]


def count_live_api_keys(tx: Transaction, now: datetime) -> int:
    """How many keys open something."""
    live = or_(_TABLE.c.expires.is_(None), _TABLE.c.expires > now)
    return tx.execute(select(func.count()).where(_TABLE.c.revoked.is_(None), live)).scalar_one()


def revoke_api_key(tx: Transaction, key_id: str, now: datetime) -> bool:
    """Ends a key at once and for good; False if there is none of that id or it was revoked already."""
    where = [_TABLE.c.id == key_id, _TABLE.c.revoked.is_(None)]
    return bool(tx.execute(update(_TABLE).where(*where).values(revoked=now)).rowcount)


def without_keys(text: str) -> str:
    """The text with every API key in it cut to its id: people paste whole keys where an id or a name is asked for."""
    return _SHOWN.sub(r"\1***", text) if "fc_" in text else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _refused(detail: str) -> RequestRejected:
    return RequestRejected(Reason.MALFORMED_REQUEST, detail, remedy="correct what the message names")


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.label, Role(row.role), row.created, row.expires, row.revoked)
