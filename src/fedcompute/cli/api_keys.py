"""`fedcompute api-key`: who may use a server's management API."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.local_database import DatabaseUrl, DataDir, local_database, record_at_prompt
from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.storage.api_keys import Role, create_api_key, list_api_keys, revoke_api_key

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys, on the server's own database.")


@app.command(epilog="Example: fedcompute api-key create --role operator --label alice > alice.key")
def create(
    label: Annotated[str, typer.Option(help="Whose key it is, or what for; stands in the audit log.")],
    role: Annotated[Role, typer.Option(help="viewer reads; builder also creates tasks; operator may do everything.")],
    days: Annotated[
        float | None, typer.Option(min=0, help="How long it is valid.", show_default="until it is revoked")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the key to this new file, for its owner's eyes only.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """Make an API key and print it, this once: the server keeps only its digest."""
    now = datetime.now(UTC)
    # Before the key is made: one that nobody can read again is of no use.
    target = None if out is None else _private_file(out)
    with local_database(data_dir, database_url, make=True) as database, database.write() as tx:
        expires = None if days is None else now + timedelta(days=days)
        key, text = create_api_key(tx, role, label, now, expires=expires)
        record_at_prompt(tx, "api_key.create", f"{key.id} ({key.label}) {role.value}")
    if target is not None:
        with os.fdopen(target, "w") as file:
            file.write(f"{text}\n")
    until = "never" if expires is None else expires.isoformat()
    if as_json:
        shown = {} if out is not None else {"key": text}
        typer.echo(json.dumps({"id": key.id, "label": key.label, "role": role.value, "expires": until, **shown}))
        return
    if out is None:
        typer.echo(text)
    typer.echo(
        f"API key {key.id} of {key.label}, role {role.value}, expires: {until}. It is not shown again; "
        "commands read it from --api-key-file or FEDCOMPUTE_API_KEY.",
        err=True,
    )


@app.command("list", epilog="Example: fedcompute api-key list --data-dir fedcompute-data")
def list_(data_dir: DataDir = None, database_url: DatabaseUrl = None, as_json: options.AsJson = False) -> None:
    """List every API key, without its secret."""
    from fedcompute.server.api.api_keys import key_document

    now = datetime.now(UTC)
    with local_database(data_dir, database_url) as database, database.read() as tx:
        keys = [key_document(key, now) for key in list_api_keys(tx)]
    if as_json:
        typer.echo(json.dumps(keys))
        return
    if not keys:
        typer.echo("no API keys; make one with `fedcompute api-key create`")
    for key in keys:
        state = "live" if key["live"] else "revoked" if key["revoked"] else "expired"
        until = f", until {key['expires']}" if key["expires"] and key["live"] else ""
        typer.echo(f"{key['id']}  {key['role']:8}  {state}{until}  {key['label']}")


@app.command(epilog="Example: fedcompute api-key revoke 0f1e2d3c4b5a")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as `api-key list` shows it.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """End an API key at once and for good."""
    with local_database(data_dir, database_url) as database, database.write() as tx:
        if not revoke_api_key(tx, key_id, datetime.now(UTC)):
            raise RequestRejected(
                Reason.NOT_FOUND, f"there is no live API key {key_id[:80]}", remedy="see `fedcompute api-key list`"
            )
        record_at_prompt(tx, "api_key.revoke", key_id)
    typer.echo(json.dumps({"revoked": key_id}) if as_json else f"API key {key_id} opens nothing any more")


def _private_file(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--out: {path} cannot be made: {error.strerror}", remedy="name a new file"
        ) from error
