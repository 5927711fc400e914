"""Metrics files of every published form become the same series."""

import gzip
import json

import pytest

from fedcompute.errors import FedComputeError, Reason
from fedcompute.monitoring.frames import MetricSeries, read_metrics, read_series

LOSS = "server/client_work/train/loss"


@pytest.mark.parametrize("folder", ["blobs/model", "model", "", "model/model", "{name}"])
def test_a_task_is_found_in_a_data_directory_a_bucket_and_under_the_doubled_key(tmp_path, write_round, folder):
    write_round(tmp_path / folder.format(name=tmp_path.name), "digits/1", 1, {LOSS: 0.5})
    assert read_series(tmp_path, "digits", 1) == {LOSS: MetricSeries(LOSS, (1,), (0.5,))}


def test_a_missing_round_is_absent_and_later_rounds_are_still_read(tmp_path, write_round):
    for number in (1, 2, 5, 10):
        write_round(tmp_path, "digits/1", number, {LOSS: number / 10})
    assert read_series(tmp_path, "digits", 1)[LOSS].rounds == (1, 2, 5, 10)
    assert read_series(tmp_path, "digits", 1, rounds=4)[LOSS].rounds == (1, 2)


def test_gzip_and_plain_files_read_alike(tmp_path, write_round):
    write_round(tmp_path, "digits/1", 1, gzip.compress(json.dumps({LOSS: 0.5}).encode()))
    write_round(tmp_path, "digits/1", 2, {LOSS: 0.25})
    assert read_series(tmp_path, "digits", 1)[LOSS].values == (0.5, 0.25)


def test_null_and_the_reference_s_non_finite_numbers_are_none():
    assert read_metrics(b'{"a": null, "b": NaN, "c": -Infinity, "d": 1e999, "e": 2}', "x") == {
        "a": None, "b": None, "c": None, "d": None, "e": 2.0,
    }  # fmt: skip


def test_a_metric_that_some_rounds_lack_has_only_its_own_rounds(tmp_path, write_round):
    write_round(tmp_path, "digits/1", 1, {LOSS: 1.0})
    write_round(tmp_path, "digits/1", 2, {LOSS: 0.5, "auc-roc": 0.6})
    found = read_series(tmp_path, "digits", 1)
    assert list(found) == [LOSS, "auc-roc"]
    assert found["auc-roc"].rounds == (2,)


@pytest.mark.parametrize(
    "data", [b"", b"[1]", b'{"a": "x"}', b'{"a": true}', b'{"a": {}}', b"\x1f\x8b\x08junk", b"\xff", b"[" * 100_000]
)
def test_a_file_that_is_no_object_of_numbers_is_named(tmp_path, write_round, data):
    write_round(tmp_path, "digits/1", 3, data)
    with pytest.raises(FedComputeError, match="digits/1/3") as caught:
        read_series(tmp_path, "digits", 1)
    assert caught.value.reason is Reason.METRICS_MALFORMED


def test_a_gzip_file_cannot_fill_the_memory(tmp_path, write_round):
    write_round(tmp_path, "digits/1", 1, gzip.compress(b" " * (8 << 20)))
    with pytest.raises(FedComputeError, match="1048576"):
        read_series(tmp_path, "digits", 1)


def test_other_tasks_rounds_and_objects_do_not_mix_in(tmp_path, write_round):
    write_round(tmp_path, "digits/1", 1, {LOSS: 1.0})
    write_round(tmp_path, "digits/11", 1, {LOSS: 2.0})
    write_round(tmp_path, "digits/1", 0, {LOSS: 3.0})
    (tmp_path / "digits/1/1/s/0/checkpoint").write_bytes(b"x")
    assert read_series(tmp_path, "digits", 1)[LOSS].values == (1.0,)


@pytest.mark.parametrize("population", ["nobody", "../digits", "a b"])
def test_an_unknown_or_unsafe_population_is_a_typed_error(tmp_path, population):
    with pytest.raises(FedComputeError):
        read_series(tmp_path, population, 1)


def test_reading_makes_no_directory(tmp_path):
    with pytest.raises(FedComputeError, match="no directory"):
        read_series(tmp_path / "typo", "digits", 1)
    assert not (tmp_path / "typo").exists()


def test_an_evaluation_moves_to_the_training_rounds_that_it_measured():
    series = MetricSeries(LOSS, (1, 2, 3, 4), (0.4, 0.3, None, 0.1))
    assert series.at({1: 5, 2: 5, 3: 6}) == MetricSeries(LOSS, (5, 6), (0.3, None))
    assert series.last == 0.1
