"""`fedcompute device install|uninstall|apps|execute|download|logs`: apps, and what their services do."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.device_options import (
    DEFAULT_DIRECTORY,
    DeviceDir,
    Isolation,
    IsolationOption,
    Service,
    chosen_app,
    device_directory,
    when,
)
from fedcompute.errors import DeviceRunFailed, OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.device.directory import DeviceDirectory

# Numbers as JSON has them; whatever else looks like one stays text.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,400})(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the group."""
    app.command(epilog="Example: fedcompute device install my_app")(install)
    app.command(epilog="Example: fedcompute device uninstall --service SampleService")(uninstall)
    app.command(epilog="Example: fedcompute device apps --json")(apps)
    app.command(epilog="Example: fedcompute device execute --param schedule_training=digits")(execute)
    app.command(epilog="Example: fedcompute device download")(download)
    app.command(epilog="Example: fedcompute device logs --follow")(logs)


def install(
    code: Annotated[Path, typer.Argument(help="Folder with the app's Python code and its manifest.")],
    manifest: Annotated[Path | None, typer.Option(help="The manifest, if the folder holds none or several.")] = None,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """Install an app, or replace its code and manifest; what its service has stored stays.

    The folder is used where it is. Services may read it, so it holds code and what comes with it, nothing else.
    """
    from fedcompute.device.jobs.background import force
    from fedcompute.device.manifest import read_manifest
    from fedcompute.device.owner import Owner
    from fedcompute.device.state.apps import App, install

    found = read_manifest(manifest if manifest is not None else code)
    folder = code.resolve()
    if not folder.is_dir():
        raise OperationFailed(Reason.SETTINGS_INVALID, f"{code} is no folder", remedy="name the folder of the code")
    if device_dir.resolve().is_relative_to(folder):
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"the device's directory {device_dir} lies in the app's folder, which services may read",
            remedy="keep the app in a folder of its own, or name another --device-dir",
        )
    owner = Owner(found.package, found.service, found.certificate_digest)
    with device_directory(device_dir) as device, device.database.write() as tx:
        install(tx, App(owner, folder, found.server, found.download), time.time_ns() // 1_000_000)
        force(tx, "download")
    for what, url in (("federated-compute-settings", found.server), ("download-settings", found.download)):
        _warn(what, url)
    if as_json:
        typer.echo(json.dumps({"service": owner.id, "server": found.server, "download": found.download}))
        return
    typer.echo(f"installed {owner.id}\n  code       {folder}\n  server     {found.server or 'none'}")
    typer.echo(f"  downloads  {found.download or 'none'}")


def uninstall(service: Service = None, device_dir: DeviceDir = DEFAULT_DIRECTORY) -> None:
    """Remove an app with everything that is stored for it; its code stays where it is."""
    from fedcompute.device.state.apps import uninstall

    with device_directory(device_dir) as device:
        with device.database.write() as tx:
            found = chosen_app(tx, service)
            uninstall(tx, found.owner)
        device.database.forget()
    typer.echo(f"removed {found.owner.id}, its tasks and its data")


def apps(device_dir: DeviceDir = DEFAULT_DIRECTORY, as_json: options.AsJson = False) -> None:
    """List the installed apps."""
    from fedcompute.device.state.apps import list_apps

    with device_directory(device_dir) as device, device.database.read() as tx:
        found = list_apps(tx)
    if as_json:
        rows = [
            {"service": one.owner.id, "code": str(one.code), "server": one.server, "download": one.download}
            for one in found
        ]
        typer.echo(json.dumps(rows))
        return
    if not found:
        typer.echo("no apps; install one with `fedcompute device install FOLDER`")
    for one in found:
        typer.echo(f"{one.owner.id}\n  code {one.code}  server {one.server or 'none'}")


def execute(
    service: Service = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="KEY=VALUE", help="A parameter for the service; numbers arrive as numbers."),
    ] = None,
    render: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Also render what the service wants to show.")
    ] = None,
    caller: Annotated[str, typer.Option(help="Package of the app that asks.")] = "fedcompute.cli",
    isolation: IsolationOption = Isolation.STRICT,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """Ask a service as an app does: calls its on_execute, and with --render its on_render."""
    from fedcompute.device.developer.errors import IllegalState, OnDevicePersonalizationException
    from fedcompute.device.manager import OnDevicePersonalizationManager

    params = dict(_parameter(text) for text in param or ())
    size = None if render is None else _size(render)

    async def ask(component: str) -> tuple[bool, str | None]:
        async with OnDevicePersonalizationManager(device_dir, caller, strict=isolation is Isolation.STRICT) as manager:
            answer = await manager.execute(component, params)
            if size is None or answer.surface_package_token is None:
                return answer.surface_package_token is not None, None
            surface = await manager.request_surface_package(answer.surface_package_token, *size)
            return True, surface.html

    with device_directory(device_dir) as device, device.database.read() as tx:
        component = chosen_app(tx, service).owner.id
    try:
        shows, html = asyncio.run(ask(component))
    except (OnDevicePersonalizationException, IllegalState) as error:
        raise DeviceRunFailed(Reason.WORKER_FAILED, str(error)) from error
    if as_json:
        typer.echo(json.dumps({"service": component, "has_surface": shows, "html": html}))
    elif html is not None:
        typer.echo(html)
    else:
        typer.echo(f"{component} answered; " + ("it has something to show" if shows else "nothing to show"))


def download(
    isolation: IsolationOption = Isolation.STRICT,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """Fetch now what the installed apps' manifests name, and hand it to their services.

    A running device does it; without one this command does.
    """
    from fedcompute.cli.progress import waiting
    from fedcompute.device.state.device_log import read_entries

    with device_directory(device_dir) as device:
        with device.database.read() as tx:
            last = max((entry.id for entry in read_entries(tx, limit=1)), default=0)
        with waiting("fetching ..."):
            if device.in_use():
                _have_it_downloaded(device)
            else:
                asyncio.run(_download(device, strict=isolation is Isolation.STRICT))
        with device.database.read() as tx:
            found = read_entries(tx, after=last, limit=1000)
        entries = [entry for entry in found if entry.subject == "download" and entry.owner is not None]
    if as_json:
        rows = [{"service": one.owner, "outcome": one.outcome, "detail": one.detail} for one in entries]
        typer.echo(json.dumps(rows))
    else:
        for entry in entries:
            typer.echo(f"{entry.owner}  {entry.outcome}  {entry.detail}")
        if not entries:
            typer.echo("no installed app declares a download")
    # A file that brings nothing new is no failure.
    if any(entry.outcome not in ("ok", "discarded") for entry in entries):
        raise typer.Exit(1)


def logs(
    service: Annotated[str | None, typer.Option("--service", help="Only of this service.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many of the newest entries.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until Ctrl-C.")] = False,
    output: Annotated[bool, typer.Option(help="Also what the developer's code printed.")] = True,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """Show what happened: operations of services with what they printed, runs of tasks, downloads."""
    from fedcompute.device.state.device_log import LogEntry, read_entries

    def show(entry: LogEntry) -> None:
        if as_json:
            shown = {
                "time": entry.time, "service": entry.owner, "subject": entry.subject, "outcome": entry.outcome,
                "detail": entry.detail, "output": entry.output,
            }  # fmt: skip
            typer.echo(json.dumps(shown))
            return
        typer.echo(f"{when(entry.time)}  {entry.subject:24} {entry.outcome:18} {entry.detail}".rstrip())
        if output and entry.output:
            typer.echo("\n".join(f"    | {line}" for line in entry.output.rstrip().splitlines()))

    with device_directory(device_dir) as device:
        with device.database.read() as tx:
            owner = None if service is None else chosen_app(tx, service).owner
            entries = read_entries(tx, owner=owner, limit=limit)
        if not entries and not follow and not as_json:
            typer.echo("nothing has happened yet")
        last = 0
        try:
            while True:
                for entry in entries:
                    show(entry)
                    last = entry.id
                if not follow:
                    return
                time.sleep(0.5)
                with device.database.read() as tx:
                    entries = read_entries(tx, owner=owner, after=last, limit=1000)
        except KeyboardInterrupt:
            return


async def _download(device: "DeviceDirectory", *, strict: bool) -> None:
    from fedcompute.device.daemon import DaemonSettings, open_daemon

    async with open_daemon(device, DaemonSettings(strict=strict)) as daemon:
        await daemon.download()


def _have_it_downloaded(device: "DeviceDirectory") -> None:
    """Makes the running device's job due, and waits for its end."""
    from fedcompute.device.jobs.background import earliest_runs, force
    from fedcompute.device.jobs.conditions import Constraint, unmet
    from fedcompute.device.jobs.flags import flags
    from fedcompute.device.jobs.sensors import Places, read_conditions

    with device.database.write() as tx:
        rules = flags(tx)
        force(tx, "download")
    conditions = read_conditions(rules, Places(temporary=device.path))
    waits = ["global_kill_switch is on"] if rules.boolean("global_kill_switch") else []
    waits += unmet(conditions, {Constraint.UNMETERED}, rules)
    if waits:
        raise OperationFailed(
            Reason.RUN_FAILED, f"the running device waits: {', '.join(waits)}", remedy="see `fedcompute device status`"
        )
    while device.in_use():
        with device.database.read() as tx:
            due = dict(earliest_runs(tx)).get("download", 0)
        # 0 from when it was made due until it has ended.
        if due > 0:
            return
        time.sleep(0.2)
    raise OperationFailed(Reason.RUN_FAILED, "the device stopped before it was done", remedy="try again")


def _parameter(text: str) -> tuple[str, bool | int | float | str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise OperationFailed(Reason.SETTINGS_INVALID, f"--param {text}", remedy="write it as KEY=VALUE")
    if value in ("true", "false"):
        return key, value == "true"
    if not _NUMBER.fullmatch(value):
        return key, value
    number = float(value) if set(value) & set(".eE") else int(value)
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"--param {text[:80]}: more than 64 bits", remedy="name a smaller number"
        )
    return key, number


def _warn(what: str, url: str | None) -> None:
    """Of a URL that every request will be refused for."""
    from fedcompute.device.client.http import check_url

    try:
        if url is not None:
            check_url(url, what)
    except DeviceRunFailed as error:
        typer.echo(f"warning: {error.detail}: devices will not use it", err=True)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OperationFailed(Reason.SETTINGS_INVALID, f"--render {text}", remedy="write it like 320x240")
    return int(width), int(height)
