"""`fedcompute fleet`: many simulated devices against a server."""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.options import Workers
from fedcompute.cli.progress import DeviceLine

if TYPE_CHECKING:
    from fedcompute.fleet.processes import Fleet
    from fedcompute.fleet.settings import FleetSettings
    from fedcompute.fleet.spread import SpreadFleet

fleet = typer.Typer(no_args_is_help=True, help="Run many simulated devices against a server.")


@fleet.callback()
def _group() -> None:
    """Run many simulated devices against a server."""


@fleet.command(epilog="Example: fedcompute fleet run --server http://localhost:8080 --population digits --devices 40")
def run(
    population: Annotated[str, typer.Option(help="Population that the devices belong to.")],
    server: options.Server = options.DEFAULT_SERVER,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 40,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes that the devices share.")] = 2,
    data: Annotated[
        str, typer.Option(help="digits, a directory of IDX files, or a federated EMNIST .h5 file.")
    ] = "digits",
    seed: Annotated[int, typer.Option(help="Decides which device holds which images.")] = 0,
    enrolments: Annotated[
        Path | None,
        typer.Option(
            help="File of `fedcompute enrolment create` with a line for each device, for a server that asks for proof."
        ),
    ] = None,
    executor: Annotated[
        Workers, typer.Option(help="Where the worker processes are: on this machine, or spread over a Ray cluster.")
    ] = Workers.PROCESSES,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="Head of the cluster, or auto for the one that this machine is part of; its nodes reach --server, "
            "--data and this machine. Default: a Ray of this machine alone.",
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this long; default: until Ctrl-C.")] = None,
    log: Annotated[Path, typer.Option(help="File for what the devices complain about.")] = Path("fleet.log"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run devices that check in, train on handwriting and upload, over real HTTP, until stopped."""
    from fedcompute.fleet.settings import FleetSettings, read_fleet_enrolments

    settings = FleetSettings(
        server_url=server,
        population=population,
        devices=devices,
        processes=min(processes, devices),
        data=data,
        seed=seed,
        enrolments=None if enrolments is None else str(enrolments),
    )
    # Here, because the worker processes would only complain in the log.
    read_fleet_enrolments(settings)
    start = time.monotonic()
    before = _size(log)  # the devices append
    with _fleet(settings, log, executor, ray_address) as running:
        try:
            with DeviceLine() as line:
                while seconds is None or time.monotonic() - start < seconds:
                    running.check()
                    line.show(f"{running.progress.contributions} contributions", running.progress.by_state())
                    time.sleep(0.25)
        except KeyboardInterrupt:
            pass
    progress = running.progress
    if as_json:
        typer.echo(json.dumps({"contributions": progress.contributions, "outcomes": dict(progress.outcomes)}))
        return
    typer.echo(f"{progress.contributions} contributions in {time.monotonic() - start:.0f} s; runs by how they ended:")
    for outcome, count in progress.outcomes.most_common():
        typer.echo(f"  {outcome:24} {count}")
    if _size(log) > before:
        typer.echo(f"what devices complained about: {log}")


@contextmanager
def _fleet(
    settings: "FleetSettings", log: Path, executor: Workers, ray_address: str | None
) -> "Iterator[Fleet | SpreadFleet]":
    from fedcompute.fleet.processes import Fleet

    if executor is Workers.PROCESSES and ray_address is None:
        with Fleet(settings, log) as fleet:
            yield fleet
        return
    from fedcompute.fleet.spread import SpreadFleet, own_address
    from fedcompute.server.executors import open_executor

    with (
        closing(open_executor(executor.value, ray_address, settings.processes)) as workers,
        SpreadFleet(settings, log, workers, own_address(ray_address)) as spread,
    ):
        yield spread


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
