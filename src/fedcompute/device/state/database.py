"""A device's file: one SQLite database, versioned, shared by the daemon and the commands at the prompt."""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcompute.device.state.schema import MIGRATIONS
from fedcompute.errors import OperationFailed, Reason

Transaction = sqlite3.Connection
"""A connection inside a transaction, as `DeviceDatabase.read` and `write` give it."""

_BUSY_SECONDS = 10.0


class DeviceDatabase:
    """One file, or a database in memory. Safe to share among threads; other processes may open the same file.

    Transactions raise OperationFailed(STORAGE_FAILED) where the file cannot be read or written. One is on disk when
    `write` ends, and a process killed at any moment leaves the file as it was before or after it.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Opens or makes the file, for its owner only, and brings it to the present version.

        Raises OperationFailed(STORAGE_FAILED) for a file of a newer release or one that is no database.
        """
        self.path = path
        self._lock = threading.RLock()
        try:
            if path is not None:
                _make(path)
            self._connection = sqlite3.connect(
                path if path is not None else ":memory:",
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        try:
            self._set_up()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise _unusable(path, error) from error
        except BaseException:
            self._connection.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction that sees one state of the file and writes nothing."""
        with self._transaction("BEGIN") as tx:
            yield tx

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that is written as a whole, or, if the block raises, not at all."""
        with self._transaction("BEGIN IMMEDIATE") as tx:
            yield tx

    def changes(self) -> int:
        """A number that differs from the last one if another process has written in between."""
        with self._lock:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def forget(self) -> None:
        """Call after deleting what shall not be found again: empties the write-ahead log, which has older pages.

        Where another process reads at the same moment the log stays until the next call.
        """
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Transaction]:
        with self._lock:
            if self._connection.in_transaction:
                raise OperationFailed(Reason.INTERNAL, "a transaction within a transaction")
            try:
                self._connection.execute(begin)
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
                    # A full disk, a file that another process keeps locked or that is damaged, a file system gone
                    # read-only. The other kinds are faults of the statement.
                    raise OperationFailed(Reason.STORAGE_FAILED, f"{self.path or 'memory'}: {error}") from error
                raise

    def _set_up(self) -> None:
        self._use_write_ahead_log()
        # FULL: what has been told to a server must not be forgotten in a power cut.
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA secure_delete = ON")
        with self._transaction("BEGIN IMMEDIATE") as tx:
            version = int(tx.execute("PRAGMA user_version").fetchone()[0])
            if version > len(MIGRATIONS):
                raise OperationFailed(
                    Reason.STORAGE_FAILED,
                    f"{self.path} is of version {version}; this release knows {len(MIGRATIONS)}",
                    remedy="use the release that wrote it, or name another device directory",
                )
            for script in MIGRATIONS[version:]:
                for statement in script.split(";"):
                    # Not executescript, which would commit between the statements.
                    if statement.strip():
                        tx.execute(statement)
            tx.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _use_write_ahead_log(self) -> None:
        # For this one SQLite does not wait itself: whoever makes a file at the same time may be just as far.
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return


def _make(path: Path) -> None:
    """Makes the file, for its owner only, unless it is there. Raises OSError."""
    # Tokens in it speak for the device. What SQLite writes beside its file has the file's mode. A file that is there
    # is not opened here: closing it again would drop the locks that SQLite holds on it elsewhere in this process.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _unusable(path: Path | None, error: Exception) -> OperationFailed:
    why = error.strerror if isinstance(error, OSError) else error
    return OperationFailed(
        Reason.STORAGE_FAILED, f"{path} cannot be used: {why}", remedy="name another device directory"
    )
