"""Authorization tokens: what devices were admitted with, as hashes, until they expire (spec/server.md 3.3)."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, insert, select
from sqlalchemy.exc import IntegrityError

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction


@dataclass(frozen=True)
class TokenRow:
    """A token as stored: never itself, only SHA-256 hashes, in lower-case hex.

    `participant`: the enrolment it was granted to, None for one that an attestation earned. `proof_hash`: of what
    earned it; one proof earns one token.
    """

    token_hash: str = field(repr=False)
    owner_hash: str
    participant: str | None
    proof_hash: str | None
    created: datetime
    expires: datetime


def find_token(tx: Transaction, token_hash: str) -> TokenRow | None:
    """The token, expired or not; None if it is unknown or was cleaned away."""
    table = schema.authorization_token
    row = tx.execute(select(table).where(table.c.token_hash == token_hash)).one_or_none()
    return None if row is None else _token_row(row)


def live_token(tx: Transaction, token_hash: str, now: datetime) -> TokenRow | None:
    """The token if it has not expired and its enrolment, if it has one, is not revoked."""
    table, enrolment = schema.authorization_token, schema.enrolment
    query = (
        select(table, enrolment.c.revoked)
        .join(enrolment, enrolment.c.id == table.c.participant, isouter=True)
        .where(table.c.token_hash == token_hash, table.c.expires > now)
    )
    row = tx.execute(query).one_or_none()
    return None if row is None or row.revoked is not None else _token_row(row)


def grant_token(tx: Transaction, token: TokenRow, now: datetime) -> bool:
    """Stores a token; needs a write transaction.

    True if it is stored for this owner and participant now. One that was stored before keeps its expiry. False, and
    nothing changes, if the token is another owner's or participant's, or its proof has earned another token.
    """
    table = schema.authorization_token
    tx.execute(delete(table).where(table.c.token_hash == token.token_hash, table.c.expires <= now))
    values = {column.name: getattr(token, column.name) for column in table.columns}
    try:
        with tx.begin_nested():
            tx.execute(insert(table).values(values))
    except IntegrityError:
        stored = find_token(tx, token.token_hash)
        return stored is not None and (stored.owner_hash, stored.participant) == (token.owner_hash, token.participant)
    return True


def forget_tokens(tx: Transaction, expired_before: datetime) -> int:
    """Deletes tokens that expired at `expired_before` or earlier; returns how many."""
    table = schema.authorization_token
    return tx.execute(delete(table).where(table.c.expires <= expired_before)).rowcount


def _token_row(row: Row[Any]) -> TokenRow:
    return TokenRow(row.token_hash, row.owner_hash, row.participant, row.proof_hash, row.created, row.expires)
