"""`fedcompute enrolment`: which devices may answer a server's challenges with a secret."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.local_database import DatabaseUrl, DataDir, local_database, record_at_prompt
from fedcompute.errors import OperationFailed, Reason, RequestRejected

if TYPE_CHECKING:
    from fedcompute.crypto.sealing import Sealer
    from fedcompute.storage.database import Database

app = typer.Typer(no_args_is_help=True, help="Enrol devices, list and revoke them, on the server's own database.")

SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        help="File with the server's operator secret.",
        show_default="the server's: FEDCOMPUTE_SECRET, or the file in its data directory",
    ),
]


@app.command(epilog="Example: fedcompute enrolment create --label fleet --count 40 --out fleet.enrolments")
def create(
    label: Annotated[str, typer.Option(help="Whose devices they are, or what for.")],
    out: Annotated[Path, typer.Option(help="Write the secrets to this new file, for its owner's eyes only.")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many devices to enrol.")] = 1,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    secret_file: SecretFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Enrol devices and write their secrets to a file, one line ID:SECRET a device; nobody can read them again."""
    from fedcompute.server.security.enrolment import enrolment_line, new_enrolment
    from fedcompute.storage.enrolments import create_enrolment

    now = datetime.now(UTC)
    news = [new_enrolment(label) for _ in range(count)]
    with _own_server(data_dir, database_url, secret_file) as (database, sealer):
        # Before anything is stored: a secret that nobody has is of no use.
        target = _private_file(out)
        with database.write() as tx:
            for new in news:
                create_enrolment(tx, sealer, new, now)
                record_at_prompt(tx, "enrolment.create", f"{new.id} ({label})")
    with os.fdopen(target, "w") as file:
        file.writelines(f"{enrolment_line(new)}\n" for new in news)
    if as_json:
        typer.echo(json.dumps({"ids": [new.id for new in news], "label": label, "file": str(out)}))
        return
    typer.echo(
        f"{count} enrolment{'s' if count > 1 else ''} of {label} in {out}; hand each device its line and delete it"
    )


@app.command("list", epilog="Example: fedcompute enrolment list --data-dir fedcompute-data")
def list_(data_dir: DataDir = None, database_url: DatabaseUrl = None, as_json: options.AsJson = False) -> None:
    """List every enrolment, without its secret."""
    from fedcompute.server.api.enrolments import enrolment_document
    from fedcompute.storage.enrolments import list_enrolments

    with local_database(data_dir, database_url) as database, database.read() as tx:
        rows = list_enrolments(tx)
    if as_json:
        typer.echo(json.dumps([enrolment_document(row) for row in rows]))
        return
    if not rows:
        typer.echo("no enrolments; make one with `fedcompute enrolment create`")
    for row in rows:
        state = "live   " if row.revoked is None else "revoked"
        typer.echo(f"{row.id}  {state}  {row.label}")


@app.command(epilog="Example: fedcompute enrolment revoke 0f1e2d3c4b5a6978")
def revoke(
    enrolment_id: Annotated[str, typer.Argument(metavar="ID", help="Id as `enrolment list` shows it.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """End an enrolment, and every token it was granted, at once and for good."""
    from fedcompute.storage.enrolments import revoke_enrolment

    with local_database(data_dir, database_url) as database, database.write() as tx:
        if not revoke_enrolment(tx, enrolment_id, datetime.now(UTC)):
            raise RequestRejected(
                Reason.NOT_FOUND, f"there is no live enrolment {enrolment_id[:80]}", remedy="see `enrolment list`"
            )
        record_at_prompt(tx, "enrolment.revoke", enrolment_id)
    typer.echo(json.dumps({"revoked": enrolment_id}) if as_json else f"enrolment {enrolment_id} is taken no more")


@contextmanager
def _own_server(
    data_dir: Path | None, database_url: str | None, secret_file: Path | None
) -> "Iterator[tuple[Database, Sealer]]":
    """The database of a server on this machine, and what seals its secrets, both found as the server finds them."""
    from fedcompute.server.configuration import configure
    from fedcompute.server.security.operator_secret import open_sealer
    from fedcompute.storage.database import Database

    given = {"data_dir": data_dir, "database_url": database_url, "secret_file": secret_file}
    settings = configure({name: str(value) for name, value in given.items() if value}, os.environ).settings
    database = Database.open(settings.database)
    try:
        yield database, open_sealer(settings, database)
    finally:
        database.close()


def _private_file(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--out: {path} cannot be made: {error.strerror}", remedy="name a new file"
        ) from error
