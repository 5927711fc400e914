"""Pictures of metrics, drawn without a display. Matplotlib is imported when one is drawn."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.frames import MetricSeries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_RUNS = 50
_TRAIN_PREFIX = "server/client_work/train/"
_EVAL_PREFIX = "server/eval/"
_LOSS = "loss"
# Okabe and Ito's colours, which colour-blind readers tell apart; line styles tell apart what wraps around.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_TRAINING, _EVALUATION = _COLOURS[0], _COLOURS[1]
_DPI = 150
# With more rounds than this, points would hide the line.
_MARKED_ROUNDS = 60


@dataclass(frozen=True)
class Run:
    """One line of a chart: a label for the legend, and the run's metrics by name."""

    label: str
    metrics: Mapping[str, MetricSeries]


def plot_metrics(runs: Sequence[Run], directory: Path, *, bridged: bool = False) -> list[Path]:
    """Draws one PNG per metric name into `directory` (made if missing): x the round, y the value, one line per run.

    A round without a value leaves a gap, unless `bridged`: for runs that are measured now and then. A run without a
    metric is left out of that metric's chart; a legend appears with more than one run. Returns the files, in the
    metrics' order. Raises OperationFailed(STORAGE_FAILED) if a file cannot be written and
    OperationFailed(SETTINGS_INVALID) for more than 50 runs.
    """
    if len(runs) > MAX_RUNS:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"{len(runs)} runs for one chart; at most {MAX_RUNS} are drawn",
            remedy="compare fewer",
        )
    written = []
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        lines = [(run.label, run.metrics[name]) for run in runs if name in run.metrics]
        written.append(plot_series(lines, directory / f"{file_stem(name)}.png", legend=len(runs) > 1, bridged=bridged))
    return written


def plot_series(
    lines: Sequence[tuple[str, MetricSeries]], path: Path, *, legend: bool = True, bridged: bool = False
) -> Path:
    """Draws one metric of several runs, as pairs (label, series), into a PNG file; returns its path."""
    figure = _figure(8.0, 4.5)
    axes = figure.subplots()
    for index, (label, series) in enumerate(lines):
        style = _STYLES[index // len(_COLOURS) % len(_STYLES)]
        _draw(axes, series, label, _COLOURS[index % len(_COLOURS)], style, bridged=bridged)
    name = lines[0][1].name if lines else ""
    _finish(axes, title=name, value=metric_label(name))
    if legend:
        axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def learning_curve(
    training: Mapping[str, MetricSeries],
    evaluation: Mapping[str, MetricSeries],
    path: Path,
    *,
    title: str = "Learning curve",
) -> Path:
    """Draws accuracy and loss by training round, training and evaluation in each, into one PNG; returns its path.

    Accuracy is the first metric whose name holds "accuracy". Give the evaluation at the training rounds that it
    measured (`MetricSeries.at`). Raises OperationFailed(STORAGE_FAILED) if the file cannot be written.
    """
    figure = _figure(11.0, 4.4)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.02, ha="left")
    accuracy = next((name for name in _short_names(training, evaluation) if "accuracy" in name), "accuracy")
    for axes, metric in zip(figure.subplots(1, 2), (accuracy, _LOSS), strict=True):
        for metrics, prefix, label, colour in (
            (training, _TRAIN_PREFIX, "training, while the round went on", _TRAINING),
            (evaluation, _EVAL_PREFIX, "evaluation of the round's model", _EVALUATION),
        ):
            if series := metrics.get(prefix + metric):
                # Evaluations come when they come; rounds without one are no loss of data.
                _draw(axes, series, label, colour, "-", bridged=prefix == _EVAL_PREFIX)
        _finish(axes, title=metric_label(metric).capitalize(), value="")
        if metric == accuracy:
            axes.set_ylim(0, 1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def metric_label(name: str) -> str:
    """The last part of a metric's name, in words."""
    return name.rpartition("/")[2].replace("_", " ")


def file_stem(name: str) -> str:
    """A metric's name as a file name, the same on every system."""
    return re.sub(r"[^A-Za-z0-9._-]+", ".", name).strip(".")[:120] or "metric"


def _short_names(*groups: Mapping[str, MetricSeries]) -> list[str]:
    return [name.removeprefix(_TRAIN_PREFIX).removeprefix(_EVAL_PREFIX) for group in groups for name in group]


def _draw(axes: "Axes", series: MetricSeries, label: str, colour: str, style: str, *, bridged: bool = False) -> None:
    """Draws one line; unless `bridged`, a round that the series lacks interrupts it, as a None always does."""
    known = dict(zip(series.rounds, series.values, strict=True))
    every = range(series.rounds[0], series.rounds[-1] + 1) if series.rounds else range(0)
    rounds = list(series.rounds if bridged else every)
    values = [math.nan if (value := known.get(number)) is None else value for number in rounds]
    axes.plot(
        rounds,
        values,
        color=colour,
        linestyle=style,
        linewidth=1.8,
        marker="o",
        markersize=4,
        markevery=None if len(rounds) <= _MARKED_ROUNDS else _lonely(values),
        label=label,
    )


def _lonely(values: Sequence[float]) -> list[int]:
    """Positions of values between two gaps, which a line without markers would not show."""
    padded = [math.nan, *values, math.nan]
    return [
        index
        for index, value in enumerate(values)
        if not math.isnan(value) and math.isnan(padded[index]) and math.isnan(padded[index + 2])
    ]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(axes: "Axes", *, title: str, value: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("round")
    axes.set_ylabel(value)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=True, axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: "Figure", path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, format="png")
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"{path.name} cannot be written: {error.strerror}", remedy="choose another --out"
        ) from error
    return path
