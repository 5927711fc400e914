"""`fedcompute secret`: the operator secret, under which a server's keys and secrets are stored."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.local_database import DatabaseUrl, DataDir, require_database

if TYPE_CHECKING:
    from fedcompute.server.settings import Settings

SecretFile = Annotated[
    Path | None,
    typer.Option("--secret-file", help="File with the present secret.", show_default="that of the server's settings"),
]

app = typer.Typer(no_args_is_help=True, help="Look after the operator secret of a server that is stopped.")


@app.command(epilog="Example: fedcompute secret rotate --data-dir fedcompute-data")
def rotate(
    new_secret_file: Annotated[
        Path | None,
        typer.Option(help="File with the new secret.", show_default="made in the data directory"),
    ] = None,
    secret_file: SecretFile = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """Seal every stored key and secret with a new operator secret; stop every server of the database first."""
    from fedcompute.server.security.secret_rotation import rotate_secret

    done = rotate_secret(_settings(data_dir, database_url, secret_file), new_secret_file)
    if as_json:
        kept = None if done.old_file is None else str(done.old_file)
        typer.echo(json.dumps({"old": done.old, "new": done.new, "values": done.values, "old_file": kept}))
        return
    typer.echo(f"{done.values} values are sealed with operator secret {done.new}, no longer with {done.old}")
    if done.old_file is None:
        typer.echo("start every server with the new one")
    else:
        typer.echo(f"backups made before need the old one, kept as {done.old_file}")


@app.command(epilog="Example: fedcompute secret check --data-dir fedcompute-data")
def check(
    secret_file: SecretFile = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """Say whether the operator secret opens every stored key and secret, and name it; a server may run meanwhile."""
    from fedcompute.server.security.operator_secret import open_sealer
    from fedcompute.storage.database import Database
    from fedcompute.storage.secrets import check_sealed

    settings = _settings(data_dir, database_url, secret_file)
    database = Database.open(settings.database)
    try:
        sealer = open_sealer(settings, database)
        with database.read() as tx:
            check_sealed(tx, sealer)
    finally:
        database.close()
    typer.echo(json.dumps({"id": sealer.id}) if as_json else f"operator secret {sealer.id} opens every stored secret")


def _settings(data_dir: Path | None, database_url: str | None, secret_file: Path | None) -> "Settings":
    from fedcompute.server.configuration import configure

    given = {"data_dir": data_dir, "database_url": database_url, "secret_file": secret_file}
    settings = configure({name: str(value) for name, value in given.items() if value is not None}, os.environ).settings
    # Else a wrong directory would get a database and a secret of its own.
    require_database(settings.database)
    return settings
