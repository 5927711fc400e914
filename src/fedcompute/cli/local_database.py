"""Commands that work on a server's own database, beside the server or without one."""

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedcompute.storage.database import Database, Transaction

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Data directory of the server.",
        show_default="that of the server's settings, fedcompute-data",
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url", help="SQLAlchemy URL of the server's database.", show_default="SQLite in the data directory"
    ),
]


@contextmanager
def local_database(data_dir: Path | None, database_url: str | None, *, make: bool = False) -> Iterator["Database"]:
    """The database of a server on this machine, found as the server finds it; it may run meanwhile.

    With `make` a missing one is made, so that what a server's first start needs can be made before. Raises
    OperationFailed: STORAGE_FAILED if there is none, else as `configure` and `Database.open` do.
    """
    from fedcompute.server.configuration import configure
    from fedcompute.storage.database import Database

    flags = {name: str(value) for name, value in (("data_dir", data_dir), ("database_url", database_url)) if value}
    url = configure(flags, os.environ).settings.database
    if not make:
        require_database(url)
    database = Database.open(url)
    try:
        yield database
    finally:
        database.close()


def require_database(url: str) -> None:
    """Raises OperationFailed(STORAGE_FAILED) if `url` names an SQLite file that is not there: a wrong directory."""
    from fedcompute.errors import OperationFailed, Reason
    from fedcompute.storage.database import sqlite_path

    file = sqlite_path(url)
    if file is not None and not file.exists():
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"there is no database {file.name} in {file.parent.name!r}",
            remedy="name the server's own with --data-dir or --database-url",
        )  # fmt: skip


def record_at_prompt(tx: "Transaction", action: str, subject: str) -> None:
    """Adds to the audit log what a person does at the server's own prompt, in the transaction of the change."""
    from fedcompute.storage.api_keys import Role
    from fedcompute.storage.audit import Act, record

    record(tx, Act(f"prompt ({_user()})", Role.OPERATOR.value, action, subject, 200, ""), datetime.now(UTC))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
