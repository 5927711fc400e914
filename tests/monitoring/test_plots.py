"""Pictures are files that a viewer opens, with gaps where rounds are missing."""

import math
import struct
import subprocess
import sys

import pytest

from fedcompute.errors import FedComputeError
from fedcompute.monitoring import plots
from fedcompute.monitoring.frames import MetricSeries
from fedcompute.monitoring.plots import Run, learning_curve, plot_metrics

LOSS = "server/client_work/train/loss"
ACCURACY = "server/client_work/train/sparse_categorical_accuracy"


def size_of(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def drawn(series, **options):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots._draw(axes, series, "x", "black", "-", **options)
    return axes.lines[0].get_xdata(), axes.lines[0].get_ydata()


def test_there_is_one_png_per_metric_of_any_run(tmp_path):
    first = {LOSS: MetricSeries(LOSS, (1, 2), (1.0, 0.5)), ACCURACY: MetricSeries(ACCURACY, (1, 2), (0.1, 0.4))}
    second = {LOSS: MetricSeries(LOSS, (1, 2, 3), (1.0, None, 0.2))}
    files = plot_metrics([Run("noise 0.1", first), Run("noise 0.3", second)], tmp_path / "new")
    assert [file.name for file in files] == [
        "server.client_work.train.loss.png", "server.client_work.train.sparse_categorical_accuracy.png",
    ]  # fmt: skip
    assert all(size_of(file) == (1200, 675) for file in files)


def test_missing_rounds_and_nulls_interrupt_the_line():
    rounds, values = drawn(MetricSeries(LOSS, (1, 2, 5, 6), (1.0, None, 0.5, 0.4)))
    assert list(rounds) == [1, 2, 3, 4, 5, 6]
    assert [math.isnan(value) for value in values] == [False, True, True, True, False, False]


def test_an_evaluation_every_few_rounds_is_one_line():
    rounds, values = drawn(MetricSeries(LOSS, (3, 6, 9), (1.0, 0.5, 0.4)), bridged=True)
    assert list(rounds) == [3, 6, 9]
    assert list(values) == [1.0, 0.5, 0.4]


@pytest.mark.parametrize("series", [MetricSeries(LOSS, (), ()), MetricSeries(LOSS, (7,), (None,))])
def test_a_metric_without_a_single_value_still_makes_a_chart(tmp_path, series):
    (file,) = plot_metrics([Run("x", {LOSS: series})], tmp_path)
    size_of(file)


def test_the_learning_curve_is_drawn_with_and_without_evaluation(tmp_path):
    training = {name: MetricSeries(name, (1, 2), (0.4, 0.5)) for name in (ACCURACY, LOSS)}
    evaluation = {"server/eval/loss": MetricSeries("server/eval/loss", (2,), (0.6,))}
    whole = learning_curve(training, evaluation, tmp_path / "a.png")
    alone = learning_curve(training, {}, tmp_path / "b.png")
    assert size_of(whole) == size_of(alone)
    assert whole.read_bytes() != alone.read_bytes()


def test_a_metric_name_cannot_leave_the_directory(tmp_path):
    (file,) = plot_metrics([Run("x", {"../../evil": MetricSeries("../../evil", (1,), (1.0,))})], tmp_path / "out")
    assert file.parent == tmp_path / "out"
    assert file.resolve().is_relative_to(tmp_path / "out")


def test_more_runs_than_colours_and_styles_can_tell_apart_are_refused(tmp_path):
    with pytest.raises(FedComputeError, match="51 runs"):
        plot_metrics([Run(str(index), {}) for index in range(51)], tmp_path)


def test_an_output_directory_that_is_a_file_is_a_typed_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FedComputeError, match="cannot be written"):
        plot_metrics([Run("x", {LOSS: MetricSeries(LOSS, (1,), (1.0,))})], tmp_path / "out")


def test_importing_the_reader_and_the_plots_loads_no_matplotlib():
    script = "import sys, fedcompute.monitoring.frames, fedcompute.monitoring.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
