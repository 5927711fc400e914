"""`fedcompute device run|schedule|cancel|status|run-now`: the tasks of a device."""

import asyncio
import json
import os
import sys
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
    read_duration,
    when,
)
from fedcompute.errors import DeviceRunFailed, OperationFailed, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedcompute.device.directory import DeviceDirectory
    from fedcompute.device.state.device_log import LogEntry
    from fedcompute.device.state.tasks import Task

Population = Annotated[str, typer.Argument(help="Population of the task.")]
EnrolmentFile = Annotated[
    Path | None,
    typer.Option("--enrolment", help="File with this device's line ID:SECRET, for a server that asks for proof."),
]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the group."""
    app.command(epilog="Example: fedcompute device run")(run)
    app.command(epilog="Example: fedcompute device schedule digits --every 12h")(schedule)
    app.command(epilog="Example: fedcompute device cancel digits")(cancel)
    app.command(epilog="Example: fedcompute device status")(status)
    app.command("run-now", epilog="Example: fedcompute device run-now digits")(run_now)


def run(
    isolation: IsolationOption = Isolation.STRICT,
    enrolment: EnrolmentFile = None,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each event.")] = False,
) -> None:
    """Run the device: every task when it is due, background jobs beside them, until Ctrl-C or SIGTERM.

    A run that the end of the process cuts off is taken up at the next start. Other commands may schedule, cancel and
    change settings meanwhile.
    """
    # What parses and explains commands takes memory that an idle device can do without.
    # -P: modules that happen to lie in the working directory are not meant.
    arguments = [sys.executable, "-P", "-m", "fedcompute.device"]
    arguments += ["--report-isolation"] if isolation is Isolation.REPORT else []
    arguments += ["--enrolment", str(enrolment.absolute())] if enrolment is not None else []
    arguments += ["--json"] if as_json else []
    sys.stdout.flush()
    os.execv(sys.executable, [*arguments, str(device_dir.absolute())])


def schedule(
    population: Population,
    every: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Train again and again, no more often than this: 90s, 30m, 12h, 7d."),
    ] = None,
    service: Service = None,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """Schedule a task, or renew it, as its service would; without --every one that ends with its first success."""
    from fedcompute.device.facilities import NotAnswered
    from fedcompute.device.personalization import schedule_task
    from fedcompute.device.state.tasks import find, is_population

    interval = 0 if every is None else round(read_duration(every).total_seconds() * 1000)
    if not is_population(population):
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"{population[:80]!r} is no name of a population",
            remedy="name one as the task's configuration does",
        )
    with device_directory(device_dir) as device:
        with device.database.read() as tx:
            app = chosen_app(tx, service)
        try:
            schedule_task(device.database, app, population, every is not None, interval, time.time_ns() // 1_000_000)
        except NotAnswered as refusal:
            raise OperationFailed(
                Reason.SETTINGS_INVALID,
                f"{population} is not scheduled: {refusal}",
                remedy="see `fedcompute device config list`, `fedcompute device consent show` and the app's manifest",
            ) from None
        with device.database.read() as tx:
            task = find(tx, app.owner.job_id(population))
        in_use = device.in_use()
    if task is None:
        # Another command was quicker.
        raise OperationFailed(Reason.NOT_FOUND, f"{population} was cancelled meanwhile", remedy="schedule it again")
    if as_json:
        typer.echo(json.dumps(_task_document(task, in_use)))
    else:
        typer.echo(
            f"{population}: next run {when(task.earliest_run)} at the earliest, while `fedcompute device run` runs"
        )


def cancel(population: Population, service: Service = None, device_dir: DeviceDir = DEFAULT_DIRECTORY) -> None:
    """End a task; a run of it in progress is stopped."""
    from fedcompute.device.state.tasks import cancel

    with device_directory(device_dir) as device, device.database.write() as tx:
        found = cancel(tx, chosen_app(tx, service).owner, population)
    typer.echo(f"{population} is cancelled" if found else f"{population} was not scheduled")


def status(device_dir: DeviceDir = DEFAULT_DIRECTORY, as_json: options.AsJson = False) -> None:
    """Show the tasks, what they wait for, and the background jobs."""
    from fedcompute.device.jobs.background import earliest_runs
    from fedcompute.device.jobs.conditions import TRAINING, start_failures, unmet
    from fedcompute.device.jobs.flags import flags
    from fedcompute.device.jobs.sensors import Places, read_conditions
    from fedcompute.device.state.settings import consent
    from fedcompute.device.state.tasks import KILL_SWITCHES, list_tasks

    with device_directory(device_dir) as device:
        running = device.in_use()
        with device.database.read() as tx:
            tasks, jobs, rules, given = list_tasks(tx), earliest_runs(tx), flags(tx), consent(tx)
    conditions = read_conditions(rules, Places(temporary=device.path))
    waits = [*(f"{name} is on" for name in KILL_SWITCHES if rules.boolean(name))]
    waits += [] if given.measurement else ["measurement consent is revoked"]
    waits += unmet(conditions, TRAINING, rules) + start_failures(conditions, rules)
    if as_json:
        document = {
            "running": running, "waits_for": waits, "unknown": sorted(conditions.unknown),
            "tasks": [_task_document(task, running) for task in tasks], "background_jobs": dict(jobs),
        }  # fmt: skip
        typer.echo(json.dumps(document))
        return
    typer.echo(f"device      {device.path}, {'running' if running else 'not running; start `fedcompute device run`'}")
    typer.echo(f"conditions  {'; '.join(dict.fromkeys(waits)) or 'good'}")
    if conditions.unknown:
        typer.echo(f"            not known and taken as good: {', '.join(sorted(conditions.unknown))}")
    for task in tasks:
        kind = f"every {task.minimum_interval / 1000:g} s" if task.recurrent else "once"
        state = when(task.earliest_run)
        if task.forced or not task.pending:
            state = "now" if running else "at the start of the device"
        typer.echo(
            f"{task.population}  {kind}, job {task.job_id}\n"
            f"  next run {state}  last run {when(task.last_run_end)}  failures {task.reschedule_count}"
        )
    if not tasks:
        typer.echo("no tasks; schedule one with `fedcompute device schedule POPULATION`")
    for name, earliest in jobs:
        typer.echo(f"  {name:22} due {when(earliest)}")


def run_now(
    population: Population,
    service: Service = None,
    isolation: IsolationOption = Isolation.STRICT,
    enrolment: EnrolmentFile = None,
    device_dir: DeviceDir = DEFAULT_DIRECTORY,
    as_json: options.AsJson = False,
) -> None:
    """Run a scheduled task now, idle or not; battery, heat and storage are checked all the same.

    A running device does it; without one this command does.
    """
    from fedcompute.device.jobs.flags import flags
    from fedcompute.device.state.device_log import read_entries
    from fedcompute.device.state.tasks import KILL_SWITCHES, force

    with device_directory(device_dir) as device:
        with device.database.write() as tx:
            rules, owner = flags(tx), chosen_app(tx, service).owner
            if not force(tx, owner.job_id(population)):
                raise OperationFailed(
                    Reason.NOT_FOUND,
                    f"{population} is not scheduled",
                    remedy="schedule it with `fedcompute device schedule`, or have its service do it",
                )
            for name in KILL_SWITCHES:
                if rules.boolean(name):
                    raise OperationFailed(
                        Reason.SETTINGS_INVALID,
                        f"{name} is on",
                        remedy=f"switch it off with `fedcompute device config delete {name}`",
                    )
            last = max((entry.id for entry in read_entries(tx, limit=1)), default=0)

        def ended() -> "LogEntry | None":
            with device.database.read() as tx:
                entries = read_entries(tx, owner=owner, after=last, limit=1000)
            return next((one for one in entries if one.subject == population), None)

        if not device.in_use():
            _run_forced(device, isolation, enrolment)
        entry = _wait_until(device, population, ended)
    if as_json:
        typer.echo(json.dumps({"population": population, "outcome": entry.outcome, "detail": entry.detail}))
        raise typer.Exit(0 if entry.outcome == "ok" else 1)
    if entry.outcome != "ok":
        detail = f"{population}: {entry.outcome}: {entry.detail}"
        remedy = "schedule it again, once that has changed" if entry.outcome == "deleted" else None
        raise DeviceRunFailed(Reason.RUN_FAILED, detail, remedy=remedy)
    typer.echo(f"{population}: contributed")


def _run_forced(device: "DeviceDirectory", isolation: Isolation, enrolment: Path | None) -> None:
    """Runs what is forced in this process; nothing if a device has started meanwhile, which does it then."""
    from rich.console import Console

    from fedcompute.cli.progress import DeviceLine
    from fedcompute.device.client.authorization import read_own_enrolment
    from fedcompute.device.daemon import DaemonSettings, open_daemon
    from fedcompute.device.isolation.probe import check_isolation

    for line in check_isolation(strict=isolation is Isolation.STRICT):
        typer.echo(f"warning: {line}", err=True)

    async def run(settings: DaemonSettings) -> None:
        async with open_daemon(device, settings) as daemon:
            await daemon.run_forced()

    with DeviceLine(Console(stderr=True)) as progress:
        settings = DaemonSettings(
            strict=isolation is Isolation.STRICT,
            prove=None if enrolment is None else read_own_enrolment(enrolment).prove,
            linger=0.0,
            on_phase=lambda population, phase: progress.show(population, {phase: 1}),
        )
        try:
            asyncio.run(run(settings))
        except OperationFailed as error:
            if error.reason is not Reason.DATA_IN_USE:
                raise


def _wait_until(device: "DeviceDirectory", population: str, ended: "Callable[[], LogEntry | None]") -> "LogEntry":
    """The entry of the run, once whoever runs the device has written it."""
    from fedcompute.cli.progress import waiting

    with waiting(f"the running device trains {population} ..."):
        while True:
            running, entry = device.in_use(), ended()
            if entry is not None:
                return entry
            if not running:
                raise OperationFailed(
                    Reason.RUN_FAILED, f"{population}: the device stopped before it was done", remedy="try again"
                )
            time.sleep(0.2)


def _task_document(task: "Task", in_use: bool) -> dict[str, object]:
    return {
        "population": task.population,
        "service": task.owner.id,
        "job_id": task.job_id,
        "server": task.server,
        "recurrent": task.recurrent,
        "minimum_interval": task.minimum_interval,
        "earliest_run": task.earliest_run,
        "last_run_start": task.last_run_start,
        "last_run_end": task.last_run_end,
        "failures": task.reschedule_count,
        # What a process that has ended left running is taken up by the next one.
        "running": in_use and not task.pending,
    }
