"""`fedcompute device config|consent|isolation`: what a device may do, and what its kernel sees to."""

import json
import time
from enum import StrEnum
from typing import Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.device_options import DEFAULT_DIRECTORY, DeviceDir, device_directory, when

config = typer.Typer(no_args_is_help=True, help="Flags of the device, with the names that Android has for them.")
consent_app = typer.Typer(no_args_is_help=True, help="What the user of the device allows.")

Name = Annotated[str, typer.Argument(metavar="FLAG", help="Name as `fedcompute device config list` shows it.")]


class ConsentKind(StrEnum):
    """The two consents."""

    MEASUREMENT = "measurement"
    PROTECTED_AUDIENCE = "protected_audience"


Which = Annotated[
    ConsentKind | None, typer.Argument(metavar="CONSENT", help="measurement or protected_audience; both without.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module that stand alone to the group."""
    app.command(epilog="Example: fedcompute device isolation")(isolation)


@config.command(epilog="Example: fedcompute device config put isolated_service_deadline_seconds 10")
def put(
    name: Name,
    value: Annotated[str, typer.Argument(help="true, false, a number or a text, as the flag wants it.")],
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
) -> None:
    """Set a flag. A running device obeys it from its next run on; the limits of requests, of training memory and of
    training time at its next start.
    """
    from fedcompute.device.jobs.flags import put_flag

    with device_directory(device_dir) as device, device.database.write() as tx:
        put_flag(tx, name, value)
    typer.echo(f"{name} {value}")


@config.command(epilog="Example: fedcompute device config get fcp_enable_encryption")
def get(name: Name, device_dir: DeviceDir = DEFAULT_DIRECTORY) -> None:
    """Print the value of a flag."""
    from fedcompute.device.jobs.flags import find_flag

    with device_directory(device_dir) as device, device.database.read() as tx:
        state = find_flag(tx, name)
    typer.echo(state.flag.show(state.value))


@config.command(epilog="Example: fedcompute device config delete isolated_service_deadline_seconds")
def delete(name: Name, device_dir: DeviceDir = DEFAULT_DIRECTORY) -> None:
    """Give a flag its default again."""
    from fedcompute.device.jobs.flags import delete_flag

    with device_directory(device_dir) as device, device.database.write() as tx:
        delete_flag(tx, name)
    typer.echo(f"{name} has its default")


@config.command("list", epilog="Example: fedcompute device config list --changed")
def list_(
    changed: Annotated[bool, typer.Option("--changed", help="Only those that are set.")] = False,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """List the flags: value, and what it means; those without effect here say why."""
    from fedcompute.device.jobs.flags import list_flags

    with device_directory(device_dir) as device, device.database.read() as tx:
        states = [state for state in list_flags(tx) if state.is_set or not changed]
    if as_json:
        typer.echo(json.dumps({state.flag.name: state.value for state in states}))
        return
    for state in states:
        flag = state.flag
        note = f" (no effect: {flag.no_effect})" if flag.no_effect else ""
        shown = flag.show(state.value) or '""'
        typer.echo(f"{'*' if state.is_set else ' '} {flag.name} = {shown}\n      {flag.help}{note}")


@consent_app.command(epilog="Example: fedcompute device consent give")
def give(which: Which = None, device_dir: DeviceDir = DEFAULT_DIRECTORY) -> None:
    """Give consent; given again within a day, the user's data stays."""
    _set(which, True, device_dir)


@consent_app.command(epilog="Example: fedcompute device consent revoke measurement")
def revoke(which: Which = None, device_dir: DeviceDir = DEFAULT_DIRECTORY) -> None:
    """Revoke consent: nothing trains or shows any more, and the user's data goes a day later."""
    _set(which, False, device_dir)


@consent_app.command(epilog="Example: fedcompute device consent show")
def show(device_dir: DeviceDir = DEFAULT_DIRECTORY, as_json: options.AsJson = False) -> None:
    """Show what is allowed."""
    from fedcompute.device.jobs.background import earliest_runs
    from fedcompute.device.state.settings import RESET, consent

    with device_directory(device_dir) as device, device.database.read() as tx:
        given, wipe = consent(tx), dict(earliest_runs(tx)).get(RESET)
    if as_json:
        document = {"measurement": given.measurement, "protected_audience": given.protected_audience, "wipe": wipe}
        typer.echo(json.dumps(document))
        return
    for kind in ConsentKind:
        typer.echo(f"{kind.value:20} {'given' if getattr(given, kind.value) else 'revoked'}")
    if wipe is not None:
        typer.echo(f"the user's data goes at {when(wipe)}, while the device runs")


def isolation(as_json: options.AsJson = False) -> None:
    """Try the isolation of services and training on this machine, and say what the kernel enforces.

    Exit code 0 only if it enforces all of it.
    """
    from fedcompute.device.isolation.probe import probe

    report = probe()
    if as_json:
        typer.echo(json.dumps([{"name": r.name, "enforced": r.enforced, "by": r.by, "why": r.why} for r in report]))
    else:
        for one in report:
            typer.echo(f"{one.name:12} {'enforced' if one.enforced else 'NOT ENFORCED':14} {', '.join(one.by)}")
            if one.why:
                typer.echo(f"{'':12} {one.why}")
    if not all(one.enforced for one in report):
        raise typer.Exit(1)


def _set(which: ConsentKind | None, given: bool, device_dir: DeviceDir) -> None:
    from fedcompute.device.state.settings import set_consent

    kinds = list(ConsentKind) if which is None else [which]
    with device_directory(device_dir) as device, device.database.write() as tx:
        for kind in kinds:
            set_consent(tx, kind.value, given, time.time_ns() // 1_000_000)
    typer.echo(f"{' and '.join(kind.value for kind in kinds)}: {'given' if given else 'revoked'}")
