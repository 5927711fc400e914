"""What a device forgets, and when."""

import asyncio

import pytest

from fedcompute.device.jobs import background
from fedcompute.device.jobs.background import background_jobs
from fedcompute.device.jobs.conditions import Constraint
from fedcompute.device.jobs.flags import Flags, put_flag
from fedcompute.device.owner import Owner
from fedcompute.device.state import apps, tasks
from fedcompute.device.state.apps import App
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import Contribution, TaskHistory, record_contribution
from fedcompute.device.state.settings import set_consent
from fedcompute.device.state.tasks import ScheduleRequest

NOW = 1_700_000_000_000
DAY = 86_400_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
OTHER = Owner("org.example.app", "org.example.app.Other", "AB" * 32)
# Of the schema, what tells nothing of the user.
LASTING = {"app", "remote_data", "encryption_key", "setting", "background_job"}


@pytest.fixture
def database():
    made = DeviceDatabase()
    yield made
    made.close()


@pytest.fixture
def jobs(database):
    async def nothing():
        pass

    return background_jobs(database, lambda: NOW, fetch_keys=nothing, download=nothing)


def fill(tx, owner, time=NOW):
    """A row of each kind for an owner; a contribution of its task, and one of a run that nobody scheduled."""
    assert tasks.schedule(tx, ScheduleRequest(owner, "digits", "https://learn.example"), time, Flags()) is None
    for job_id in (owner.job_id("digits"), 7):
        record_contribution(tx, Contribution(job_id, "digits", "1", 1, time / 1000, resumption_token=b"t"))
    for table in ("remote_data", "local_data"):
        tx.execute(f"INSERT INTO {table} VALUES (?, 'key', x'00')", (owner.digest,))
    request = tx.execute(
        "INSERT INTO request_log (owner, app_package, time, row_count, rows) VALUES (?, 'app', ?, 1, x'80')",
        (owner.digest, time),
    ).lastrowid
    tx.execute(
        "INSERT INTO event_log (request_id, owner, row_index, type, time, data) VALUES (?, ?, 0, 1, ?, x'80')",
        (request, owner.digest, time),
    )
    tx.execute("INSERT INTO error_count (owner, code, day, count) VALUES (?, 1, 1, 1)", (owner.digest,))
    tx.execute(
        "INSERT INTO device_log (time, owner, subject, outcome, detail) VALUES (?, ?, 's', 'ok', '')",
        (time, owner.digest),
    )
    tx.execute("INSERT INTO authorization_token VALUES ('https://learn.example', ?, 't', ?)", (owner.id, time + DAY))
    tx.execute("INSERT INTO encryption_key VALUES ('https://learn.example', ?, x'00', ?)", (owner.id, time))


def counts(tx):
    names = [
        row[0] for row in tx.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB 'sq*'")
    ]
    return {name: tx.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in names}


def test_jobs_have_androids_numbers_periods_and_constraints(jobs):
    assert {name: (job.number, job.period and job.period // 3_600_000) for name, job in jobs.items()} == {
        "encryption_key_fetch": (1000, 24),
        "delete_expired": (1001, 24),
        "download": (1004, 6),
        "maintenance": (1005, 24),
        "reset_data": (1007, None),
    }
    assert jobs["encryption_key_fetch"].constraints == {
        Constraint.IDLE, Constraint.BATTERY_NOT_LOW, Constraint.UNMETERED,
    }  # fmt: skip
    assert jobs["delete_expired"].constraints == {Constraint.IDLE, Constraint.BATTERY_NOT_LOW}
    assert jobs["maintenance"].constraints == {Constraint.BATTERY_NOT_LOW, Constraint.STORAGE_NOT_LOW}
    assert jobs["reset_data"].kill_switches == ()


def test_the_wipe_leaves_nothing_that_tells_of_the_user(database, jobs):
    with database.write() as tx:
        apps.install(tx, App(OWNER, "/code"), NOW)
        fill(tx, OWNER)
        set_consent(tx, "measurement", False, NOW)
        before = counts(tx)
    assert all(before.values()), "a table that this test does not fill"
    asyncio.run(jobs["reset_data"].work())
    with database.read() as tx:
        after = counts(tx)
    assert {name for name, count in after.items() if count} == LASTING


def test_maintenance_forgets_what_is_older_than_sixty_days(database, jobs):
    with database.write() as tx:
        for owner, age in ((OWNER, 60 * DAY), (OTHER, 60 * DAY + 1)):
            apps.install(tx, App(owner, "/code"), NOW)
            fill(tx, owner, NOW - age)
    asyncio.run(jobs["maintenance"].work())
    with database.read() as tx:
        for table in ("request_log", "event_log", "device_log"):
            assert tx.execute(f"SELECT owner FROM {table}").fetchall() == [(OWNER.digest,)]
        assert counts(tx)["local_data"] == 2


@pytest.mark.parametrize("gone", ["uninstalled", "not allowed"])
def test_maintenance_removes_what_is_stored_for_services_that_are_gone(database, jobs, gone):
    with database.write() as tx:
        for owner in (OWNER, OTHER):
            apps.install(tx, App(owner, "/code"), NOW)
            fill(tx, owner)
        if gone == "uninstalled":
            tx.execute("DELETE FROM app WHERE owner = ?", (OTHER.digest,))
        else:
            other = Owner("org.gone", "org.gone.Service", "CD" * 32)
            apps.install(tx, App(other, "/code"), NOW)
            fill(tx, other)
            put_flag(tx, "isolated_service_allow_list", f"org.example.app, org.gone:{'EF' * 32}")
    asyncio.run(jobs["maintenance"].work())
    with database.read() as tx:
        kept = {OWNER.digest} if gone == "uninstalled" else {OWNER.digest, OTHER.digest}
        for table in ("task", "registration", "local_data", "remote_data", "request_log", "event_log", "error_count"):
            assert {row[0] for row in tx.execute(f"SELECT owner FROM {table}")} == kept, table
        jobs_kept = {7, OWNER.job_id("digits")} | (set() if gone == "uninstalled" else {OTHER.job_id("digits")})
        for table in ("task_history", "resumption"):
            assert {row[0] for row in tx.execute(f"SELECT job_id FROM {table}")} == jobs_kept, table


def test_maintenance_of_a_device_without_apps_keeps_its_own_log(database, jobs):
    with database.write() as tx:
        fill(tx, OTHER)
        tx.execute("INSERT INTO device_log (time, subject, outcome, detail) VALUES (?, 'download', 'ok', '')", (NOW,))
    asyncio.run(jobs["maintenance"].work())
    with database.read() as tx:
        assert tx.execute("SELECT subject FROM device_log").fetchall() == [("download",)]
        assert counts(tx)["local_data"] == 0


def test_expired_contributions_and_tokens_go_daily(database, jobs):
    history = TaskHistory(database)
    with database.write() as tx:
        put_flag(tx, "task_history_ttl_millis", "1000")
        fill(tx, OWNER, NOW - 1001)
        tx.execute("UPDATE authorization_token SET expires = ?", (NOW,))
    asyncio.run(jobs["delete_expired"].work())
    assert history.newest(OWNER.job_id("digits"), "digits", "1") is None
    assert history.token("https://learn.example", OWNER.id, 0.0) is None


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_keys_are_fetched_in_the_background_only_where_that_is_wanted(database, wanted):
    fetched = []

    async def fetch():
        fetched.append(1)

    jobs = background_jobs(database, lambda: NOW, fetch_keys=fetch, download=fetch)
    with database.write() as tx:
        put_flag(tx, "enable_background_encryption_key_fetch", wanted)
    asyncio.run(jobs["encryption_key_fetch"].work())
    assert bool(fetched) == (wanted == "true")


def test_a_periodic_job_is_due_at_first_and_then_a_period_after_its_start(database, jobs):
    job = jobs["maintenance"]
    with database.write() as tx:
        background.set_up(tx, jobs.values(), NOW)
        background.set_up(tx, jobs.values(), NOW + 5)
        assert background.earliest_runs(tx) == [
            (name, NOW) for name in ("delete_expired", "download", "encryption_key_fetch", "maintenance")
        ]
        assert not background.begin(tx, job, NOW - 1)
        assert background.begin(tx, job, NOW + 10)
        assert background.end(tx, job, NOW + 10, NOW + 500, True) == NOW + 10 + DAY
        assert not background.begin(tx, job, NOW + 501)
        assert background.force(tx, "maintenance")
        assert not background.force(tx, "reset_data")
        assert background.begin(tx, job, NOW + 501)
        # A job that took longer than its period is due at once, and not in the past.
        assert background.end(tx, job, NOW, NOW + 2 * DAY, False) == NOW + 2 * DAY


def test_a_job_that_runs_once_is_tried_hourly_until_it_succeeds(database, jobs):
    job = jobs["reset_data"]
    with database.write() as tx:
        set_consent(tx, "measurement", False, NOW)
        start = NOW + DAY
        assert background.begin(tx, job, start)
        assert background.end(tx, job, start, start + 5, False) == start + 5 + 3_600_000
        assert background.end(tx, job, start, start + 9, True) is None
        assert background.earliest_runs(tx) == []


def test_after_the_wipe_no_file_of_the_device_holds_what_it_knew(tmp_path):
    async def nothing():
        pass

    secret = b"what the user did" * 10
    made = DeviceDatabase(tmp_path / "device.db")
    with made.write() as tx:
        tx.execute("INSERT INTO local_data VALUES (?, 'key', ?)", (OWNER.digest, secret))
    assert any(secret in file.read_bytes() for file in tmp_path.iterdir())
    jobs = background_jobs(made, lambda: NOW, fetch_keys=nothing, download=nothing)
    asyncio.run(jobs["reset_data"].work())
    assert not any(secret in file.read_bytes() for file in tmp_path.iterdir())
    made.close()
