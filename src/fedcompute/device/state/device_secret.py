"""The key under which a device seals what passes through other hands: surface tokens and event URLs."""

import os

from fedcompute.crypto.secret_box import KEY_BYTES
from fedcompute.device.state.database import Transaction

_NAME = "sealing_key"


def sealing_key(tx: Transaction) -> bytes:
    """The device's own key, made at first use; needs a transaction that writes.

    Formal guarantees: 256 bits from the operating system's generator; it never leaves the device's file.
    """
    row = tx.execute("SELECT value FROM setting WHERE name = ?", (_NAME,)).fetchone()
    if row is not None:
        return bytes(row[0])
    key = os.urandom(KEY_BYTES)
    tx.execute("INSERT INTO setting VALUES (?, ?)", (_NAME, key))
    return key
