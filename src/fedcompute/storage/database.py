"""The connection to the one relational database: SQLite by default, PostgreSQL for more than one machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage.migrations import HEAD, upgrade

Transaction = Connection
"""What every function of this room takes first; `Database.write` and `Database.read` yield it."""

BUSY_TIMEOUT_S = 30
_MIGRATION_LOCK = 0x6665646370


class Database:
    """One database, its schema brought up to date when it is opened. Safe for threads; one per process.

    Writers of one SQLite file take turns: the write lock is taken when the transaction begins, so what a transaction
    reads cannot change before it commits. PostgreSQL runs the same functions at READ COMMITTED; they lock the rows
    that they decide on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._turn = threading.RLock()

    @classmethod
    def open(cls, url: str) -> Self:
        """Opens `sqlite:///file` or `postgresql+psycopg://...` and applies what migrations are missing.

        Raises OperationFailed(SETTINGS_INVALID) for a URL that names no supported database and
        OperationFailed(STORAGE_FAILED) if it cannot be reached or was written by a newer release.
        """
        try:
            parsed = make_url(url)
            name = parsed.get_backend_name()
        except ArgumentError:
            raise OperationFailed(Reason.SETTINGS_INVALID, "the database URL cannot be read") from None
        if name == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise OperationFailed(Reason.SETTINGS_INVALID, "the database URL names no file")
            sqlite_file(url)
            engine = create_engine(
                parsed, hide_parameters=True, pool_size=16, max_overflow=16, connect_args={"timeout": BUSY_TIMEOUT_S}
            )
            _configure_sqlite(engine)
        elif name == "postgresql":
            try:
                engine = create_engine(parsed, hide_parameters=True, pool_size=16, pool_pre_ping=True)
            except (NoSuchModuleError, ModuleNotFoundError):
                raise OperationFailed(Reason.SETTINGS_INVALID, "the database's driver is not installed") from None
        else:
            raise OperationFailed(Reason.SETTINGS_INVALID, f"no support for {name} databases")
        database = cls(engine)
        try:
            database._migrate()
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that may write; commits at the end, rolls back on any exception.

        Raises OperationFailed(STORAGE_FAILED) if the database is unreachable, full or locked for too long.
        """
        if not self._is_sqlite:
            with self._transaction(write=True) as tx:
                yield tx
            return
        # Threads of one process queue here instead of polling SQLite's lock.
        with self._turn, self._transaction(write=True) as tx:
            yield tx

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction that only reads; on SQLite it sees one moment and never waits for writers.

        Raises OperationFailed(STORAGE_FAILED) as `write` does.
        """
        with self._transaction(write=False) as tx:
            yield tx

    def check(self) -> None:
        """Asks the database one question, for an honest readiness answer; raises OperationFailed(STORAGE_FAILED)."""
        with self.read() as tx:
            tx.execute(text("SELECT version_num FROM alembic_version"))

    def close(self) -> None:
        """Closes every idle connection."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Connection]:
        try:
            with (
                self._engine.connect().execution_options(fedcompute_write=write) as connection,
                connection.begin(),
            ):
                yield connection
        except (IntegrityError, DataError, ProgrammingError):
            raise
        except DatabaseError as error:
            # The driver's words name no value: parameters are hidden, and connection URLs are not part of them.
            raise OperationFailed(Reason.STORAGE_FAILED, f"the database refused: {error.orig}") from error

    def _migrate(self) -> None:
        with self.write() as tx:
            if tx.dialect.name == "postgresql":
                tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            if inspect(tx).has_table("alembic_version"):
                version = tx.execute(text("SELECT version_num FROM alembic_version")).scalar()
                if version == HEAD:
                    return
                if version is not None and version > HEAD:
                    raise OperationFailed(
                        Reason.STORAGE_FAILED, f"the database has schema {version}, this release knows {HEAD}"
                    )
            upgrade(tx)


def sqlite_file(url: str) -> Path | None:
    """The file that an SQLite URL names, its folder made if missing; None for any other URL, also an unreadable one.

    Raises OperationFailed(STORAGE_FAILED) if the folder cannot be made.
    """
    try:
        parsed = make_url(url)
        name = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        return None
    if name != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    path = Path(parsed.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"the database's folder cannot be made: {error.strerror}"
        ) from error
    return path


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling begins late and breaks DDL; `_begin` below replaces it.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "foreign_keys = ON", "synchronous = FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("fedcompute_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
