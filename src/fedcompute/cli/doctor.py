"""`fedcompute doctor`: what is stuck or inconsistent, and what to do."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.local_database import DatabaseUrl, DataDir
from fedcompute.cli.progress import waiting
from fedcompute.cli.stores import BlobUrl, open_stores, settings_of
from fedcompute.errors import FedComputeError

if TYPE_CHECKING:
    from fedcompute.server.doctor.findings import Finding, Limits


def doctor(
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    blob_url: BlobUrl = None,
    server: Annotated[
        str | None, typer.Option("--server", help="Ask a server over HTTP instead of looking into its stores.")
    ] = None,
    api_key_file: options.ApiKeyFile = None,
    collecting_hours: Annotated[float, typer.Option(min=0, help="How long a round may collect.")] = 24.0,
    working_minutes: Annotated[float, typer.Option(min=0, help="How long a sum or an update may take.")] = 15.0,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended without a decision.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Find tasks, rounds, objects, keys and ledgers that are stuck or inconsistent, and say what to do.

    Only reads, unless told to fix; a server may run meanwhile. Exit code 0 if all is well, 1 if anything was found.
    """
    from fedcompute.server.doctor.findings import Limits

    limits = replace(Limits(), collecting=collecting_hours * 3_600, working=working_minutes * 60)
    if server is not None:
        from fedcompute.cli.doctor_live import examine_server

        found = list(examine_server(server.rstrip("/"), api_key_file, limits, datetime.now(UTC)))
        fixed: list[Finding] = []
    else:
        found, fixed = _examine_stores(data_dir, database_url, blob_url, limits, fix)
    if as_json:
        typer.echo(json.dumps({"healthy": not found, "findings": [_document(one, one in fixed) for one in found]}))
    else:
        _show(found, fixed)
    if len(found) > len(fixed):
        raise typer.Exit(1)


def _examine_stores(
    data_dir: Path | None, database_url: str | None, blob_url: str | None, limits: "Limits", fix: bool
) -> "tuple[list[Finding], list[Finding]]":
    from fedcompute.server.doctor.examination import examine
    from fedcompute.server.doctor.findings import Finding, Patient

    settings = settings_of(data_dir, database_url, blob_url)
    try:
        with waiting("looking into the stores"), open_stores(settings) as stores:
            patient = Patient(settings, stores.database, stores.blobs, datetime.now(UTC))
            found = examine(patient, limits)
            return found, [one for one in found if fix and _mend(one)]
    except FedComputeError as error:
        return [Finding("stores_unusable", "stores", error.detail, error.remedy)], []


def _mend(one: "Finding") -> bool:
    if one.fix is None:
        return False
    try:
        one.fix()
    except (FedComputeError, OSError) as error:
        typer.echo(f"{one.code} {one.subject}: could not be fixed: {error}", err=True)
        return False
    return True


def _document(one: "Finding", fixed: bool) -> dict[str, Any]:
    return {
        "code": one.code,
        "subject": one.subject,
        "what": one.what,
        "remedy": one.remedy,
        "numbers": one.numbers,
        "fixable": one.fix is not None,
        "fixed": fixed,
    }


def _show(found: "list[Finding]", fixed: "list[Finding]") -> None:
    for one in found:
        typer.echo(f"{one.code}  {one.subject}")
        typer.echo(f"  {one.what}")
        typer.echo("  fixed" if one in fixed else f"  to do: {one.remedy}")
    if not found:
        typer.echo("nothing is stuck or inconsistent")
    else:
        typer.echo(f"{len(found)} finding{'s' if len(found) > 1 else ''}, {len(fixed)} fixed")
