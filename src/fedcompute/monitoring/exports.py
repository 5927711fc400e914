"""Metrics of one or several runs as files: CSV, Parquet, TensorBoard's event files."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.data_frames import frame_of
from fedcompute.monitoring.plots import Run, file_stem

if TYPE_CHECKING:
    from pandas import DataFrame

CSV, PARQUET, TENSORBOARD = "csv", "parquet", "tensorboard"
FORMATS = (CSV, PARQUET, TENSORBOARD)
_EVENTS_VERSION = "brain.Event:2"


def table_of(runs: Sequence[Run], *, wide: bool = False) -> "DataFrame":
    """Every value of every run: columns run, round, metric, value; `wide`: one column per metric instead.

    A value that was not finite is missing, and so is, in the wide form, one that a round lacks.
    """
    frames = []
    for run in runs:
        if taken := {"run", "round", "metric", "value"} & run.metrics.keys():
            raise OperationFailed(
                Reason.SETTINGS_INVALID,
                f"{run.label} has a metric {sorted(taken)[0]!r}, which is a column of the table",
                remedy="export it for TensorBoard, or read it with load_metrics",
            )
        frame = frame_of(run.metrics).reset_index()
        frame.insert(0, "run", run.label)
        frames.append(frame)
    import pandas

    whole = pandas.concat(frames, ignore_index=True)
    if wide:
        return whole
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    long = whole.melt(id_vars=["run", "round"], value_vars=names, var_name="metric", value_name="value")
    measured = [(run.label, number, name) for run in runs for name, one in run.metrics.items() for number in one.rounds]
    # What a round lacks is no row; what was not finite is one without a value.
    kept = pandas.MultiIndex.from_frame(long[["run", "round", "metric"]]).isin(measured)
    return long[kept].reset_index(drop=True)


def export(runs: Sequence[Run], path: Path, form: str, *, wide: bool = False, force: bool = False) -> Path:
    """Writes the runs to `path`, whole or not at all, and returns it; `form` is one of FORMATS.

    TensorBoard gets a directory with one run each below it. Raises OperationFailed: SETTINGS_INVALID if there is
    something already and not `force`, or a library is missing; STORAGE_FAILED if it cannot be written.
    """
    if path.exists() and not force:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"{path} is there already", remedy="choose another --out, or give --force"
        )
    if len({run.label for run in runs}) < len(runs):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "two runs have one label", remedy="name each run once, under a label of its own"
        )
    if form == TENSORBOARD and path.exists() and not _is_ours(path):
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"{path} holds more than TensorBoard's event files, and is not replaced",
            remedy="choose another --out",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == TENSORBOARD:
            _replace_folder(path, lambda folder: _event_files(runs, folder))
        else:
            _replace_file(path, lambda file: _write_table(table_of(runs, wide=wide), file, form))
    except OSError as error:
        raise OperationFailed(
            Reason.STORAGE_FAILED, f"{path.name} cannot be written: {error.strerror}", remedy="choose another --out"
        ) from error
    return path


def _write_table(frame: "DataFrame", file: Path, form: str) -> None:
    if form == CSV:
        frame.to_csv(file, index=False)
        return
    try:
        frame.to_parquet(file, index=False, engine="pyarrow")
    except ImportError as error:
        raise _missing("pyarrow", "data") from error


def _event_files(runs: Sequence[Run], folder: Path) -> None:
    """One folder per run, so that TensorBoard draws them over each other."""
    try:
        # Its writer of whole files would load TensorFlow where that is installed; that of records needs none.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise _missing("tensorboard", "tensorboard") from error

    for number, run in enumerate(runs):
        directory = folder / file_stem(run.label)
        directory = directory if not directory.exists() else folder / f"{directory.name}.{number}"
        directory.mkdir()
        with (directory / "events.out.tfevents.0.fedcompute").open("wb") as file:
            writer = RecordWriter(file)
            writer.write(event_pb2.Event(file_version=_EVENTS_VERSION).SerializeToString())
            for name, one in run.metrics.items():
                for step, value in zip(one.rounds, one.values, strict=True):
                    if value is not None:
                        scalar = summary_pb2.Summary.Value(tag=name, simple_value=value)
                        summary = summary_pb2.Summary(value=[scalar])
                        # The files say no time; the round orders as well.
                        writer.write(event_pb2.Event(wall_time=step, step=step, summary=summary).SerializeToString())


def _replace_file(path: Path, write: Callable[[Path], None]) -> None:
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(made)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def _replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    made, old = (path.with_name(f".{path.name}.{word}.{os.getpid()}") for word in ("new", "old"))
    made.mkdir()
    try:
        write(made)
        if path.exists():
            path.rename(old)
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether a directory holds runs of event files and nothing else, so that it may be replaced."""
    runs = list(path.iterdir()) if path.is_dir() else [path]
    return all(
        run.is_dir() and all(".tfevents." in file.name and file.is_file() for file in run.iterdir()) for run in runs
    )


def _missing(package: str, extra: str) -> OperationFailed:
    return OperationFailed(
        Reason.SETTINGS_INVALID, f"{package} is not installed", remedy=f"pip install 'fedcompute[{extra}]'"
    )
