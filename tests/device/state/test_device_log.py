"""What `fedcompute device logs` shows."""

import pytest

from fedcompute.device.owner import Owner
from fedcompute.device.state import device_log
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_log import DETAIL_LIMIT, OUTPUT_LIMIT, LogEntry, read_entries, write_entry

OWNER = Owner("com.example.app", "com.example.app.Service", "A" * 64)


@pytest.fixture
def tx():
    database = DeviceDatabase()
    with database.write() as tx:
        yield tx
    database.close()


def entry(number, owner=OWNER, **more):
    return LogEntry(number, None if owner is None else owner.digest, "on_execute", "ok", f"{number}", **more)


def test_entries_come_back_oldest_first_with_their_ids(tx):
    for number in range(5):
        write_entry(tx, entry(number, output="printed"))
    assert read_entries(tx) == [entry(number, output="printed", id=number + 1) for number in range(5)]
    assert [one.time for one in read_entries(tx, limit=2)] == [3, 4]
    assert [one.time for one in read_entries(tx, after=3)] == [3, 4]
    assert read_entries(tx, after=5) == []


def test_entries_are_told_apart_by_owner(tx):
    other = Owner("com.example.other", "com.example.other.Service")
    for number, owner in enumerate((OWNER, other, None, OWNER)):
        write_entry(tx, entry(number, owner))
    assert [one.time for one in read_entries(tx, owner=OWNER)] == [0, 3]
    assert [one.time for one in read_entries(tx, owner=OWNER, limit=1)] == [3]
    assert [one.time for one in read_entries(tx)] == [0, 1, 2, 3]


def test_the_oldest_go_beyond_the_limit(tx, monkeypatch):
    monkeypatch.setattr(device_log, "ENTRIES_LIMIT", 3)
    for number in range(7):
        write_entry(tx, entry(number))
    assert [one.time for one in read_entries(tx)] == [4, 5, 6]


def test_what_was_printed_goes_before_the_rest(tx, monkeypatch):
    monkeypatch.setattr(device_log, "OUTPUTS_LIMIT", 3)
    for number in range(7):
        write_entry(tx, entry(number, output="printed"))
    assert [one.output for one in read_entries(tx)] == [""] * 4 + ["printed"] * 3


def test_of_a_long_output_the_end_is_kept_and_of_a_long_detail_the_beginning(tx):
    write_entry(tx, LogEntry(1, None, "s", "ok", "d" * 10_000 + "end", "o" * 100_000 + "end"))
    (kept,) = read_entries(tx)
    assert (len(kept.detail), len(kept.output)) == (DETAIL_LIMIT, OUTPUT_LIMIT)
    assert kept.output.endswith("oend")
    assert kept.detail == "d" * DETAIL_LIMIT
