"""Installed apps, and what goes with them (spec/device.md 8, 9.3)."""

from pathlib import Path

import pytest

from fedcompute.device.developer.log_records import EventLogRecord, RequestLogRecord
from fedcompute.device.owner import Owner
from fedcompute.device.state import error_counts, key_values, log_records
from fedcompute.device.state.apps import OWNED_TABLES, App, find_app, install, list_apps, uninstall
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_log import LogEntry, write_entry
from fedcompute.device.state.history import Contribution, TaskHistory

NOW = 1_700_000_000_000
OWNER = Owner("com.example.app", "com.example.app.Service", "A" * 64)
SIGNED_ANEW = Owner("com.example.app", "com.example.app.Service", "B" * 64)
NEIGHBOUR = Owner("com.example.app", "com.example.app.Other", "A" * 64)


@pytest.fixture
def database():
    database = DeviceDatabase()
    yield database
    database.close()


@pytest.fixture
def tx(database):
    with database.write() as tx:
        yield tx


def app(owner=OWNER, **more):
    return App(owner, Path("/apps/one"), "https://example.com", "https://example.com/data", **more)


def fill(tx, owner, job_id):
    """A row of everything that is stored for an owner."""
    key_values.put_value(tx, "remote_data", owner, "k", b"v")
    key_values.put_value(tx, "local_data", owner, "k", b"v")
    log_records.write_records(tx, owner, "caller", RequestLogRecord([{}]), [EventLogRecord()], NOW)
    error_counts.count(tx, owner, 5, NOW)
    write_entry(tx, LogEntry(NOW, owner.digest, "on_execute", "ok", ""))
    tx.execute("INSERT INTO registration (owner, population, job_id) VALUES (?, 'p', ?)", (owner.digest, job_id))
    tx.execute("INSERT INTO resumption VALUES (?, 'p_1', x'00')", (job_id,))
    tx.execute("INSERT INTO authorization_token VALUES ('https://example.com', ?, 't', 9999999999999)", (owner.id,))
    add_task(tx, owner, job_id)


def add_task(tx, owner, job_id):
    tx.execute(
        "INSERT INTO task (job_id, owner, package, class_name, certificate_digest, population, server, recurrent,"
        " minimum_interval, created, last_scheduled, earliest_run, scheduling_reason)"
        " VALUES (?, ?, ?, ?, ?, 'p', 's', 0, 0, 0, 0, 0, 1)",
        (job_id, owner.digest, owner.package, owner.class_name, owner.certificate_digest),
    )


def stored(tx, owner, job_id):
    """The tables that hold something of an owner or its job."""
    found = set()
    for table in (*OWNED_TABLES, "task", "app"):
        if tx.execute(f"SELECT 1 FROM {table} WHERE owner = ?", (owner.digest,)).fetchone():
            found.add(table)
    for table in ("resumption", "task_history"):
        if tx.execute(f"SELECT 1 FROM {table} WHERE job_id = ?", (job_id,)).fetchone():
            found.add(table)
    if tx.execute("SELECT 1 FROM authorization_token WHERE owner_id = ?", (owner.id,)).fetchone():
        found.add("authorization_token")
    return found


def test_an_installed_app_is_found_by_its_component(tx):
    install(tx, app(), NOW)
    assert find_app(tx, "com.example.app", "com.example.app.Service") == app()
    assert find_app(tx, "com.example.app", "com.example.app.Other") is None
    assert find_app(tx, "com.example", "com.example.app.Service") is None
    assert list_apps(tx) == [app()]


def test_apps_are_listed_by_component(tx):
    other = App(Owner("com.another", "com.another.Service"), Path("/apps/two"))
    for one in (app(), app(NEIGHBOUR), other):
        install(tx, one, NOW)
    assert list_apps(tx) == [other, app(NEIGHBOUR), app()]


def test_every_table_with_an_owner_is_emptied_by_an_uninstallation(tx):
    with_owner = {
        table
        for (table,) in tx.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if "owner" in {row[1] for row in tx.execute(f"PRAGMA table_info({table})")}
    }
    assert with_owner == {*OWNED_TABLES, "task", "app"}


def test_an_uninstalled_app_leaves_nothing_and_its_neighbours_keep_everything(database):
    history = TaskHistory(database)
    for owner, job_id in ((OWNER, 11), (NEIGHBOUR, 12)):
        with database.write() as tx:
            install(tx, app(owner), NOW)
            fill(tx, owner, job_id)
        history.record(Contribution(job_id, "p", "1", 1, NOW / 1000))
    with database.write() as tx:
        everything = stored(tx, NEIGHBOUR, 12)
        assert stored(tx, OWNER, 11) == everything
        assert len(everything) == len(OWNED_TABLES) + 5
        assert uninstall(tx, OWNER)
        assert stored(tx, OWNER, 11) == set()
        assert stored(tx, NEIGHBOUR, 12) == everything
        assert not uninstall(tx, OWNER)


def test_what_ended_tasks_have_left_goes_too(database):
    with database.write() as tx:
        install(tx, app(), NOW)
        fill(tx, OWNER, 11)
        tx.execute("DELETE FROM task")
    TaskHistory(database).record(Contribution(11, "p", "1", 1, NOW / 1000))
    with database.write() as tx:
        uninstall(tx, OWNER)
        assert stored(tx, OWNER, 11) == set()


def test_an_app_whose_job_id_is_that_of_anothers_task_takes_nothing_of_it_along(database):
    with database.write() as tx:
        for owner in (OWNER, NEIGHBOUR):
            install(tx, app(owner), NOW)
            tx.execute("INSERT INTO registration (owner, population, job_id) VALUES (?, 'p', 11)", (owner.digest,))
        add_task(tx, NEIGHBOUR, 11)
        tx.execute("INSERT INTO resumption VALUES (11, 'p_1', x'00')")
        uninstall(tx, OWNER)
        assert tx.execute("SELECT COUNT(*) FROM resumption").fetchone() == (1,)


def test_installing_again_replaces_code_and_manifest_and_keeps_the_rest(tx):
    install(tx, app(), NOW)
    fill(tx, OWNER, 11)
    key_values.keep_download(tx, OWNER, {"k": b"v"}, ["k"], 7200)
    before = stored(tx, OWNER, 11)
    newer = App(OWNER, Path("/apps/newer"), None, "https://example.com/newer")
    install(tx, newer, NOW + 1)
    assert list_apps(tx) == [App(OWNER, newer.code, None, newer.download, sync_token=7200)]
    assert stored(tx, OWNER, 11) == before


def test_another_certificate_starts_with_nothing(tx):
    install(tx, app(), NOW)
    fill(tx, OWNER, 11)
    key_values.keep_download(tx, OWNER, {"k": b"v"}, ["k"], 7200)
    install(tx, app(SIGNED_ANEW), NOW)
    assert list_apps(tx) == [app(SIGNED_ANEW)]
    assert stored(tx, OWNER, 11) == set()
    assert stored(tx, SIGNED_ANEW, 11) == {"app"}


def test_errors_are_counted_by_code_and_day(tx):
    for code, day in ((1, 0), (1, 0), (1, 1), (32, 0), (0, 0), (33, 0), (127, 0), (-1, 0)):
        error_counts.count(tx, OWNER, code, NOW + day * 86_400_000)
    day = NOW // 86_400_000
    rows = tx.execute("SELECT code, day, count FROM error_count ORDER BY code, day").fetchall()
    assert rows == [(1, day, 2), (1, day + 1, 1), (32, day, 1)]
