"""Fleets whose devices are jobs of an executor, which here has processes of this machine."""

import os
import signal
import socket
import time

import pytest

from fedcompute.errors import OperationFailed
from fedcompute.fleet.settings import FleetSettings
from fedcompute.fleet.spread import SpreadFleet, own_address
from fedcompute.server.executors import ProcessExecutor

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


@pytest.fixture(scope="module")
def executor():
    pool = ProcessExecutor(2)
    yield pool
    pool.close()


def test_every_device_reports_and_every_job_ends_with_the_block(executor, tmp_path):
    with SpreadFleet(settings(), tmp_path / "fleet.log", executor, "127.0.0.1") as fleet:
        wait_until(lambda: fleet.progress.outcomes["server_unreachable"] >= 6)
        fleet.check()
        assert set(fleet.progress.states) == set(range(6))
    assert [job.result(0) for job in fleet._jobs] == [None, None]
    assert "server_unreachable" in (tmp_path / "fleet.log").read_text()


def test_devices_of_a_machine_that_is_lost_start_again_elsewhere(executor, tmp_path):
    with SpreadFleet(settings(processes=1), tmp_path / "fleet.log", executor, "127.0.0.1") as fleet:
        wait_until(lambda: fleet.progress.outcomes)
        for pid in list(executor._pool._processes):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: set(fleet.progress.states.values()) == {"starting"})
        wait_until(lambda: set(fleet.progress.states.values()) != {"starting"})
        fleet.check()


def test_a_job_with_data_that_does_not_exist_ends_the_fleet_and_says_why(executor, tmp_path):
    with SpreadFleet(settings(data="nowhere"), tmp_path / "fleet.log", executor, "127.0.0.1") as fleet:
        wait_until(lambda: any(job.done() for job in fleet._jobs))
        with pytest.raises(OperationFailed, match="'nowhere' is neither"):
            fleet.check()


def test_whoever_does_not_know_the_word_is_not_heard(executor, tmp_path):
    with SpreadFleet(settings(processes=1), tmp_path / "fleet.log", executor, "127.0.0.1") as fleet:
        with socket.create_connection(fleet._server.getsockname()) as stranger:
            stranger.sendall(b'guess 0\n{"device": 77, "state": "here"}\n')
            assert stranger.recv(1) == b""
        assert 77 not in fleet.progress.states


def test_the_address_that_nodes_reach_is_the_one_on_the_way_to_their_head():
    assert own_address(None) == "127.0.0.1"
    assert own_address("127.0.0.1:6379") == "127.0.0.1"
