"""`fedcompute task`: the tasks of a server, as an operator handles them."""

import json
import time
from typing import Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect
from fedcompute.cli.task_build import build
from fedcompute.cli.task_compare import compare
from fedcompute.cli.task_config import init, validate
from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.monitoring.operator_api import OperatorApi

_OVER = {"COMPLETED", "CANCELED", "FAILED"}
# A server that restarts is away for a moment; a watcher waits that long.
_PATIENCE_SECONDS = 30.0

app = typer.Typer(
    no_args_is_help=True, help="Configure, build, list, show, watch, compare, pause, resume, cancel and clone tasks."
)

app.command(
    "build",
    epilog="Example: fedcompute task build --model saved_model --config task_config.pbtxt --server http://localhost:8080",
)(build)
app.command("compare", epilog="Example: fedcompute task compare my_population/1 my_population/3 --out plots")(compare)
app.command("init", epilog="Example: fedcompute task init task_config.pbtxt --mode training_only")(init)
app.command("validate", epilog="Example: fedcompute task validate task_config.pbtxt")(validate)


@app.command("list", epilog="Example: fedcompute task list --population my_population")
def list_(
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    population: Annotated[str | None, typer.Option(help="Only tasks of this population.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the server's tasks, each with its newest round."""
    tasks = connect(server, api_key_file).tasks(population)
    if as_json:
        typer.echo(json.dumps(tasks))
        return
    if not tasks:
        typer.echo("no tasks; create some with `fedcompute task build`")
        return
    from rich.console import Console

    from fedcompute.cli.task_view import task_table

    Console().print(task_table(tasks))


@app.command(epilog="Example: fedcompute task show --population my_population --task-id 1")
def show(
    population: options.Population,
    task_id: options.TaskId = 1,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show one task: its rounds, its newest metrics, why uploads were rejected, what it released."""
    view = connect(server, api_key_file).task(population, task_id)
    if as_json:
        typer.echo(json.dumps(view))
        return
    from rich.console import Console

    from fedcompute.cli.task_view import task_view

    Console().print(task_view(view))


@app.command(epilog="Example: fedcompute task watch --population my_population --task-id 1")
def watch(
    population: options.Population,
    task_id: options.TaskId = 1,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per change.")] = False,
) -> None:
    """Watch a task until it ends; exit code 0 if it completed, 1 if it was canceled or failed."""
    api = connect(server, api_key_file)
    view = _watch_json(api, population, task_id, interval) if as_json else _watch(api, population, task_id, interval)
    status = view["task"]["status"]
    if status != "COMPLETED":
        failure = view.get("failure") or {}
        raise OperationFailed(
            Reason.TASK_ENDED,
            f"task {population}/{task_id} is {status}" + (f": {failure['message']}" if "message" in failure else ""),
            remedy=failure.get("remedy"),
        )


@app.command(epilog="Example: fedcompute task cancel --population my_population --task-id 1")
def cancel(
    population: options.Population,
    task_id: options.TaskId,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Cancel a task and its round in progress; released checkpoints and metrics stay."""
    status = connect(server, api_key_file).cancel(population, task_id)
    if status != "CANCELED":
        raise RequestRejected(
            Reason.TASK_CONFLICT,
            f"task {population}/{task_id} is {status} and stays so",
            remedy="nothing to do; only a task that is not over can be canceled",
        )
    _tell(population, task_id, status, as_json)


@app.command(epilog="Example: fedcompute task pause --population my_population --task-id 1")
def pause(
    population: options.Population,
    task_id: options.TaskId,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Pause a task: no more devices are assigned and no round follows; devices that have a place finish."""
    connect(server, api_key_file).pause(population, task_id)
    _tell(population, task_id, "PAUSED", as_json)


@app.command(epilog="Example: fedcompute task resume --population my_population --task-id 1")
def resume(
    population: options.Population,
    task_id: options.TaskId,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Resume a paused task where it stopped."""
    connect(server, api_key_file).resume(population, task_id)
    _tell(population, task_id, "OPEN", as_json)


@app.command(epilog="Example: fedcompute task clone --population my_population --task-id 1 --from-iteration 20")
def clone(
    population: options.Population,
    task_id: options.TaskId,
    from_iteration: Annotated[
        int | None,
        typer.Option(min=0, help="Start from what this round released.", show_default="the old task's first model"),
    ] = None,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Create a task with the fields and artifacts of an old one, as of one that is over."""
    task = connect(server, api_key_file).clone(population, task_id, from_iteration)
    if as_json:
        typer.echo(json.dumps(task))
        return
    typer.echo(f"task {population}/{task['task_id']} is a clone of {population}/{task_id}")
    typer.echo(
        f"watch with: fedcompute task watch --server {server} --population {population} --task-id {task['task_id']}"
    )


@app.command(epilog="Example: fedcompute task progress --population my_population --task-id 1")
def progress(
    population: options.Population,
    task_id: options.TaskId = 1,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show how far a task is, how fast it goes, and when it may be done."""
    found = connect(server, api_key_file).progress(population, task_id)
    if as_json:
        typer.echo(json.dumps(found))
        return
    from fedcompute.cli.task_view import progress_lines

    for line in progress_lines(found):
        typer.echo(line)


@app.command(epilog="Example: fedcompute task artifacts --population my_population --task-id 1")
def artifacts(
    population: options.Population,
    task_id: options.TaskId = 1,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List the plans and checkpoints of a task that can be downloaded."""
    found = connect(server, api_key_file).artifacts(population, task_id)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for one in found:
        of_round = "" if one["iteration_id"] is None else f" of round {one['iteration_id']}"
        typer.echo(f"{one['name']}{of_round}: {one['stored_bytes']:,} bytes, {server.rstrip('/')}{one['path']}")


def _tell(population: str, task_id: int, status: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"population": population, "task_id": task_id, "status": status}))
    else:
        typer.echo(f"task {population}/{task_id} is {status.lower()}")


def _watch(api: OperatorApi, population: str, task_id: int, interval: float) -> dict[str, Any]:
    from rich.console import Console
    from rich.live import Live

    from fedcompute.cli.task_view import task_view

    view = api.task(population, task_id)
    console = Console()
    try:
        with Live(task_view(view), console=console, refresh_per_second=4) as live:
            while view["task"]["status"] not in _OVER:
                time.sleep(interval)
                view = _patiently(api, population, task_id)
                live.update(task_view(view))
    finally:
        # In a file the library leaves the last line without its end.
        if not console.is_terminal:
            console.line()
    return view


def _watch_json(api: OperatorApi, population: str, task_id: int, interval: float) -> dict[str, Any]:
    from fedcompute.cli.task_view import summary

    view = api.task(population, task_id)
    typer.echo(json.dumps(last := summary(view)))
    while view["task"]["status"] not in _OVER:
        time.sleep(interval)
        view = _patiently(api, population, task_id)
        if (present := summary(view)) != last:
            typer.echo(json.dumps(last := present))
    return view


def _patiently(api: OperatorApi, population: str, task_id: int) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return api.task(population, task_id)
        except OperationFailed as error:
            if error.reason is not Reason.SERVER_UNREACHABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
