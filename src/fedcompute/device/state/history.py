"""What a device remembers between runs: contributions, resumption and its tokens (spec/device.md 3.3, 4, 5.8)."""

from dataclasses import dataclass

from fedcompute.device.state.database import DeviceDatabase, Transaction

MAX_AGE = 604_800  # seconds, 7 days


@dataclass(frozen=True)
class Participation:
    """One contribution that the server accepted. `time`: Unix seconds; `round`: the task's index at that time."""

    time: float
    round: int
    total: int


@dataclass(frozen=True)
class Contribution:
    """What is to be remembered of a run whose update the server has.

    `time`: Unix seconds. `resumption_token`: that of the last example used, None to keep the one before.
    """

    job_id: int
    population: str
    task_id: str
    round: int
    time: float
    collection_uri: str = ""
    resumption_token: bytes | None = None


def record_contribution(tx: Transaction, contribution: Contribution) -> None:
    """Appends a contribution and keeps its token under the very key that `resumption_token` reads."""
    job_id, population, task_id = contribution.job_id, contribution.population, contribution.task_id
    tx.execute(
        "INSERT INTO task_history"
        " (job_id, population, task_id, contribution_time, contribution_round, total_participation)"
        " SELECT ?, ?, ?, ?, ?, COALESCE(MAX(total_participation), 0) + 1 FROM task_history"
        " WHERE job_id = ? AND population = ? AND task_id = ?",
        (job_id, population, task_id, _ms(contribution.time), contribution.round, job_id, population, task_id),
    )
    if contribution.resumption_token is not None:
        tx.execute(
            "INSERT INTO resumption VALUES (?, ?, ?)"
            " ON CONFLICT (job_id, task_identifier) DO UPDATE SET token = excluded.token",
            (
                job_id,
                _task_identifier(population, task_id, contribution.collection_uri),
                contribution.resumption_token,
            ),
        )


def delete_expired(tx: Transaction, now: float, max_age: float = MAX_AGE) -> None:
    """Forgets contributions older than `max_age` seconds, and expired tokens."""
    tx.execute("DELETE FROM task_history WHERE contribution_time < ?", (_ms(now - max_age),))
    tx.execute("DELETE FROM authorization_token WHERE expires <= ?", (_ms(now),))


class TaskHistory:
    """Participation, resumption and authorization tokens.

    Rows are kept apart by `job_id`, tokens by server and owner, so one history may serve many devices.
    """

    def __init__(self, database: DeviceDatabase | None = None) -> None:
        """Without a database the history lives in memory."""
        self.database = database if database is not None else DeviceDatabase()

    def newest(self, job_id: int, population: str, task_id: str) -> Participation | None:
        """The latest contribution to a task, None if there is none."""
        with self.database.read() as tx:
            row = tx.execute(
                "SELECT contribution_time, contribution_round, total_participation FROM task_history"
                " WHERE job_id = ? AND population = ? AND task_id = ? ORDER BY contribution_time DESC, id DESC LIMIT 1",
                (job_id, population, task_id),
            ).fetchone()
        return Participation(row[0] / 1000, row[1], row[2]) if row is not None else None

    def resumption_token(self, job_id: int, population: str, task_id: str, collection_uri: str) -> bytes | None:
        """The token of the last example that a successful run used, None at first."""
        with self.database.read() as tx:
            row = tx.execute(
                "SELECT token FROM resumption WHERE job_id = ? AND task_identifier = ?",
                (job_id, _task_identifier(population, task_id, collection_uri)),
            ).fetchone()
        return bytes(row[0]) if row is not None else None

    def record(self, contribution: Contribution) -> None:
        """`record_contribution`, and what has expired by then goes."""
        with self.database.write() as tx:
            record_contribution(tx, contribution)
            delete_expired(tx, contribution.time)

    def token(self, server: str, owner_id: str, now: float) -> str | None:
        """The token by which a server knows an owner, None without one that has not expired."""
        with self.database.read() as tx:
            row = tx.execute(
                "SELECT token FROM authorization_token WHERE server = ? AND owner_id = ? AND expires > ?",
                (server, owner_id, _ms(now)),
            ).fetchone()
        return str(row[0]) if row is not None else None

    def save_token(self, server: str, owner_id: str, token: str, expires: float) -> None:
        """Keeps a token in place of the one before; `expires`: Unix seconds."""
        with self.database.write() as tx:
            tx.execute(
                "INSERT INTO authorization_token VALUES (?, ?, ?, ?)"
                " ON CONFLICT (server, owner_id) DO UPDATE SET token = excluded.token, expires = excluded.expires",
                (server, owner_id, token, _ms(expires)),
            )

    def delete_token(self, server: str, owner_id: str) -> None:
        """Forgets the token by which a server knows an owner."""
        with self.database.write() as tx:
            tx.execute("DELETE FROM authorization_token WHERE server = ? AND owner_id = ?", (server, owner_id))


def _task_identifier(population: str, task_id: str, collection_uri: str) -> str:
    return "_".join(part for part in (population, task_id, collection_uri) if part)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
