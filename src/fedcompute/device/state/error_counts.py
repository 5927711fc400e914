"""How often a service failed with a code of its own, by day (spec/device.md 7.1, 9.2)."""

from fedcompute.device.owner import Owner
from fedcompute.device.state.database import Transaction

# Larger codes are not counted, so that a code cannot carry much about a user.
_MAX_CODE = 32
_DAY = 86_400_000


def count(tx: Transaction, owner: Owner, code: int, now: int) -> None:
    """Counts one failure; codes outside 1 to 32 are left out. `now`: Unix milliseconds."""
    if 1 <= code <= _MAX_CODE:
        tx.execute(
            "INSERT INTO error_count VALUES (?, ?, ?, 1)"
            " ON CONFLICT (owner, code, day) DO UPDATE SET count = count + 1",
            (owner.digest, code, now // _DAY),
        )
