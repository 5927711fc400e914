"""The server's own encryption keys: made at first start, replaced in time, kept while an upload may need them."""

from datetime import datetime, timedelta

from fedcompute.crypto.keys import PublicKey, generate_key_pair
from fedcompute.server.settings import Settings
from fedcompute.storage.database import Database
from fedcompute.storage.secrets import EncryptionKeyRow, insert_key, published_keys

# Runs on their way when a key leaves the list, and uploads that wait in a long round.
_MARGIN = timedelta(days=1)


def current_keys(database: Database, settings: Settings, now: datetime) -> list[PublicKey]:
    """Returns the public keys that devices may use now, newest first; makes one when the newest is due for rotation.

    Formal guarantees: a private key outlives the last moment at which a device may use its public half by a day
    (spec/device.md 2.2), then it is deleted.
    """
    with database.read() as tx:
        rows = published_keys(tx, now)
    rotation = timedelta(seconds=settings.key_rotation)
    if not rows or now - rows[0].created >= rotation:
        published_until = now + 2 * rotation
        lifetime = published_until + timedelta(seconds=settings.key_max_age) + _MARGIN - now
        pair = generate_key_pair(now, lifetime)
        row = EncryptionKeyRow(pair.id, pair.public_key, pair.private_key, pair.created, pair.expires, published_until)
        with database.write() as tx:
            # Another thread may have been first; one key more does no harm.
            insert_key(tx, row)
        rows = [row, *rows]
    return [PublicKey(row.id, row.public_key) for row in rows]
