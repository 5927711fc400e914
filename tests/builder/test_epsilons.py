import json
import threading

import pytest

from fedcompute.builder import epsilons
from fedcompute.builder.epsilons import ExactEpsilon


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDCOMPUTE_CACHE_DIR", str(tmp_path))
    # Nothing here takes half a second.
    monkeypatch.setattr(epsilons, "_WORTH_A_FILE", -1.0)
    return tmp_path


@pytest.fixture
def exact(directory):
    """`exact(*key)` is an epsilon of 2.5 between 2 and 3; `exact.count` counts the computations."""

    def make(*key, value=2.5, bounds=(2.0, 3.0)):
        def compute():
            make.count += 1
            return value

        return ExactEpsilon(compute, key, bounds)

    make.count = 0
    return make


def files(directory):
    return list((directory / "epsilons").iterdir())


def test_an_epsilon_is_computed_once_for_its_key(exact, directory):
    first = exact("poisson", 20, 1e-6)
    first.begin()
    assert first.result() == first.result() == exact("poisson", 20, 1e-6).result() == 2.5
    assert exact.count == 1
    exact("poisson", 21, 1e-6).result()
    assert exact.count == 2
    assert len(files(directory)) == 2


@pytest.mark.parametrize("kept", [1.9, 3.1, "2.5", None])
def test_a_kept_value_outside_the_bounds_is_computed_again(exact, directory, kept):
    exact("a").result()
    (file,) = files(directory)
    file.write_text(json.dumps({"epsilon": kept}))
    assert exact("a").result() == 2.5
    assert exact.count == 2
    assert json.loads(file.read_text()) == {"epsilon": 2.5}


def test_what_decides_is_computed_and_never_read(exact, directory):
    exact("a").result()
    (file,) = files(directory)
    file.write_text(json.dumps({"epsilon": 2.1}))
    assert exact("a").result() == 2.1
    undecided = exact("a")
    assert undecided.result() == 2.1
    assert undecided.fresh() == undecided.result() == 2.5


def test_a_quick_value_is_not_worth_a_file(exact, directory, monkeypatch):
    monkeypatch.setattr(epsilons, "_WORTH_A_FILE", 0.5)
    exact("a").result()
    assert not (directory / "epsilons").exists()


def test_the_computation_goes_on_beside_other_work_and_says_so_once_when_it_takes_long(directory, monkeypatch, caplog):
    caplog.set_level("INFO", "fedcompute.builder.epsilons")
    monkeypatch.setattr(epsilons, "PATIENCE", 0.01)
    go_on = threading.Event()

    def compute():
        assert go_on.wait(30)
        return 2.5

    slow = ExactEpsilon(compute, ("slow",), (2.0, 3.0))
    slow.begin()
    with pytest.raises(TimeoutError):
        slow.result(0.01)
    assert caplog.text == ""
    waiting = threading.Thread(target=slow.result)
    waiting.start()
    while "The exact epsilon takes more than 0.01 seconds" not in caplog.text:
        assert waiting.is_alive()
    go_on.set()
    waiting.join()
    assert slow.result() == 2.5
    assert caplog.text.count("takes more than") == 1


def test_a_failure_reaches_whoever_asks(directory):
    def fail():
        raise ValueError("no accountant")

    broken = ExactEpsilon(fail, ("a",), (2.0, 3.0))
    broken.begin()
    for ask in (broken.result, broken.fresh):
        with pytest.raises(ValueError, match="no accountant"):
            ask()
