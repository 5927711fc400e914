"""Metrics as data frames and files, read back by those who would read them."""

import math
import subprocess
import sys

import pandas
import pytest

from fedcompute.errors import OperationFailed
from fedcompute.monitoring import load_metrics
from fedcompute.monitoring.exports import export, table_of
from fedcompute.monitoring.frames import MetricSeries
from fedcompute.monitoring.plots import Run

LOSS, AUC = "server/client_work/train/loss", 'odd, "name"\nof a metric'


@pytest.fixture
def runs():
    return [
        Run(
            "noise 0.1", {LOSS: MetricSeries(LOSS, (1, 2, 3), (1.0, None, 0.25)), AUC: MetricSeries(AUC, (3,), (0.5,))}
        ),
        Run("noise 0.3", {LOSS: MetricSeries(LOSS, (1,), (2.0,))}),
    ]


def test_a_frame_has_a_row_per_round_and_nan_for_what_there_is_not(tmp_path, write_round):
    write_round(tmp_path, "digits/1", 1, {LOSS: 1.0})
    write_round(tmp_path, "digits/1", 4, {LOSS: None, "auc-roc": 0.6})
    frame = load_metrics(tmp_path, "digits")
    assert (frame.index.name, list(frame.index), list(frame.columns)) == ("round", [1, 4], [LOSS, "auc-roc"])
    assert frame[LOSS][1] == 1.0
    assert math.isnan(frame[LOSS][4])
    assert math.isnan(frame["auc-roc"][1])
    assert set(map(str, frame.dtypes)) == {"float64"}
    assert frame.attrs == {"source": str(tmp_path), "population": "digits", "task_id": 1}


def test_the_package_can_be_imported_without_loading_pandas():
    script = "import sys, fedcompute.monitoring; print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_long_table_has_a_line_per_value_that_was_measured(runs):
    table = table_of(runs)
    lines = [tuple(row) for row in table.fillna(-1).itertuples(index=False)]
    assert sorted(lines) == sorted(
        [
            ("noise 0.1", 1, LOSS, 1.0),
            ("noise 0.1", 2, LOSS, -1.0),
            ("noise 0.1", 3, LOSS, 0.25),
            ("noise 0.1", 3, AUC, 0.5),
            ("noise 0.3", 1, LOSS, 2.0),
        ]
    )


@pytest.mark.parametrize("wide", [False, True])
def test_files_hold_what_was_written_to_them(tmp_path, runs, wide):
    expected = table_of(runs, wide=wide)
    pandas.testing.assert_frame_equal(pandas.read_csv(export(runs, tmp_path / "a.csv", "csv", wide=wide)), expected)
    read = pandas.read_parquet(export(runs, tmp_path / "a.parquet", "parquet", wide=wide))
    pandas.testing.assert_frame_equal(read, expected)


def test_tensorboard_finds_every_run_with_its_values_at_their_rounds(tmp_path, runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = (
        "import sys; from pathlib import Path; from fedcompute.monitoring.exports import export;"
        "from fedcompute.monitoring.frames import MetricSeries; from fedcompute.monitoring.plots import Run;"
        "runs = [Run('one', {'a/b': MetricSeries('a/b', (1, 2), (0.5, None))})];"
        f"export(runs, Path({str(tmp_path / 'x')!r}), 'tensorboard');"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    folder = export(runs, tmp_path / "board", "tensorboard")
    assert sorted(path.name for path in folder.iterdir()) == ["noise.0.1", "noise.0.3"]
    read = EventAccumulator(str(folder / "noise.0.1"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars(LOSS)] == [(1, 1.0), (3, 0.25)]
    assert [(event.step, event.value) for event in read.Scalars(AUC)] == [(3, 0.5)]


def test_what_is_there_is_neither_merged_with_nor_lost(tmp_path, runs):
    path = tmp_path / "board"
    export(runs, path, "tensorboard")
    with pytest.raises(OperationFailed, match="there already"):
        export(runs[:1], path, "tensorboard")
    export(runs[:1], path, "tensorboard", force=True)
    assert [one.name for one in path.iterdir()] == ["noise.0.1"]
    with pytest.raises(OperationFailed, match="cannot be written"):
        export(runs, tmp_path / "board" / "noise.0.1" / "events.out.tfevents.0.fedcompute" / "x.csv", "csv")
    assert [one.name for one in tmp_path.iterdir()] == ["board"]


def test_a_directory_with_anything_else_in_it_is_never_replaced(tmp_path, runs):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("all of it")
    with pytest.raises(OperationFailed, match="is not replaced"):
        export(runs, tmp_path / "results", "tensorboard", force=True)
    assert (tmp_path / "results" / "thesis.txt").read_text() == "all of it"


def test_a_table_that_could_not_be_read_back_is_not_written(tmp_path, runs):
    with pytest.raises(OperationFailed, match="one label"):
        export([runs[0], runs[0]], tmp_path / "a.csv", "csv")
    odd = Run("odd", {"value": MetricSeries("value", (1,), (1.0,))})
    with pytest.raises(OperationFailed, match="column of the table"):
        export([odd], tmp_path / "a.csv", "csv")
    assert list(tmp_path.iterdir()) == []
