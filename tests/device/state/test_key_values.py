"""Remote and local data on the device's side (spec/device.md 7.2, 7.4)."""

import pytest

from fedcompute.device.owner import Owner
from fedcompute.device.state.apps import App, find_app, install
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.key_values import get_value, keep_download, key_set, put_value, remove_value, stored_bytes

OWNER = Owner("com.example.app", "com.example.app.Service", "A" * 64)
OTHER = Owner("com.example.app", "com.example.app.Service", "B" * 64)


@pytest.fixture
def tx():
    database = DeviceDatabase()
    with database.write() as tx:
        yield tx
    database.close()


def everything(tx, owner=OWNER):
    return {key: get_value(tx, "remote_data", owner, key) for key in key_set(tx, "remote_data", owner)}


@pytest.mark.parametrize("table", ["remote_data", "local_data"])
def test_values_are_put_got_and_removed(tx, table):
    assert get_value(tx, table, OWNER, "k") is None
    assert put_value(tx, table, OWNER, "k", b"1") is None
    assert put_value(tx, table, OWNER, "k", b"") == b"1"
    assert get_value(tx, table, OWNER, "k") == b""
    assert remove_value(tx, table, OWNER, "k") == b""
    assert remove_value(tx, table, OWNER, "k") is None
    assert key_set(tx, table, OWNER) == []


@pytest.mark.parametrize("key", ["", "é", "a'; DROP TABLE local_data; --", "a\0b", "%", "\U0001f600", "k" * 10_000])
def test_any_text_is_a_key(tx, key):
    put_value(tx, "local_data", OWNER, key, b"v")
    put_value(tx, "local_data", OWNER, "other", b"w")
    assert get_value(tx, "local_data", OWNER, key) == b"v"
    assert key_set(tx, "local_data", OWNER) == sorted([key, "other"])
    assert remove_value(tx, "local_data", OWNER, key) == b"v"


def test_owners_and_tables_are_apart(tx):
    put_value(tx, "local_data", OWNER, "k", b"local")
    put_value(tx, "remote_data", OWNER, "k", b"remote")
    put_value(tx, "local_data", OTHER, "k", b"other")
    remove_value(tx, "local_data", OTHER, "k")
    assert (get_value(tx, "local_data", OWNER, "k"), get_value(tx, "remote_data", OWNER, "k")) == (b"local", b"remote")
    assert stored_bytes(tx, "local_data", OTHER) == 0


def test_what_is_stored_counts_in_bytes_with_what_a_row_takes(tx):
    put_value(tx, "local_data", OWNER, "é", bytes(100))
    put_value(tx, "local_data", OWNER, "ab", b"")
    assert stored_bytes(tx, "local_data", OWNER) == (300 + 2 + 100) + (300 + 2)


@pytest.mark.parametrize(
    ("retained", "left"),
    [
        (["old", "new", "both"], {"old": b"1", "new": b"2", "both": b"2"}),
        (["new"], {"new": b"2"}),
        (["old"], {"old": b"1"}),
        (["both", "both"], {"both": b"2"}),
        (["never seen"], {}),
        ([], {}),
    ],
)
def test_of_a_download_and_what_was_there_remains_what_is_retained(tx, retained, left):
    install(tx, App(OWNER, __file__), 0)
    put_value(tx, "remote_data", OWNER, "old", b"1")
    put_value(tx, "remote_data", OWNER, "both", b"1")
    put_value(tx, "remote_data", OTHER, "old", b"other")
    assert keep_download(tx, OWNER, {"new": b"2", "both": b"2"}, retained, 3600) == len(left)
    assert everything(tx) == left
    assert everything(tx, OTHER) == {"old": b"other"}
    assert find_app(tx, OWNER.package, OWNER.class_name).sync_token == 3600


def test_keys_with_quotes_do_not_break_a_download(tx):
    put_value(tx, "remote_data", OWNER, "it's", b"1")
    keep_download(tx, OWNER, {"'); DROP TABLE app; --": b"2"}, ["it's", "'); DROP TABLE app; --"], 3600)
    assert everything(tx) == {"it's": b"1", "'); DROP TABLE app; --": b"2"}
