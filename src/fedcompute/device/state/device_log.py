"""What happened on a device, for the developer who asks `fedcompute device logs`. Times are Unix milliseconds."""

from dataclasses import dataclass

from fedcompute.device.owner import Owner
from fedcompute.device.state.database import Transaction

ENTRIES_LIMIT = 10_000
# Of older entries what was printed goes first.
OUTPUTS_LIMIT = 500
OUTPUT_LIMIT = 64 * 1024
DETAIL_LIMIT = 4096


@dataclass(frozen=True)
class LogEntry:
    """One operation of a worker or one run of a task.

    `subject`: the hook or the population; `outcome`: `ok` or a code of the error catalogue; `output`: what the
    developer's code printed. Only `output` and the traceback in it are the developer's words.
    """

    time: int
    owner: str | None
    subject: str
    outcome: str
    detail: str
    output: str = ""
    id: int = 0


def write_entry(tx: Transaction, entry: LogEntry) -> None:
    """Appends an entry; the oldest go beyond `ENTRIES_LIMIT`, and their outputs beyond `OUTPUTS_LIMIT`.

    Of the output the last `OUTPUT_LIMIT` characters are kept, of the detail the first `DETAIL_LIMIT`.
    """
    cursor = tx.execute(
        "INSERT INTO device_log (time, owner, subject, outcome, detail, output) VALUES (?, ?, ?, ?, ?, ?)",
        (
            entry.time,
            entry.owner,
            entry.subject,
            entry.outcome,
            entry.detail[:DETAIL_LIMIT],
            entry.output[-OUTPUT_LIMIT:],
        ),
    )
    newest = cursor.lastrowid or 0
    tx.execute("DELETE FROM device_log WHERE id <= ?", (newest - ENTRIES_LIMIT,))
    tx.execute("UPDATE device_log SET output = '' WHERE id = ? AND output <> ''", (newest - OUTPUTS_LIMIT,))


def read_entries(tx: Transaction, *, owner: Owner | None = None, after: int = 0, limit: int = 100) -> list[LogEntry]:
    """The newest `limit` entries with an id above `after`, oldest first; of one owner, or of all."""
    mine = "" if owner is None else " AND owner = ?"
    rows = tx.execute(
        "SELECT time, owner, subject, outcome, detail, output, id FROM device_log"
        f" WHERE id > ?{mine} ORDER BY id DESC LIMIT ?",
        (after, *(() if owner is None else (owner.digest,)), limit),
    ).fetchall()
    return [LogEntry(*row) for row in reversed(rows)]
