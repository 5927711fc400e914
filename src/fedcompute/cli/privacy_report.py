"""`fedcompute privacy report`: what a task promised, released and spent, on a terminal and as a page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect
from fedcompute.cli.progress import waiting
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason

if TYPE_CHECKING:
    from fedcompute.monitoring.task_privacy import PlanFacts, TaskPrivacy
    from fedcompute.privacy.ledger_document import Ledger

app = typer.Typer()


@app.command(epilog="Example: fedcompute privacy report --population my_population --task-id 1 --html privacy.html")
def report(
    population: Annotated[
        str | None, typer.Option("--population", help="Population of the task.", show_default="that of --ledger")
    ] = None,
    task_id: options.TaskId = 1,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE.json", help="A downloaded ledger, in place of a server.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page for reviewers, complete in itself.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            "--estimated-population",
            min=1,
            help="Devices that rounds were drawn from.",
            show_default="what the task claims",
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="Probability that the promise may fail.", show_default="what the task claims"),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """What a task has spent so far, recomputed from the ledger of its population."""
    from fedcompute.monitoring.task_privacy import document, task_privacy
    from fedcompute.privacy.report import privacy_sentences

    if delta is not None and not 0 < delta < 1:
        raise OperationFailed(Reason.SETTINGS_INVALID, f"--delta: {delta:g} does not lie between 0 and 1")
    if ledger is not None:
        read, facts = _from_file(ledger, population)
    else:
        read, facts = _from_server(server, api_key_file, population, task_id)
    if not any(entry.task_id == task_id for entry in read.entries):
        if ledger is not None or html is not None:
            raise OperationFailed(
                Reason.NOT_FOUND,
                f"the ledger of {read.population} has no entry of task {task_id}",
                remedy="check the task id; a task's first entries appear when its first round completes",
            )
        text = "Nothing is spent: no round has completed."
        typer.echo(json.dumps({"releases": 0, "sentences": [text]}) if as_json else text)
        return
    with waiting("recomputing epsilon ..."):
        found = task_privacy(read, task_id, facts=facts, delta=delta, devices=devices)
    if html is not None:
        write_page(found, html)
    if as_json:
        page = None if html is None else str(html)
        typer.echo(json.dumps({**document(found), "sentences": privacy_sentences(found.report), "html": page}))
        return
    for line in _lines(found):
        typer.echo(line)
    if html is not None:
        typer.echo(f"  page        {html}")


def write_page(found: "TaskPrivacy", path: Path) -> Path:
    """Writes the page of a report and returns its path; raises OperationFailed (STORAGE_FAILED)."""
    from fedcompute.monitoring.privacy_page import privacy_page

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(privacy_page(found), encoding="utf-8")
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"{path} cannot be written: {error.strerror}", remedy="choose another --html"
        ) from error
    return path


def _from_file(file: Path, population: str | None) -> "tuple[Ledger, PlanFacts | None]":
    from fedcompute.privacy.ledger_document import BYTES_LIMIT, read_ledger

    try:
        with file.open("rb") as opened:
            read = read_ledger(opened.read(BYTES_LIMIT + 1))
    except OSError as error:
        raise OperationFailed(Reason.STORAGE_FAILED, f"{file} cannot be read: {error.strerror}") from error
    if population is not None and read.population != population:
        raise ArtifactInvalid(Reason.LEDGER_MALFORMED, f"it is the ledger of {read.population}, not of {population}")
    return read, None


def _from_server(
    url: str, api_key_file: Path | None, population: str | None, task_id: int
) -> "tuple[Ledger, PlanFacts | None]":
    from fedcompute.monitoring.plan_facts import plan_facts
    from fedcompute.privacy.ledger_document import ledger_from

    if population is None:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "no population", remedy="name --population, or a ledger file with --ledger"
        )
    api = connect(url, api_key_file)
    read = ledger_from(api.ledger(population))
    tasks = {entry.task_id for entry in read.entries}
    try:
        return read, plan_facts(api, population, task_id, sorted(tasks))
    except OperationFailed as error:
        # Entries outlive their tasks.
        if error.reason is not Reason.NOT_FOUND or task_id not in tasks:
            raise
        return read, None


def _lines(found: "TaskPrivacy") -> list[str]:
    from fedcompute.monitoring.privacy_words import number
    from fedcompute.privacy.report import privacy_sentences

    kind, status = (found.kind or "task").lower(), found.status.lower()
    lines = [f"{found.population}, task {found.task_id} ({kind}{', ' if status else ''}{status}): {found.mechanism}"]
    lines += [f"  note: computed for {text}" for text in found.asked]
    lines += [f"  {sentence}" for sentence in privacy_sentences(found.report)]
    low, high = found.population_bounds.lower, found.population_bounds.upper
    spent = number(high) if low == high else f"{number(low)} to {number(high)}"
    limit = "no budget limits it"
    if found.budget is not None:
        limit = f"{number(found.budget_spent)} of the budget of {number(found.budget.epsilon)} is spent"
    charged = sum(bool(one.participation) for one in found.tasks)
    lines.append(f"  population  epsilon {spent} by {charged} of {len(found.tasks)} tasks; {limit}")
    state = f"{len(found.problems)} findings, the first: {found.problems[0]}" if found.problems else "chain whole"
    lines.append(f"  ledger      {found.entries} entries, {state}; head {found.head}")
    return lines
