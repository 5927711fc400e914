"""Rounds that are over, summed up for those who look at them (see `storage.summaries`)."""

from fedcompute.server.context import Context, now
from fedcompute.server.tracing import record_attempt
from fedcompute.storage.summaries import settle, to_settle

# A pass must not be long: what is left waits for the next.
_MOST = 20


def summarize(context: Context) -> bool:
    """Sums up attempts that are settled, each in a transaction of its own; whether some may be left."""
    with context.database.read() as tx:
        keys = to_settle(tx, limit=_MOST)
    for key in keys:
        with context.database.write() as tx:
            settled = settle(tx, key, now())
        if settled:
            record_attempt(context, key)
    return len(keys) == _MOST
