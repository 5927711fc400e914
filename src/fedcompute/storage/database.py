"""The connection to the one relational database: SQLite by default, PostgreSQL for more than one machine."""

import hashlib
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage.migrations import HEAD, upgrade

Transaction = Connection
"""What every function of this room takes first; `Database.write` and `Database.read` yield it."""

BUSY_TIMEOUT_S = 30
# A server that froze in the middle of a transaction must not keep what it locked.
_IDLE_TIMEOUT_S = 60
_MIGRATION_LOCK = 0x6665646370
_POPULATION_LOCKS = 0x66656463
_DRIVER = "postgresql+psycopg"
# So that a database that vanished is missed within half a minute; the system's own patience is hours. A URL may say
# otherwise.
_CONNECTION = {
    "application_name": "fedcompute",
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
_DAMAGED = "the file is damaged: keep it, and restore a backup elsewhere"
# SQLite says what it is by a code.
_REMEDIES = {
    "SQLITE_NOTADB": _DAMAGED,
    "SQLITE_CORRUPT": _DAMAGED,
    "SQLITE_CANTOPEN": "SQLite writes beside its file, also to read it: the folder must be there and writable",
}


class Database:
    """One database, its schema brought up to date when it is opened. Safe for threads; one per process.

    Writers of one SQLite file take turns: the write lock is taken when the transaction begins, so what a transaction
    reads cannot change before it commits. Writers of PostgreSQL run side by side at READ COMMITTED. That is enough,
    because whatever they change is either a row that fits a condition, which PostgreSQL asks again of the newest
    version of the row once it has its lock, or was decided under `lock_population`, after which every statement sees
    all that earlier holders of the lock committed. Readers of both see one moment and wait for nobody.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._turn = threading.RLock()
        # Hears of every transaction: `read` or `write`, and how many seconds it took, waiting included.
        self.observe: Callable[[str, float], None] = lambda kind, seconds: None

    @classmethod
    def open(cls, url: str, *, upgrades: bool = True) -> Self:
        """Opens `sqlite:///file` or `postgresql://...` and applies what migrations are missing.

        Without `upgrades` a database of another schema, or without one, is refused like one of a newer release.
        Raises OperationFailed(SETTINGS_INVALID) for a URL that names no supported database or one whose driver is not
        installed, and OperationFailed(STORAGE_FAILED) if it cannot be reached, refuses to be set up or was written by
        a newer release.
        """
        try:
            parsed = make_url(url)
            name = parsed.get_backend_name()
        except (ArgumentError, ValueError):
            raise OperationFailed(Reason.SETTINGS_INVALID, "the database URL cannot be read") from None
        if name == "sqlite":
            engine = _sqlite_engine(parsed)
        elif name in ("postgresql", "postgres"):
            engine = _postgresql_engine(parsed)
        else:
            raise OperationFailed(Reason.SETTINGS_INVALID, f"no support for {name} databases")
        database = cls(engine)
        try:
            if upgrades:
                database._migrate()
            else:
                database._require_head()
        except BaseException as error:
            database.close()
            if isinstance(error, DBAPIError):
                raise database._refused(error) from None
            raise
        return database

    @property
    def takes_turns(self) -> bool:
        """Whether a write transaction keeps every other one waiting, of whatever population."""
        return self._is_sqlite

    @contextmanager
    def write(self, within: float | None = None) -> Iterator[Transaction]:
        """A transaction that may write; commits at the end, rolls back on any exception.

        With `within`, it has so many seconds for its work and for waiting on locks: whoever asked has left by then.
        Raises OperationFailed(STORAGE_FAILED) if the database is unreachable, full or locked for too long, or ends
        the transaction so that others can go on; nothing is written then and the work may be done again.
        """
        deadline = None if within is None else time.monotonic() + within
        with self._timed("write"):
            if not self._is_sqlite:
                with self._transaction(fedcompute_write=True) as tx:
                    if deadline is not None:
                        tx.exec_driver_sql(f"SET LOCAL lock_timeout = {_milliseconds(deadline)}")
                    yield tx
                    _check_time(deadline)
                return
            # Threads of one process queue here instead of polling SQLite's lock.
            if not self._turn.acquire(timeout=-1 if within is None else max(0.0, within)):
                raise _too_late()
            try:
                with self._transaction(fedcompute_write=True, fedcompute_deadline=deadline) as tx:
                    yield tx
                    _check_time(deadline)
            finally:
                self._turn.release()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction that only reads; it sees one moment and never waits for writers.

        Raises OperationFailed(STORAGE_FAILED) as `write` does.
        """
        options = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._timed("read"), self._transaction(fedcompute_write=False, **options) as tx:
            yield tx

    def check(self) -> None:
        """Asks the database one question, for an honest readiness answer; raises OperationFailed(STORAGE_FAILED)."""
        with self.read() as tx:
            tx.execute(text("SELECT version_num FROM alembic_version"))

    def scrub(self) -> None:
        """Rewrites an SQLite file, so that bytes which rows no longer hold are in no part of it; waits for nobody.

        PostgreSQL does so by itself, in time. Raises OperationFailed(STORAGE_FAILED).
        """
        if not self._is_sqlite:
            return
        try:
            with self._turn, closing(self._engine.raw_connection()) as connection:
                for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                    connection.cursor().execute(statement).fetchall()
        except sqlite3.Error as error:
            raise OperationFailed(Reason.STORAGE_FAILED, f"the database could not be rewritten: {error}") from None

    def close(self) -> None:
        """Closes every idle connection."""
        self._engine.dispose()

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe(kind, time.perf_counter() - started)

    @contextmanager
    def _transaction(self, **options: Any) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                connection.execution_options(**options)
                with connection.begin():
                    yield connection
        except (IntegrityError, DataError, ProgrammingError):
            raise
        except DBAPIError as error:
            # Without its cause: a traceback of a driver may show what it connected with.
            raise self._refused(error) from None
        except NoConnectionFree:
            raise OperationFailed(Reason.STORAGE_FAILED, "every connection to the database is in use") from None

    def _refused(self, error: DBAPIError) -> OperationFailed:
        # The driver's words name no value: parameters are hidden. A password may be part of what it could not read.
        words = " ".join(str(error.orig).split())
        for secret in _secrets(self._engine.url):
            words = words.replace(secret, "***")
        remedy = _REMEDIES.get(getattr(error.orig, "sqlite_errorname", ""))
        return OperationFailed(Reason.STORAGE_FAILED, f"the database refused: {words}", remedy=remedy)

    def _require_head(self) -> None:
        with self.read() as tx:
            known = inspect(tx).has_table("alembic_version")
            version = tx.execute(text("SELECT version_num FROM alembic_version")).scalar() if known else None
        if version != HEAD:
            found = f"has schema {version}" if version is not None else "holds no server's data"
            raise OperationFailed(
                Reason.STORAGE_FAILED,
                f"the database {found}, this release knows {HEAD}",
                remedy="use the release of the server that writes it; a server upgrades its database when it starts",
            )

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


def _check_time(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise _too_late()


def _too_late() -> OperationFailed:
    return OperationFailed(Reason.STORAGE_FAILED, "the database was busy for longer than the request may take")


def lock_population(tx: Transaction, population: str) -> None:
    """Keeps every other decision about a population waiting until this transaction ends; take it before you look.

    Whoever changes a population's tasks, rounds, ledger or budget, or gives away a place in a round, does so under
    this lock. A write transaction of SQLite has it anyway. Takes no lock for a second population while it holds one:
    two transactions that did so could wait for each other.
    """
    if tx.dialect.name == "postgresql":
        name = int.from_bytes(hashlib.sha256(population.encode()).digest()[:4], "big", signed=True)
        tx.execute(text("SELECT pg_advisory_xact_lock(:room, :name)"), {"room": _POPULATION_LOCKS, "name": name})


def sqlite_file(url: str) -> Path | None:
    """The file that an SQLite URL names, its folder made if missing, for its owner only; None for any other URL.

    Raises OperationFailed(STORAGE_FAILED) if the folder cannot be made.
    """
    path = sqlite_path(url)
    if path is None:
        return None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"the database's folder cannot be made: {error.strerror}"
        ) from error
    return path


def sqlite_path(url: str) -> Path | None:
    """The file that an SQLite URL names, there or not; None for any other URL, also an unreadable one."""
    try:
        parsed = make_url(url)
        name = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        return None
    if name != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    return Path(parsed.database)


def _sqlite_engine(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise OperationFailed(Reason.SETTINGS_INVALID, "the database URL names no file")
    file = sqlite_file(url.render_as_string(hide_password=False))
    if file is not None and "uri" not in url.query:
        # For its owner only, like what SQLite writes beside it; what is wrong with the place SQLite says better.
        with suppress(OSError):
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    engine = create_engine(
        url, hide_parameters=True, pool_size=16, max_overflow=16, connect_args={"timeout": BUSY_TIMEOUT_S}
    )
    _configure_sqlite(engine)
    return engine


def _postgresql_engine(url: URL) -> Engine:
    if url.drivername not in ("postgresql", "postgres", _DRIVER):
        raise OperationFailed(Reason.SETTINGS_INVALID, f"no support for {url.drivername}; write {_DRIVER}://")
    if "@" in (url.host or ""):
        # What stands behind the first @ is taken for the host, and hosts appear in messages.
        raise OperationFailed(Reason.SETTINGS_INVALID, "an @ in the database's user or password is written as %40")
    settings = {"lock_timeout": f"{BUSY_TIMEOUT_S}s", "idle_in_transaction_session_timeout": f"{_IDLE_TIMEOUT_S}s"}
    given = url.query.get("options", "")
    options = [
        *(f"-c {name}={value}" for name, value in settings.items()),
        *([given] if isinstance(given, str) else given),
    ]
    arguments: dict[str, Any] = {name: value for name, value in _CONNECTION.items() if name not in url.query}
    arguments["options"] = " ".join(options).strip()
    try:
        return create_engine(
            url.set(drivername=_DRIVER),
            hide_parameters=True,
            isolation_level="READ COMMITTED",
            pool_size=16,
            max_overflow=16,
            pool_pre_ping=True,
            connect_args=arguments,
        )
    except ImportError:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            "PostgreSQL's driver psycopg is not installed",
            remedy="install it with: pip install 'fedcompute[postgresql]'",
        ) from None


def _milliseconds(deadline: float | None) -> int:
    """How long a statement may wait for a lock."""
    if deadline is None:
        return BUSY_TIMEOUT_S * 1000
    # Whole seconds, so that it seldom changes from one use of a connection to the next.
    return 1000 * max(1, min(BUSY_TIMEOUT_S, math.ceil(deadline - time.monotonic())))


def _secrets(url: URL) -> list[str]:
    found = [url.password or ""]
    for name, value in url.query.items():
        if "password" in name:
            found += [value] if isinstance(value, str) else value
    return sorted((str(one) for one in found if one), key=len, reverse=True)


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
        options = connection.get_execution_options()
        write = options.get("fedcompute_write", False)
        patience = _milliseconds(options.get("fedcompute_deadline"))
        if connection.info.get("busy_timeout", BUSY_TIMEOUT_S * 1000) != patience:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {patience}")
            connection.info["busy_timeout"] = patience
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
