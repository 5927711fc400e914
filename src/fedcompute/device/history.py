"""What a device remembers between runs: contributions, resumption and its tokens (spec/device.md 3.3, 4, 5.8)."""

import os
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

MAX_AGE = 604_800  # seconds, 7 days

_TABLES = """
CREATE TABLE IF NOT EXISTS task_history (
  id INTEGER PRIMARY KEY,
  job_id INTEGER NOT NULL,
  population TEXT NOT NULL,
  task_id TEXT NOT NULL,
  contribution_time REAL NOT NULL,
  contribution_round INTEGER NOT NULL,
  total_participation INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS task_history_newest ON task_history (job_id, population, task_id, contribution_time);
CREATE TABLE IF NOT EXISTS resumption (
  job_id INTEGER NOT NULL,
  task_identifier TEXT NOT NULL,
  token BLOB NOT NULL,
  PRIMARY KEY (job_id, task_identifier)
);
CREATE TABLE IF NOT EXISTS authorization_token (
  server TEXT NOT NULL,
  owner_id TEXT NOT NULL,
  token TEXT NOT NULL,
  expires REAL NOT NULL,
  PRIMARY KEY (server, owner_id)
);
"""


@dataclass(frozen=True)
class Participation:
    """One contribution that the server accepted. `time`: Unix seconds; `round`: the task's index at that time."""

    time: float
    round: int
    total: int


class TaskHistory:
    """Participation, resumption and authorization tokens, in one SQLite file or, without a path, in memory.

    A file that is made here is for its owner only.

    Rows are kept apart by `job_id`, tokens by server and owner, so one history may serve many devices.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is not None:
            # Tokens in it speak for the device. What the database writes beside its file has the file's mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._database = sqlite3.connect(path if path is not None else ":memory:", check_same_thread=False)
        self._lock = threading.Lock()
        with self._lock, self._database:
            self._database.executescript(_TABLES)

    def newest(self, job_id: int, population: str, task_id: str) -> Participation | None:
        """The latest contribution to a task, None if there is none."""
        with self._lock:
            row = self._database.execute(
                "SELECT contribution_time, contribution_round, total_participation FROM task_history"
                " WHERE job_id = ? AND population = ? AND task_id = ? ORDER BY contribution_time DESC, id DESC LIMIT 1",
                (job_id, population, task_id),
            ).fetchone()
        return Participation(*row) if row is not None else None

    def add(self, job_id: int, population: str, task_id: str, *, round_index: int, now: float) -> None:
        """Appends a contribution."""
        with self._lock, self._database:
            self._database.execute(
                "INSERT INTO task_history"
                " (job_id, population, task_id, contribution_time, contribution_round, total_participation)"
                " SELECT ?, ?, ?, ?, ?, COALESCE(MAX(total_participation), 0) + 1 FROM task_history"
                " WHERE job_id = ? AND population = ? AND task_id = ?",
                (job_id, population, task_id, now, round_index, job_id, population, task_id),
            )

    def delete_old(self, now: float, max_age: float = MAX_AGE) -> None:
        """Forgets contributions older than `max_age` seconds, and expired tokens."""
        with self._lock, self._database:
            self._database.execute("DELETE FROM task_history WHERE contribution_time < ?", (now - max_age,))
            self._database.execute("DELETE FROM authorization_token WHERE expires <= ?", (now,))

    def resumption_token(self, job_id: int, population: str, task_id: str, collection_uri: str) -> bytes | None:
        """The token of the last example that a successful run used, None at first."""
        with self._lock:
            row = self._database.execute(
                "SELECT token FROM resumption WHERE job_id = ? AND task_identifier = ?",
                (job_id, _task_identifier(population, task_id, collection_uri)),
            ).fetchone()
        return bytes(row[0]) if row is not None else None

    def save_resumption_token(
        self, job_id: int, population: str, task_id: str, collection_uri: str, token: bytes
    ) -> None:
        """Keeps the token under the very key that `resumption_token` reads."""
        with self._lock, self._database:
            self._database.execute(
                "INSERT INTO resumption VALUES (?, ?, ?)"
                " ON CONFLICT (job_id, task_identifier) DO UPDATE SET token = excluded.token",
                (job_id, _task_identifier(population, task_id, collection_uri), token),
            )

    def token(self, server: str, owner_id: str, now: float) -> str | None:
        """The token by which a server knows an owner, None without one that has not expired."""
        with self._lock:
            row = self._database.execute(
                "SELECT token FROM authorization_token WHERE server = ? AND owner_id = ? AND expires > ?",
                (server, owner_id, now),
            ).fetchone()
        return str(row[0]) if row is not None else None

    def save_token(self, server: str, owner_id: str, token: str, expires: float) -> None:
        """Keeps a token in place of the one before; `expires`: Unix seconds."""
        with self._lock, self._database:
            self._database.execute(
                "INSERT INTO authorization_token VALUES (?, ?, ?, ?)"
                " ON CONFLICT (server, owner_id) DO UPDATE SET token = excluded.token, expires = excluded.expires",
                (server, owner_id, token, expires),
            )

    def delete_token(self, server: str, owner_id: str) -> None:
        """Forgets the token by which a server knows an owner."""
        with self._lock, self._database:
            self._database.execute(
                "DELETE FROM authorization_token WHERE server = ? AND owner_id = ?", (server, owner_id)
            )

    def close(self) -> None:
        with self._lock:
            self._database.close()


def _task_identifier(population: str, task_id: str, collection_uri: str) -> str:
    return "_".join(part for part in (population, task_id, collection_uri) if part)
