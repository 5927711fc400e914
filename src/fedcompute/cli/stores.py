"""Options that name the stores of a server on this machine, and the stores that they name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli.local_database import require_database

if TYPE_CHECKING:
    from fedcompute.server.settings import Settings
    from fedcompute.storage.blobs import BlobStore
    from fedcompute.storage.database import Database

BlobUrl = Annotated[
    str | None,
    typer.Option("--blob-url", help="URL of the server's blob store.", show_default="a folder in the data directory"),
]


@dataclass(frozen=True)
class Stores:
    """What a server keeps, and the settings that say where."""

    settings: "Settings"
    database: "Database"
    blobs: "BlobStore"


def settings_of(
    data_dir: Path | None, database_url: str | None, blob_url: str | None, **more: object | None
) -> "Settings":
    """The settings of a server, from flags, environment and settings file as the server itself finds them."""
    from fedcompute.server.configuration import configure

    given = {"data_dir": data_dir, "database_url": database_url, "blob_url": blob_url, **more}
    return configure({name: str(value) for name, value in given.items() if value is not None}, os.environ).settings


@contextmanager
def open_stores(settings: "Settings", *, make: bool = False) -> Iterator[Stores]:
    """Both stores; with `make` missing ones are made and old ones upgraded.

    Else raises OperationFailed(STORAGE_FAILED) for stores that are not there, and a database of another release.
    """
    from fedcompute.errors import OperationFailed, Reason
    from fedcompute.storage.blobs import local_folder, open_blob_store
    from fedcompute.storage.database import Database

    if not make:
        require_database(settings.database)
    folder = local_folder(settings.blobs)
    if folder is not None and not folder.is_dir() and not make:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"there is no blob store in {folder.name!r}",
            remedy="name the server's own with --data-dir or --blob-url",
        )  # fmt: skip
    database = Database.open(settings.database, upgrades=make)
    try:
        yield Stores(settings, database, open_blob_store(settings.blobs))
    finally:
        database.close()
