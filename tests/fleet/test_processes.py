import subprocess
import sys
import time

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.fleet.processes import Fleet
from fedcompute.fleet.settings import FleetSettings

# Nothing listens there: devices fail to check in and come back.
NOBODY = "http://localhost:9"


def settings(**changes):
    return FleetSettings(**{"server_url": NOBODY, "population": "p", "devices": 6, "processes": 2, **changes})


def wait_until(question, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def test_settings_survive_the_way_to_a_worker_and_impossible_ones_are_refused():
    assert FleetSettings.from_json(settings().to_json()) == settings()
    for wrong in ({"processes": 7}, {"processes": 0}, {"pause_minimum": 1.0}):
        with pytest.raises(OperationFailed) as refusal:
            settings(**wrong)
        assert refusal.value.reason is Reason.SETTINGS_INVALID


def test_every_device_reports_and_no_worker_outlives_the_block(tmp_path):
    with Fleet(settings(), tmp_path / "fleet.log") as fleet:
        wait_until(lambda: fleet.progress.outcomes["server_unreachable"] >= 6)
        fleet.check()
        assert set(fleet.progress.states) == set(range(6))
        assert sum(fleet.progress.by_state().values()) == 6
        workers = fleet._workers
    assert all(worker.poll() is not None for worker in workers)


def test_a_worker_that_dies_is_noticed(tmp_path):
    with Fleet(settings(), tmp_path / "fleet.log") as fleet:
        fleet._workers[0].kill()
        fleet._workers[0].wait()
        with pytest.raises(OperationFailed, match="fleet process 0"):
            fleet.check()


def test_a_worker_with_data_that_does_not_exist_ends_and_says_why(tmp_path):
    log = tmp_path / "fleet.log"
    with Fleet(settings(data="nowhere", processes=1), log) as fleet:
        wait_until(lambda: fleet._workers[0].poll() is not None)
        with pytest.raises(OperationFailed):
            fleet.check()
    assert "'nowhere' is neither" in log.read_text()


def test_a_worker_leaves_when_its_parent_is_gone():
    worker = subprocess.Popen(
        [sys.executable, "-m", "fedcompute.fleet.worker", "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker.stdin.write(settings().to_json() + "\n")
    worker.stdin.flush()
    assert '"device"' in worker.stdout.readline()
    worker.stdin.close()
    assert worker.wait(20) == 0
    worker.stdout.close()
