"""Leases: at most one worker does a named piece of work at a time (spec/server.md 11.1).

A lease saves double work; it is not what keeps the data right. A holder that outlives its lease is stopped by the
expected status of every transition.
"""

from datetime import datetime, timedelta

from sqlalchemy import delete, insert, or_, update
from sqlalchemy.exc import IntegrityError

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction


def acquire_lease(tx: Transaction, name: str, holder: str, now: datetime, lifetime: timedelta) -> bool:
    """Takes or prolongs the lease; False if another holder has it and it has not expired."""
    table = schema.lease
    taken = tx.execute(
        update(table)
        .where(table.c.name == name, or_(table.c.holder == holder, table.c.expires <= now))
        .values(holder=holder, expires=now + lifetime)
    ).rowcount
    if taken:
        return True
    try:
        with tx.begin_nested():
            tx.execute(insert(table).values(name=name, holder=holder, expires=now + lifetime))
    except IntegrityError:
        return False
    return True


def renew_lease(tx: Transaction, name: str, holder: str, now: datetime, lifetime: timedelta) -> bool:
    """Prolongs a lease that `holder` still has; False if it expired or was taken over: stop the work."""
    table = schema.lease
    renewed = tx.execute(
        update(table)
        .where(table.c.name == name, table.c.holder == holder, table.c.expires > now)
        .values(expires=now + lifetime)
    ).rowcount
    return bool(renewed)


def release_lease(tx: Transaction, name: str, holder: str) -> bool:
    """Gives the lease back; False if `holder` did not have it."""
    table = schema.lease
    return bool(tx.execute(delete(table).where(table.c.name == name, table.c.holder == holder)).rowcount)
