"""The folder of a device: who may read it, who runs on it, what is wrong with it."""

import os
import sqlite3
import stat
import threading
import time

import pytest

from fedcompute.device.directory import DeviceDirectory
from fedcompute.errors import OperationFailed, Reason


@pytest.fixture
def device(tmp_path):
    opened = DeviceDirectory.open(tmp_path / "here" / "device")
    yield opened
    opened.close()


def test_nobody_else_on_the_machine_can_read_a_device(device):
    old = os.umask(0)
    try:
        with device.alone(), device.database.write() as tx:
            tx.execute("INSERT INTO setting VALUES ('name', 'value')")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in device.path.iterdir()}
    finally:
        os.umask(old)
    assert modes == {
        "device.db": 0o600,
        "device.db-wal": 0o600,
        "device.db-shm": 0o600,
        "lock": 0o600,
        "scratch": 0o700,
    }
    assert stat.S_IMODE(device.path.stat().st_mode) == 0o700


def test_one_process_at_a_time_runs_a_device(device):
    assert not device.in_use()
    with device.alone():
        assert device.in_use()
        with pytest.raises(OperationFailed) as failure, device.alone():
            pass
        assert failure.value.reason == Reason.DATA_IN_USE
        assert device.in_use()
    assert not device.in_use()
    with device.alone():
        pass


def test_those_who_ask_whether_a_device_runs_do_not_keep_it_from_starting(device):
    with device.alone():
        pass
    over = threading.Event()

    def ask():
        while not over.is_set():
            device.in_use()

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for one in askers:
        one.start()
    try:
        for _ in range(20):
            with device.alone():
                time.sleep(0.001)
    finally:
        over.set()
        for one in askers:
            one.join()


def test_what_a_killed_process_left_in_scratch_goes(device):
    left = device.scratch / "training-1" / "deep"
    left.mkdir(parents=True)
    (left / "update").write_bytes(b"of the user")
    left.chmod(0)
    with device.alone():
        assert list(device.scratch.iterdir()) == []


def test_a_link_in_place_of_scratch_is_not_followed(device, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    device.scratch.symlink_to(tmp_path / "mine")
    with device.alone():
        assert not device.scratch.is_symlink()
    assert (tmp_path / "mine" / "file").read_text() == "kept"


def refused(folder):
    with pytest.raises(OperationFailed) as failure:
        DeviceDirectory.open(folder)
    assert failure.value.reason == Reason.STORAGE_FAILED
    assert str(folder) in failure.value.detail
    return failure.value


def test_a_folder_that_cannot_be_used_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file")
    refused(tmp_path / "file" / "below")
    (tmp_path / "a" / "device.db").mkdir(parents=True)
    refused(tmp_path / "a")


def test_a_file_that_is_no_database_is_a_typed_error_and_stays(tmp_path):
    (tmp_path / "device.db").write_text("something else, and long enough to be looked at\n" * 100)
    assert "not a database" in refused(tmp_path).detail
    assert (tmp_path / "device.db").read_text().startswith("something else")


def test_a_file_of_a_newer_release_is_a_typed_error(tmp_path):
    connection = sqlite3.connect(tmp_path / "device.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert "version 99" in refused(tmp_path).detail


def test_a_lock_that_cannot_be_opened_is_a_typed_error(device):
    (device.path / "lock").mkdir()
    with pytest.raises(OperationFailed) as failure, device.alone():
        pass
    assert failure.value.reason == Reason.STORAGE_FAILED
    assert "lock" in failure.value.detail
