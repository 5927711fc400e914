"""The server's own encryption keys: made at first start, replaced in time, kept while an upload may need them."""

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta

from fedcompute.crypto.keys import PublicKey, generate_key_pair
from fedcompute.crypto.sealing import Sealer
from fedcompute.server.settings import Settings
from fedcompute.storage.database import Database, Transaction
from fedcompute.storage.secrets import (
    EncryptionKeyRow,
    delete_expired_keys,
    insert_key,
    kept_past_expiry,
    lock_keys,
    published_keys,
    withdraw_keys,
)

# Runs on their way when a device forgets a key, and uploads that wait for their batch.
_MARGIN = timedelta(days=1)
# What a device takes for the life of an answer whose headers it cannot read, or that aged in a cache (device.md 2.2).
_UNREADABLE_LIFE = timedelta(days=14)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What devices are told now: public keys, newest first, and for how many seconds they may remember them."""

    keys: tuple[PublicKey, ...]
    max_age: int


def publication(database: Database, sealer: Sealer, settings: Settings, now: datetime) -> Publication:
    """The keys to publish, after making one if the newest is due for rotation.

    Raises ArtifactInvalid(SECRET_UNREADABLE) if the operator secret does not open them.

    Formal guarantees: a private key outlives the last moment at which a device that keeps to spec/device.md 2.2 may
    use its public half by a day, also where a cache served the answer or the device could not read its age. Servers
    of one database make one key when one is due, however many they are.
    """
    with database.read() as tx:
        rows = published_keys(tx, sealer, now)
    if not rows or _is_due(rows[0], settings, now):
        with database.write() as tx:
            lock_keys(tx)
            # Another server, or another thread of this one, may have been first.
            rows = published_keys(tx, sealer, now)
            if not rows or _is_due(rows[0], settings, now):
                rows = [_make_key(tx, sealer, settings, now), *rows]
    return Publication(tuple(PublicKey(row.id, row.public_key) for row in rows), _max_age(rows, settings, now))


def rotate_now(tx: Transaction, sealer: Sealer, settings: Settings, now: datetime) -> EncryptionKeyRow:
    """Publishes a fresh key and withdraws every other at once; those go on decrypting until they expire.

    Formal guarantees: from the commit on no device is told of an older key by a server of this database; one that
    knows an older key may use it until its own copy's age ends, at most the `key_max_age` it was told.
    """
    lock_keys(tx)
    row = _make_key(tx, sealer, settings, now)
    withdraw_keys(tx, now, keep=row.id)
    return row


def delete_old_keys(database: Database, now: datetime) -> int:
    """Deletes the pairs that nothing can need any more; returns how many. Logs those that an open round still needs."""
    with database.write() as tx:
        lock_keys(tx)
        deleted = delete_expired_keys(tx, now)
        kept = kept_past_expiry(tx, now)
    if kept:
        _LOG.warning("%d encryption keys are past their end and kept for rounds that are still open", len(kept))
    return deleted


def _is_due(newest: EncryptionKeyRow, settings: Settings, now: datetime) -> bool:
    return now - newest.created >= timedelta(seconds=settings.key_rotation)


def _make_key(tx: Transaction, sealer: Sealer, settings: Settings, now: datetime) -> EncryptionKeyRow:
    published_until = now + timedelta(seconds=2 * settings.key_rotation)
    remembered = timedelta(seconds=settings.key_max_age) + _UNREADABLE_LIFE
    pair = generate_key_pair(now, published_until + remembered + _MARGIN - now)
    row = EncryptionKeyRow(pair.id, pair.public_key, pair.private_key, pair.created, pair.expires, published_until)
    insert_key(tx, sealer, row)
    return row


def _max_age(rows: list[EncryptionKeyRow], settings: Settings, now: datetime) -> int:
    # A key made when the setting was shorter must not be remembered for longer than it is kept.
    shortest = min(row.expires for row in rows) - _UNREADABLE_LIFE - _MARGIN - now
    # Of an age of 0 devices make 14 days.
    return max(1, int(min(settings.key_max_age, shortest.total_seconds())))
