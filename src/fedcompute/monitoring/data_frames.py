"""Metrics of a task as a pandas DataFrame, for scripts and notebooks (spec/task-builder.md 9.4)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.frames import MetricSeries, read_series

if TYPE_CHECKING:
    from pandas import DataFrame


def load_metrics(
    source: str | Path, population: str, task_id: int = 1, *, rounds: int | None = None, api_key: str | None = None
) -> "DataFrame":
    """A task's metrics: one row per round that has any (index `round`, ascending), one float64 column per metric.

    `source` is a server's URL, a server's data directory, the root of its buckets or of its model bucket, a bucket URL
    (`gs://`, `s3://`, `az://`) or a bucket's plain name. A value is NaN where the round's result was not finite (null
    in its file) or the round lacks the metric; a round without a file has no row. `attrs` of the frame name source,
    population and task. `rounds` leaves out later rounds; `api_key` is for a server alone.

    Raises OperationFailed: NOT_FOUND without metrics, SERVER_UNREACHABLE, STORAGE_FAILED, SETTINGS_INVALID where
    pandas is not installed; ArtifactInvalid(METRICS_MALFORMED).
    """
    series = read_series(source, population, task_id, rounds=rounds, api_key=api_key)
    frame = frame_of(series)
    frame.attrs = {"source": str(source), "population": population, "task_id": task_id}
    return frame


def frame_of(series: Mapping[str, MetricSeries]) -> "DataFrame":
    """The frame of several metrics; raises OperationFailed(SETTINGS_INVALID) where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "pandas is not installed", remedy="pip install 'fedcompute[data]'"
        ) from error
    numbers = sorted({number for one in series.values() for number in one.rounds})
    index = pandas.Index(numbers, name="round", dtype="int64")
    columns = {}
    for name, one in series.items():
        known = dict(zip(one.rounds, one.values, strict=True))
        columns[name] = [math.nan if (value := known.get(number)) is None else value for number in numbers]
    return pandas.DataFrame(columns, index=index, dtype="float64")
