"""`fedcompute task compare`: runs side by side at a prompt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import connect
from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.monitoring.plots import metric_label

if TYPE_CHECKING:
    from fedcompute.monitoring.comparison import RunFacts
    from fedcompute.monitoring.frames import MetricSeries

_MOST = 50


@dataclass(frozen=True)
class _Run:
    facts: "RunFacts"
    metrics: "dict[str, MetricSeries]"
    epsilon: float | None
    rounds: int
    seconds: float | None


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="POPULATION/TASK ...", help="Two runs or more.")],
    metric: Annotated[str | None, typer.Option(help="Only this metric, by the last part of its name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for a PNG per metric with all runs in it.")] = None,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what differs between runs, and what each has learnt and spent."""
    from fedcompute.monitoring.comparison import differing, labels

    keys = list(dict.fromkeys(_key(text) for text in runs))
    if not 2 <= len(keys) <= _MOST:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{len(keys)} runs to compare", remedy=f"name two to {_MOST} as POPULATION/TASK"
        )
    api = connect(server, api_key_file)
    found = [_read(api, population, task_id) for population, task_id in keys]
    names = labels([one.facts for one in found])
    files: list[Path] = []
    if out is not None:
        from fedcompute.monitoring.plots import Run, plot_metrics

        drawn = [Run(name, _wanted(one.metrics, metric)) for name, one in zip(names, found, strict=True)]
        files = plot_metrics(drawn, out)
    documents = [_document(name, one, metric) for name, one in zip(names, found, strict=True)]
    if as_json:
        different = differing([one.facts for one in found])
        typer.echo(json.dumps({"differing": different, "runs": documents, "files": [str(one) for one in files]}))
        return
    from rich.console import Console

    Console().print(_table(documents, differing([one.facts for one in found])))
    for file in files:
        typer.echo(str(file))


def _read(api: OperatorApi, population: str, task_id: int) -> _Run:
    from fedcompute.monitoring.comparison import RunFacts, facts_of_plan
    from fedcompute.monitoring.frames import series

    view = api.task(population, task_id)
    task = view["task"]
    try:
        facts = facts_of_plan(api.plan(population, task_id))
    except OperationFailed as error:
        # A task that waits for its artifacts has no plan yet.
        if error.reason is not Reason.NOT_FOUND:
            raise
        facts = {}
    facts = {
        "kind": str(task["kind"]).lower(),
        **facts,
        "report goal": int(task["min_aggregation_size"]),
        "rounds": int(task["total_iteration"]),
    }
    ended = [datetime.fromisoformat(one["completed"]) for one in view["iterations"] if one["completed"]]
    opened = [datetime.fromisoformat(one["opened"]) for one in view["iterations"]]
    return _Run(
        RunFacts(population, task_id, facts),
        series(api.metrics(population, task_id)),
        view["ledger"][-1]["cumulative_epsilon"] if view["ledger"] else None,
        int(api.progress(population, task_id)["rounds_completed"]),
        (max(ended) - min(opened)).total_seconds() if ended else None,
    )


def _document(name: str, run: _Run, metric: str | None) -> dict[str, Any]:
    return {
        "run": str(run.facts),
        "label": name,
        "facts": dict(run.facts.facts),
        "metrics": {
            metric_label(one.name): {"final": one.last, "best": _best(one)}
            for one in _wanted(run.metrics, metric).values()
        },
        "epsilon": run.epsilon,
        "rounds": run.rounds,
        "seconds": run.seconds,
    }


def _table(documents: Sequence[dict[str, Any]], different: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for one in documents:
        table.add_column(one["label"], justify="right")

    def row(name: str, values: Sequence[Any]) -> None:
        table.add_row(name, *(_text(value) for value in values))

    row("run", [one["run"] for one in documents])
    for name in different:
        row(name, [one["facts"].get(name) for one in documents])
    for name in dict.fromkeys(name for one in documents for name in one["metrics"]):
        found = [one["metrics"].get(name, {}) for one in documents]
        row(f"{name}, final", [one.get("final") for one in found])
        row(f"{name}, best", [one.get("best") for one in found])
    # The ledger's: of everything that the population had released by then.
    row("epsilon of the population", [one["epsilon"] for one in documents])
    row("rounds released", [one["rounds"] for one in documents])
    row("seconds", [one["seconds"] for one in documents])
    return table


def _wanted(metrics: "dict[str, MetricSeries]", metric: str | None) -> "dict[str, MetricSeries]":
    return {name: one for name, one in metrics.items() if metric is None or metric in (name, metric_label(name))}


def _best(one: "MetricSeries") -> float | None:
    values = [value for value in one.values if value is not None]
    smaller = any(word in metric_label(one.name) for word in ("loss", "entropy", "error"))
    return (min if smaller else max)(values) if values else None


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _key(text: str) -> tuple[str, int]:
    population, slash, number = text.rpartition("/")
    if not (slash and population and number.isdecimal() and len(number) < 19):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{text!r} is no POPULATION/TASK", remedy="write it as my_population/1"
        )
    return population, int(number)
