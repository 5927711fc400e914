import json

import pytest

from fedcompute.builder import differential_privacy
from fedcompute.builder.calibrations import calibrated
from fedcompute.builder.differential_privacy import account
from fedcompute.builder.number_cache import cache_directory
from fedcompute.builder.validation import validate
from fedcompute.protos import task_builder_pb2

Dp = task_builder_pb2.DpAggregator


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDCOMPUTE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def search(directory):
    """`search(*arguments)` calibrates for epsilon = 1 / noise; `search.count` counts the searches."""

    def run(*arguments, target=0.5, result=2.0):
        def calibrate():
            run.count += 1
            return result

        return calibrated("poisson", arguments, target, calibrate, lambda noise: 1 / noise)

    run.count = 0
    return run


def files(directory):
    return list((directory / "calibrations").iterdir())


def test_the_same_target_is_calibrated_once_and_another_again(search, directory):
    assert search(20.0, 0.1) == search(20.0, 0.1) == 2.0
    assert search.count == 1
    search(21.0, 0.1)
    search(20.0, 0.1, target=0.6)
    assert search.count == 3
    assert len(files(directory)) == 3


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"noise_multiplier": NaN}', '{"noise_multiplier": -1.0}',
             '{"noise_multiplier": "2"}', '{"noise_multiplier": 1.9}', "x" * 5000]
)  # fmt: skip
def test_a_damaged_file_or_one_that_promises_too_much_is_replaced(search, directory, text):
    search(20.0)
    (file,) = files(directory)
    file.write_text(text)
    assert search(20.0) == 2.0
    assert search.count == 2
    assert json.loads(file.read_text()) == {"noise_multiplier": 2.0}


def test_a_place_that_cannot_be_written_costs_a_calibration_and_no_more(search, directory, monkeypatch):
    blocked = directory / "file"
    blocked.write_text("")
    monkeypatch.setenv("FEDCOMPUTE_CACHE_DIR", str(blocked))
    assert search(20.0) == 2.0


def test_an_empty_setting_keeps_nothing(search, monkeypatch, directory):
    monkeypatch.setenv("FEDCOMPUTE_CACHE_DIR", "")
    assert cache_directory() is None
    search(20.0)
    search(20.0)
    assert search.count == 2
    assert not (directory / "calibrations").exists()


@pytest.mark.parametrize("kind", [Dp.FIXED_GAUSSIAN, Dp.TREE_AGGREGATION, Dp.BANDED_MF])
def test_a_real_calibration_is_found_again_without_a_search(directory, monkeypatch, kind, config):
    config.differential_privacy.type = kind
    config.differential_privacy.noise_multiplier = 0
    config.differential_privacy.estimated_population = 100
    config.policies.model_release_policy.dp_delta = 0
    settings = validate(config, task_builder_pb2.ExperimentFlags())
    first = account(settings).result()
    # Replaced, so that a search would be seen.
    monkeypatch.setattr(differential_privacy, "calibrated_noise", None)
    assert account(settings).result() == first
