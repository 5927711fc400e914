"""`fedcompute audit`: what operators have done."""

import json
from typing import Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect

app = typer.Typer(no_args_is_help=True, help="Show what operators have changed or tried to change.")


@app.callback()
def _group() -> None:
    """Show what operators have changed or tried to change."""


@app.command(epilog="Example: fedcompute audit log --limit 20 --server http://localhost:8080")
def log(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many acts, the newest ones.")] = 100,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the newest acts of the audit log, newest first; needs the role operator."""
    acts = connect(server, api_key_file).audit(limit)
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
