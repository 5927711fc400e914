"""`fedcompute privacy ledger`, `verify` and `budget`: what was released, whether that is true, what may follow."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason

# Seconds of silence before progress is shown.
_PATIENCE = 2.0

_File = Annotated[
    Path | None,
    typer.Argument(metavar="[LEDGER.json]", help="A downloaded ledger; without it the server's is read."),
]
_OptionalPopulation = Annotated[str | None, typer.Option("--population", help="Population whose ledger it is.")]


def ledger(
    population: options.Population,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
) -> None:
    """Print a population's ledger as JSON: everything released about its devices, chained entry by entry."""
    json.dump(connect(server, api_key_file).ledger(population), sys.stdout, indent=1)
    typer.echo()


def verify(
    file: _File = None,
    population: _OptionalPopulation = None,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    head: Annotated[
        str | None,
        typer.Option(help="A head noted earlier, which must still be in the chain: only it shows a cut end."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Recompute a ledger's chain and every epsilon in it from scratch; exit code 1 if anything is wrong."""
    from fedcompute.privacy import chain

    found = _ledger(file, population, server, api_key_file)
    if population is not None and found.population != population:
        raise ArtifactInvalid(Reason.LEDGER_MALFORMED, f"it is the ledger of {found.population}, not of {population}")
    foreign = [f"entry {one.sequence} is of another population" for one in found.entries[:1]]
    checks = {
        "chain": chain.verify_chain(found.entries, noted=None if head is None else head.strip().lower()),
        "events": chain.verify_events(found.entries),
    }
    if found.entries and found.entries[0].population != found.population:
        checks["chain"] += foreign
    checks["epsilon"] = (
        ["not recomputed: an event or a claim cannot be read"]
        if checks["events"]
        else _verified_epsilons(found.entries)
    )
    problems = [problem for findings in checks.values() for problem in findings]
    last = found.entries[-1] if found.entries else None
    if as_json:
        document: dict[str, Any] = {
            "population": found.population,
            "entries": len(found.entries),
            "head": chain.head(found.entries),
            "cumulative_epsilon": last.cumulative_epsilon if last else 0.0,
            "delta": last.delta if last else None,
            "problems": problems,
        }
        typer.echo(json.dumps(document))
    else:
        told = {
            "chain": f"{len(found.entries)} entries follow each other, none changed, missing or twice",
            "events": f"{sum(one.event is not None for one in found.entries)} charges, all of a known form",
            "epsilon": _told_epsilon(last),
        }
        typer.echo(f"ledger of population {found.population}")
        for name, findings in checks.items():
            typer.echo(f"  {name:8} {'ok    ' + told[name] if not findings else 'WRONG ' + findings[0]}")
            for problem in findings[1:]:
                typer.echo(f"  {'':14} {problem}")
        typer.echo(f"  head     {chain.head(found.entries)}")
    if problems:
        raise ArtifactInvalid(Reason.LEDGER_TAMPERED, f"{len(problems)} findings in the ledger of {found.population}")


def budget(
    population: options.Population,
    epsilon: Annotated[float | None, typer.Option(help="Set: all tasks together may release at most so much.")] = None,
    delta: Annotated[float | None, typer.Option(help="Set: the delta of that epsilon.")] = None,
    assumption: Annotated[
        str, typer.Option(help="Set: CLAIMED (as each task claims) or NO_AMPLIFICATION (devices come when they like).")
    ] = "CLAIMED",
    remove: Annotated[bool, typer.Option("--remove", help="Take the budget away: nothing limits releases.")] = False,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show, set or remove a population's privacy budget, and what is spent and left of it."""
    api = connect(server, api_key_file)
    if (epsilon is None) != (delta is None) or (remove and epsilon is not None):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "a budget is set with --epsilon and --delta, or removed with --remove"
        )
    if remove:
        api.remove_budget(population)
    elif epsilon is not None and delta is not None:
        if not (math.isfinite(epsilon) and math.isfinite(delta)):
            raise OperationFailed(Reason.SETTINGS_INVALID, "epsilon and delta are finite numbers")
        api.set_budget(population, epsilon, delta, assumption.upper())
    _show_budget(api.ledger(population), as_json=as_json)


def _show_budget(document: dict[str, Any], *, as_json: bool) -> None:
    from fedcompute.privacy.budget import spent_of
    from fedcompute.privacy.chain import tasks_of
    from fedcompute.privacy.ledger_document import ledger_from

    found = ledger_from(document)
    charges = sum(one.event is not None for one in found.entries)
    if found.budget is None:
        last = found.entries[-1] if found.entries else None
        if as_json:
            typer.echo(json.dumps({"population": found.population, "budget": None, "charges": charges}))
            return
        typer.echo(f"population {found.population} has no budget: nothing limits what its tasks release")
        if last is not None:
            typer.echo(f"  spent    {_told_epsilon(last)}")
        return
    spent = spent_of(found.budget, tasks_of(found.entries))
    left = max(0.0, found.budget.epsilon - spent)
    if as_json:
        finite = spent if math.isfinite(spent) else None
        document = {"population": found.population, "budget": document["budget"], "charges": charges}
        typer.echo(json.dumps({**document, "spent": finite, "left": left}))
        return
    typer.echo(
        f"population {found.population}: epsilon {found.budget.epsilon:g} at delta {found.budget.delta:g}, "
        f"{found.budget.assumption.value.lower().replace('_', ' ')}\n"
        f"  spent    {spent:.6g} by {charges} releases\n"
        f"  left     {left:.6g}"
    )


def _ledger(file: Path | None, population: str | None, server: str, api_key_file: Path | None) -> Any:
    from fedcompute.privacy.ledger_document import BYTES_LIMIT, ledger_from, read_ledger

    if file is not None:
        try:
            with file.open("rb") as opened:
                return read_ledger(opened.read(BYTES_LIMIT + 1))
        except OSError as error:
            raise OperationFailed(Reason.STORAGE_FAILED, f"{file} cannot be read: {error.strerror}") from error
    if population is None:
        raise OperationFailed(Reason.SETTINGS_INVALID, "name a ledger file, or --population and --server")
    return ledger_from(connect(server, api_key_file).ledger(population))


def _verified_epsilons(entries: Any) -> list[str]:
    from rich.console import Console
    from rich.progress import Progress

    from fedcompute.privacy.chain import verify_epsilons

    console = Console(stderr=True)
    begun = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("accounting", total=len(entries), visible=False)

        def advance(done: int) -> None:
            progress.update(task, advance=done, visible=time.monotonic() - begun > _PATIENCE)

        return verify_epsilons(entries, advance)


def _told_epsilon(last: Any) -> str:
    if last is None:
        return "nothing is released, epsilon 0"
    if last.cumulative_epsilon is None:
        return f"infinite or not computed at delta {last.delta:g}, after entry {last.sequence}"
    return f"{last.cumulative_epsilon:.6g} at delta {last.delta:g}, after entry {last.sequence}"
