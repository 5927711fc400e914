"""`fedcompute backup` and `fedcompute restore`: a server's database and objects as one folder."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.local_database import DatabaseUrl, DataDir
from fedcompute.cli.stores import BlobUrl, open_stores, settings_of
from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.server.settings import Settings
    from fedcompute.storage.backup import Manifest

_SECRET = "secret"

backup_app = typer.Typer(add_completion=False)
restore_app = typer.Typer(add_completion=False)


@backup_app.command(epilog="Example: fedcompute backup /mnt/backups/2026-03-01 --data-dir fedcompute-data")
def backup(
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the backup.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    with_secret: Annotated[
        bool, typer.Option("--with-secret", help="Copy the operator secret too; whoever has the folder has all.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Copy a server's database and the objects that it refers to; the server may run meanwhile.

    The operator secret, without which stored keys and secrets do not open, is left out unless asked for.
    """
    from fedcompute.storage.backup import back_up

    settings = settings_of(data_dir, database_url, blob_url)
    secret = _secret_file(settings) if with_secret else None
    with open_stores(settings) as stores, _progress() as progress:
        manifest = back_up(stores.database, stores.blobs, folder, datetime.now(UTC), progress)
    if secret is not None:
        _copy_secret(secret, folder / _SECRET)
    if as_json:
        typer.echo(json.dumps({**_summary(manifest), "with_secret": with_secret}))
        return
    rows = sum(facts["rows"] for facts in manifest.tables.values())
    typer.echo(f"backup of {manifest.created[:19]}: {rows} rows, {manifest.objects} objects, {manifest.bytes} bytes")
    if with_secret:
        typer.echo("the operator secret is in it: keep the folder like the secret itself")
    elif manifest.sealed_with:
        typer.echo(
            f"the operator secret {', '.join(manifest.sealed_with)} is not in it: keep a copy elsewhere, "
            "or nothing that the server sealed can be opened"
        )
    for one in manifest.missing:
        typer.echo(f"missing in the store: {one}", err=True)
    if manifest.missing:
        typer.echo("run `fedcompute doctor`: rows refer to objects that are not there", err=True)
        raise typer.Exit(1)


@restore_app.command(epilog="Example: fedcompute restore /mnt/backups/2026-03-01 --data-dir fedcompute-data")
def restore(
    folder: Annotated[Path, typer.Argument(help="Folder of a backup.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    check: Annotated[bool, typer.Option("--check", help="Only make sure that the backup is whole.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Fill an empty database and an empty blob store from a backup; no server may run on them.

    What was released after the backup is not in its privacy ledger: restore a copy that is as new as you have.
    """
    from fedcompute.storage.backup import check_backup
    from fedcompute.storage.backup import restore as restore_backup
    from fedcompute.storage.claim import Claim
    from fedcompute.storage.database import sqlite_file

    if check:
        with _progress() as progress:
            manifest = check_backup(folder, progress)
        _tell(manifest, "is whole", as_json)
        return
    settings = settings_of(data_dir, database_url, blob_url)
    if settings.database_url is None or settings.blob_url is None:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = sqlite_file(settings.database)
    with contextlib.ExitStack() as stack:
        if file is not None:
            stack.enter_context(Claim(file.with_name(file.name + ".lock")))
        stores = stack.enter_context(open_stores(settings, make=True))
        progress = stack.enter_context(_progress())
        manifest = restore_backup(stores.database, stores.blobs, folder, progress)
    secret = folder / _SECRET
    restored = False
    if secret.exists() and settings.secret_file is None and not (settings.data_dir / _SECRET).exists():
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _copy_secret(secret, settings.data_dir / _SECRET)
        restored = True
    _tell(manifest, "is restored", as_json)
    if as_json:
        return
    if manifest.sealed_with and not restored:
        typer.echo(f"start the server with operator secret {', '.join(manifest.sealed_with)}")
    typer.echo(
        f"releases after {manifest.created[:19]} are not in the restored ledger; "
        "if there were any, count them against the populations' budgets"
    )


def _tell(manifest: "Manifest", what: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_summary(manifest)))
        return
    rows = sum(facts["rows"] for facts in manifest.tables.values())
    typer.echo(f"the backup of {manifest.created[:19]} {what}: {rows} rows, {manifest.objects} objects")


def _summary(manifest: "Manifest") -> dict[str, object]:
    document = asdict(manifest)
    rows = {name: facts["rows"] for name, facts in manifest.tables.items()}
    return {**{name: document[name] for name in ("created", "release", "schema", "objects", "bytes")},
            "rows": rows, "sealed_with": manifest.sealed_with, "missing": manifest.missing}  # fmt: skip


def _secret_file(settings: "Settings") -> Path:
    path = settings.secret_file or settings.data_dir / _SECRET
    if not path.is_file():
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            "there is no file with the operator secret to copy",
            remedy="leave --with-secret out, and keep a copy of the variable FEDCOMPUTE_SECRET",
        )
    return path


def _copy_secret(source: Path, target: Path) -> None:
    try:
        target.touch(mode=0o600, exist_ok=False)
        shutil.copyfile(source, target)
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"the operator secret cannot be copied: {error.strerror}"
        ) from error


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """One line that changes, on a terminal; beside the output, so that pipes stay clean."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    with console.status("opening the stores") as status:
        yield lambda what, done, total: status.update(f"{what}: {done} of {total}")
