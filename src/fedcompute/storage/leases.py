"""Leases: at most one worker does a named piece of work at a time (spec/server.md 11.1).

A lease saves double work; it is not what keeps the data right. A holder that outlives its lease is stopped by the
expected status of every transition.
"""

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import delete, insert, or_, select, update
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


def renew_leases(tx: Transaction, holder: str, now: datetime, lifetime: timedelta) -> set[str]:
    """Prolongs every lease that `holder` still has; returns their names: work under any other name is lost, stop it."""
    table = schema.lease
    mine = (table.c.holder == holder, table.c.expires > now)
    names = tx.execute(select(table.c.name).where(*mine).order_by(table.c.name).with_for_update()).scalars().all()
    tx.execute(update(table).where(table.c.name.in_(names), *mine).values(expires=now + lifetime))
    return set(names)


def release_leases(tx: Transaction, holder: str, names: Collection[str] | None = None) -> int:
    """Gives back those of `names` that `holder` has, or all that it has; returns how many."""
    table = schema.lease
    query = delete(table).where(table.c.holder == holder)
    if names is not None:
        query = query.where(table.c.name.in_(sorted(names)))
    return tx.execute(query).rowcount


def any_lease(tx: Transaction, now: datetime) -> bool:
    """Whether anybody works on anything."""
    table = schema.lease
    return tx.execute(select(table.c.name).where(table.c.expires > now).limit(1)).first() is not None


def forget_expired_leases(tx: Transaction, now: datetime) -> int:
    """Deletes leases that nobody renewed; returns how many."""
    return tx.execute(delete(schema.lease).where(schema.lease.c.expires <= now)).rowcount
