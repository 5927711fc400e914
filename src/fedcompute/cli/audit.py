"""`fedcompute audit`: what operators have done."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect
from fedcompute.cli.local_database import DatabaseUrl, DataDir, local_database

app = typer.Typer(no_args_is_help=True, help="Show what operators have changed or tried to change.")


@app.callback()
def _group() -> None:
    """Show what operators have changed or tried to change."""


@app.command(epilog="Example: fedcompute audit log --limit 20 --server http://localhost:8080")
def log(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many acts, the newest ones.")] = 100,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the newest acts of the audit log, newest first.

    A server is asked for them with a key of the role operator; with --data-dir or --database-url they are read from its
    database.
    """
    local = data_dir is not None or database_url is not None
    acts = _stored(data_dir, database_url, limit) if local else connect(server, api_key_file).audit(limit)
    if as_json:
        typer.echo(json.dumps(acts))
        return
    if not acts:
        typer.echo("nothing has been changed yet")
    for act in acts:
        typer.echo(
            f"{act['time']}  {act['status']}  {act['action']:16} {act['subject']}  by {act['actor']}, {act['role']}"
            + (f"  request {act['request_id']}" if act["request_id"] else "")
        )


def _stored(data_dir: Path | None, database_url: str | None, limit: int) -> list[dict[str, Any]]:
    from fedcompute.server.api.audit import act_document
    from fedcompute.storage.audit import list_acts

    with local_database(data_dir, database_url) as database, database.read() as tx:
        return [act_document(row) for row in list_acts(tx, limit=limit)]
