"""`fedcompute metrics`: what each round measured, as pictures and as numbers."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import api_key
from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.frames import MetricSeries, load_metrics
from fedcompute.monitoring.plots import metric_label

app = typer.Typer(no_args_is_help=True, help="Plot a task's metrics, or print them as a table.")

# The second names are those of the constants in the published script.
_Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        "--gcs-bucket-name",
        help="Server URL, data directory, bucket URL (gs://, s3://, az://) or the name of a Google Cloud bucket.",
        show_default=f"the variable FEDCOMPUTE_SERVER, or {options.DEFAULT_SERVER}",
    ),
]
_Root = Annotated[str | None, typer.Argument(metavar="[STORAGE]", help="The same as --storage.")]
_Population = Annotated[str | None, typer.Option("--population", "--population-name", help="Population of the task.")]
_TaskId = Annotated[int, typer.Option("--task-id", min=1, help="Id of the task within its population.")]
_Rounds = Annotated[
    int | None,
    typer.Option("--rounds", "--num-training-round", min=1, help="Last round to read.", show_default="the newest"),
]


@app.command(
    epilog="Example: fedcompute metrics plot fedcompute-data --population my_population --task-id 1 --out plots"
)
def plot(
    root: _Root = None,
    storage: _Storage = None,
    population: _Population = None,
    task_id: _TaskId = 1,
    rounds: _Rounds = None,
    out: Annotated[Path, typer.Option(help="Directory for the PNG files; made if missing.")] = Path("plots"),
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=POPULATION/TASK", help="Draw this run as one line; repeat it to compare runs in one chart."
        ),
    ] = None,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Draw one PNG per metric: x the round, y the value. A missing round leaves a gap."""
    from fedcompute.monitoring.plots import Run, plot_metrics

    source = _source(root, storage)
    chosen = [_parse_run(text) for text in compare or []]
    if population is not None:
        chosen.insert(0, (f"{population}/{task_id}", population, task_id))
    if not chosen:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "no task to plot", remedy="give --population, or --compare LABEL=POPULATION/TASK"
        )
    key = api_key(api_key_file)
    runs = [
        Run(label, load_metrics(source, name, number, rounds=rounds, api_key=key)) for label, name, number in chosen
    ]
    files = plot_metrics(runs, out)
    if as_json:
        typer.echo(json.dumps({"files": [str(file) for file in files]}))
        return
    for file in files:
        typer.echo(str(file))


@app.command(epilog="Example: fedcompute metrics table fedcompute-data --population my_population --task-id 1")
def table(
    population: Annotated[str, typer.Option("--population", "--population-name", help="Population of the task.")],
    root: _Root = None,
    storage: _Storage = None,
    task_id: _TaskId = 1,
    rounds: _Rounds = None,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Print every metric of every round."""
    found = load_metrics(_source(root, storage), population, task_id, rounds=rounds, api_key=api_key(api_key_file))
    by_round = _by_round(found)
    if as_json:
        typer.echo(json.dumps([{"round": number, "metrics": values} for number, values in by_round.items()]))
        return
    from rich.console import Console
    from rich.table import Table

    lines = Table(box=None, pad_edge=False, header_style="bold")
    lines.add_column("round", justify="right")
    for name in found:
        lines.add_column(_short(name, list(found)), justify="right")
    for number, values in by_round.items():
        lines.add_row(str(number), *(_cell(values, name) for name in found))
    Console().print(lines)


def _source(root: str | None, storage: str | None) -> str:
    if root is not None and storage is not None and root != storage:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "the storage is given twice, differently", remedy="leave out one of the two"
        )
    return root or storage or os.environ.get("FEDCOMPUTE_SERVER") or options.DEFAULT_SERVER


def _parse_run(text: str) -> tuple[str, str, int]:
    label, equals, place = text.partition("=")
    population, slash, task = place.rpartition("/")
    if not (equals and slash and label and population and task.isdecimal()):
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"--compare: {text!r} is no LABEL=POPULATION/TASK",
            remedy='write it as --compare "noise 0.1=my_population/1"',
        )
    return label, population, int(task)


def _by_round(found: dict[str, MetricSeries]) -> dict[int, dict[str, float | None]]:
    by_round: dict[int, dict[str, float | None]] = {}
    for name, series in found.items():
        for number, value in zip(series.rounds, series.values, strict=True):
            by_round.setdefault(number, {})[name] = value
    return dict(sorted(by_round.items()))


def _short(name: str, names: list[str]) -> str:
    label = metric_label(name)
    return label if sum(metric_label(other) == label for other in names) == 1 else name


def _cell(values: dict[str, float | None], name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    return "null" if value is None else f"{value:.5g}"
