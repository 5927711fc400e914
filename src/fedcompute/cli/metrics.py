"""`fedcompute metrics`: what each round measured, as pictures and as numbers."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompute.cli import options
from fedcompute.cli.connection import api_key
from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.frames import MetricSeries, read_series
from fedcompute.monitoring.plots import metric_label

if TYPE_CHECKING:
    from fedcompute.monitoring.plots import Run

app = typer.Typer(no_args_is_help=True, help="Plot a task's metrics, print them as a table, or write them to files.")

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
_Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="LABEL=POPULATION/TASK", help="Take this run as well, under a label; may be repeated."),
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
    compare: _Compare = None,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Draw one PNG per metric: x the round, y the value. A missing round leaves a gap."""
    from fedcompute.monitoring.plots import plot_metrics

    runs = _runs(_source(root, storage), population, task_id, rounds, compare, api_key(api_key_file))
    files = plot_metrics(runs, out)
    if as_json:
        typer.echo(json.dumps({"files": [str(file) for file in files]}))
        return
    for file in files:
        typer.echo(str(file))


@app.command(
    epilog="Example: fedcompute metrics export fedcompute-data --population my_population --out metrics.parquet"
)
def export(
    out: Annotated[Path, typer.Option(help="File to write; a directory for TensorBoard.")],
    root: _Root = None,
    storage: _Storage = None,
    population: _Population = None,
    task_id: _TaskId = 1,
    rounds: _Rounds = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="csv, parquet or tensorboard.", show_default="by the ending of --out"),
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="A column per metric instead of a line per value.")] = False,
    compare: _Compare = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Write metrics as CSV, Parquet or TensorBoard's event files, of one task or several."""
    from fedcompute.monitoring.exports import FORMATS, TENSORBOARD
    from fedcompute.monitoring.exports import export as write

    wanted = form or (out.suffix.removeprefix(".").lower() or TENSORBOARD)
    if wanted not in FORMATS:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"--format: {wanted!r} is none of {', '.join(FORMATS)}",
            remedy="name one, or let --out end with .csv or .parquet",
        )
    runs = _runs(_source(root, storage), population, task_id, rounds, compare, api_key(api_key_file))
    written = write(runs, out, wanted, wide=wide, force=force)
    if as_json:
        typer.echo(json.dumps({"file": str(written), "format": wanted, "runs": [run.label for run in runs]}))
        return
    typer.echo(str(written))


@app.command(epilog="Example: fedcompute metrics table fedcompute-data --population my_population --task-id 1")
def table(
    population: Annotated[str, typer.Option("--population", "--population-name", help="Population of the task.")],
    root: _Root = None,
    storage: _Storage = None,
    task_id: _TaskId = 1,
    rounds: _Rounds = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only the newest so many rounds.", show_default="all")] = None,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Print every metric of every round."""
    found = read_series(_source(root, storage), population, task_id, rounds=rounds, api_key=api_key(api_key_file))
    by_round = dict(list(_by_round(found).items())[-(last or 0) :])
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


def _runs(
    source: str, population: str | None, task_id: int, rounds: int | None, compare: list[str] | None, key: str | None
) -> "list[Run]":
    from fedcompute.monitoring.plots import Run

    chosen = [_parse_run(text) for text in compare or []]
    if population is not None:
        chosen.insert(0, (f"{population}/{task_id}", population, task_id))
    if not chosen:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "no task is named", remedy="give --population, or --compare LABEL=POPULATION/TASK"
        )
    return [Run(label, read_series(source, name, number, rounds=rounds, api_key=key)) for label, name, number in chosen]


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
