"""`fedcompute retention`: remove what is old now, instead of when the server next looks."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.local_database import DatabaseUrl, DataDir
from fedcompute.cli.stores import BlobUrl, open_stores, settings_of

_MOST_DAYS = 36_500
_DEFAULT = "the server's setting"

app = typer.Typer(no_args_is_help=True, help="Remove old updates, checkpoints and assignments, or show what is due.")


@app.callback()
def _group() -> None:
    """Remove old updates, checkpoints and assignments, or show what is due."""


@app.command(epilog="Example: fedcompute retention run --dry-run")
def run(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is due.")] = False,
    keep_updates_days: Annotated[
        float | None,
        typer.Option(
            help="Days to keep updates and sums of past rounds.", min=0, max=_MOST_DAYS, show_default=_DEFAULT
        ),
    ] = None,
    keep_checkpoints_days: Annotated[
        float | None,
        typer.Option(help="Days to keep checkpoints.", min=0, max=_MOST_DAYS, show_default=_DEFAULT),
    ] = None,
    keep_assignments_days: Annotated[
        float | None,
        typer.Option(help="Days to keep assignments of past tasks.", min=0, max=_MOST_DAYS, show_default=_DEFAULT),
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove what nobody needs any more, by the server's settings or shorter times; a server may run meanwhile.

    Never removes what a round under way needs, released models that rounds start from, or the privacy ledger.
    """
    from fedcompute.server.retention import Retention

    settings = settings_of(
        data_dir,
        database_url,
        blob_url,
        keep_updates_days=keep_updates_days,
        keep_checkpoints_days=keep_checkpoints_days,
        keep_assignments_days=keep_assignments_days,
    )
    with open_stores(settings) as stores:
        retention = Retention(stores.database, stores.blobs, settings)
        now = datetime.now(UTC)
        found = retention.due(now) if dry_run else retention.look(now)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "dry_run": dry_run}))
        return
    verb = "due" if dry_run else "removed"
    typer.echo(f"{verb}: updates and sums of {len(found.rounds)} rounds, {found.objects} objects")
    typer.echo(f"{verb}: {len(found.checkpoints)} checkpoints")
    typer.echo(f"{verb}: {found.rows} assignments and batches of {len(found.tasks)} tasks")
