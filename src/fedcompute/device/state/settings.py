"""What the user of a device allows (spec/device.md 8.4, 9.3). Times are Unix milliseconds."""

from dataclasses import dataclass
from typing import Literal, get_args

from fedcompute.device.jobs.flags import flags
from fedcompute.device.state.database import Transaction

ConsentName = Literal["measurement", "protected_audience"]

RESET = "reset_data"
"""The background job that wipes the user's data."""

_PREFIX = "revoked."


@dataclass(frozen=True)
class Consent:
    """What is allowed now. `measurement`: to schedule, to give examples, to write logs; `protected_audience`: to show
    content and to return values.
    """

    measurement: bool = True
    protected_audience: bool = True


def consent(tx: Transaction) -> Consent:
    """Consent is given until it is revoked; the flags for tests override both."""
    rules = flags(tx)
    if rules.boolean("enable_personalization_status_override"):
        value = rules.boolean("personalization_status_override_value")
        return Consent(value, value)
    revoked = revocations(tx)
    return Consent(**{name: name not in revoked for name in get_args(ConsentName)})


def set_consent(tx: Transaction, name: ConsentName, given: bool, now: int) -> None:
    """Gives or revokes a consent.

    With the first one revoked the wipe of the user's data is set for `reset_data_delay_seconds` later; revoking again
    does not postpone it. It is called off when both are given again before.
    """
    if given:
        tx.execute("DELETE FROM setting WHERE name = ?", (_PREFIX + name,))
        if not revocations(tx):
            tx.execute("DELETE FROM background_job WHERE name = ?", (RESET,))
    else:
        tx.execute("INSERT OR IGNORE INTO setting VALUES (?, ?)", (_PREFIX + name, str(now).encode()))
        wipe = now + flags(tx).integer("reset_data_delay_seconds") * 1000
        tx.execute("INSERT OR IGNORE INTO background_job (name, earliest_run) VALUES (?, ?)", (RESET, wipe))


def revocations(tx: Transaction) -> dict[str, int]:
    """The consents that are revoked, and since when."""
    names = [_PREFIX + name for name in get_args(ConsentName)]
    rows = tx.execute("SELECT name, value FROM setting WHERE name IN (?, ?)", names)
    return {name.removeprefix(_PREFIX): int(bytes(value)) for name, value in rows}
