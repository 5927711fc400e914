"""Remote and local data of services: bytes by key, apart for each owner (spec/device.md 7.4, 7.2)."""

from collections.abc import Collection, Mapping
from typing import Literal

from fedcompute.device.owner import Owner
from fedcompute.device.state.database import Transaction

Table = Literal["remote_data", "local_data"]

# What SQLite stores beside key and value: the owner, twice, and its own.
_ROW_BYTES = 300


def get_value(tx: Transaction, table: Table, owner: Owner, key: str) -> bytes | None:
    """The value of a key, None without one."""
    row = tx.execute(f"SELECT value FROM {table} WHERE owner = ? AND key = ?", (owner.digest, key)).fetchone()
    return None if row is None else bytes(row[0])


def key_set(tx: Transaction, table: Table, owner: Owner) -> list[str]:
    """All keys in order."""
    rows = tx.execute(f"SELECT key FROM {table} WHERE owner = ? ORDER BY key", (owner.digest,))
    return [str(row[0]) for row in rows]


def stored_bytes(tx: Transaction, table: Table, owner: Owner) -> int:
    """What rows take in the file: keys and values, and 300 bytes of each row beside them."""
    row = tx.execute(
        f"SELECT COALESCE(SUM(LENGTH(CAST(key AS BLOB)) + LENGTH(value) + {_ROW_BYTES}), 0) FROM {table}"
        " WHERE owner = ?",
        (owner.digest,),
    ).fetchone()
    return int(row[0])


def put_value(tx: Transaction, table: Table, owner: Owner, key: str, value: bytes) -> bytes | None:
    """Stores a value; returns the one before."""
    before = get_value(tx, table, owner, key)
    tx.execute(
        f"INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (owner, key) DO UPDATE SET value = excluded.value",
        (owner.digest, key, value),
    )
    return before


def remove_value(tx: Transaction, table: Table, owner: Owner, key: str) -> bytes | None:
    """Removes a value; returns it, None without one."""
    before = get_value(tx, table, owner, key)
    tx.execute(f"DELETE FROM {table} WHERE owner = ? AND key = ?", (owner.digest, key))
    return before


def keep_download(
    tx: Transaction, owner: Owner, contents: Mapping[str, bytes], retained: Collection[str], sync_token: int
) -> int:
    """What a service decided of a download: rows not retained go, downloaded rows that are retained come, and the sync
    token counts from now on (spec 7.2). Returns how many rows there are then.
    """
    kept = set(retained)
    for key in key_set(tx, "remote_data", owner):
        if key not in kept:
            remove_value(tx, "remote_data", owner, key)
    for key, value in contents.items():
        if key in kept:
            put_value(tx, "remote_data", owner, key, value)
    tx.execute("UPDATE app SET sync_token = ? WHERE owner = ?", (sync_token, owner.digest))
    return len(key_set(tx, "remote_data", owner))
