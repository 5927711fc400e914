"""What only PostgreSQL has: a server that may be away, drivers, passwords, isolation levels, sessions that die."""

import contextlib
import logging
import socket
import sys
import threading
import time
import traceback

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage.database import Database, lock_population
from fedcompute.storage.tasks import create_task, list_tasks

PASSWORD = "correct-horse"


@pytest.fixture
def url(postgresql_url):
    return postgresql_url


@pytest.fixture
def opened(url):
    database = Database.open(url)
    yield database
    database.close()


def refusal(url):
    with pytest.raises(OperationFailed) as caught:
        Database.open(url).close()
    return caught.value


@pytest.fixture
def guarded(postgresql):
    """A role that needs its password and may do nothing."""
    postgresql.run(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'")
    yield
    postgresql.run("DROP ROLE guarded")


@pytest.mark.parametrize(
    ("password", "words"), [("wrong-horse", "authentication failed"), (PASSWORD, "permission denied")]
)
def test_no_message_or_log_holds_the_password(postgresql, guarded, caplog, password, words):
    caplog.set_level(logging.DEBUG)
    name = postgresql.create()
    postgresql.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC", name)
    try:
        url = postgresql.url(name, f"guarded:{password}")
        for wanted in (url, f"{postgresql.url(name, 'guarded')}&password={password}"):
            refused = refusal(wanted)
            assert refused.reason is Reason.STORAGE_FAILED
            assert words in refused.detail
            told = "".join(traceback.format_exception(refused)) + refused.remedy + caplog.text
            assert password not in told
    finally:
        postgresql.drop(name)


def test_a_server_that_is_away_is_a_typed_error_without_the_password():
    pytest.importorskip("psycopg")
    with socket.socket() as unused:
        # Bound and not listening: nobody else can take the port meanwhile.
        unused.bind(("127.0.0.1", 0))
        refused = refusal(f"postgresql://someone:{PASSWORD}@127.0.0.1:{unused.getsockname()[1]}/fedcompute")
    assert refused.reason is Reason.STORAGE_FAILED
    assert PASSWORD not in "".join(traceback.format_exception(refused))


def test_a_database_that_does_not_exist_is_a_typed_error(postgresql):
    refused = refusal(postgresql.url("nowhere"))
    assert (refused.reason, "does not exist" in refused.detail) == (Reason.STORAGE_FAILED, True)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://someone:correct@horse@host/db",
        "postgresql+asyncpg://someone:correct-horse@host/db",
        "postgresql://someone:correct-horse@host:port/db",
    ],
)
def test_a_url_that_cannot_be_used_is_a_settings_error_that_does_not_repeat_it(url):
    refused = refusal(url)
    assert refused.reason is Reason.SETTINGS_INVALID
    assert "horse" not in "".join(traceback.format_exception(refused))


def test_a_missing_driver_is_a_settings_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    refused = refusal(f"postgresql://someone:{PASSWORD}@host/db")
    assert refused.reason is Reason.SETTINGS_INVALID
    assert "fedcompute[postgresql]" in refused.remedy
    assert PASSWORD not in "".join(traceback.format_exception(refused))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_the_usual_short_urls_mean_the_driver_that_we_have(url, scheme):
    Database.open(url.replace("postgresql+psycopg", scheme)).close()


def test_writers_see_what_was_committed_and_readers_see_one_moment_and_cannot_write(opened, task_proto, now):
    with opened.write() as tx:
        assert tx.exec_driver_sql("SHOW transaction_isolation").scalar() == "read committed"
    with opened.read() as tx:
        assert tx.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"
    with pytest.raises(OperationFailed, match="read-only"), opened.read() as tx:
        create_task(tx, task_proto(), now)
    with opened.write() as tx:
        create_task(tx, task_proto(), now)


def test_a_session_that_ends_in_mid_transaction_is_a_typed_error_and_the_next_one_works(
    postgresql, opened, task_proto, now
):
    def write():
        with opened.write() as tx:
            create_task(tx, task_proto(), now)
            (process,) = tx.exec_driver_sql("SELECT pg_backend_pid()").one()
            postgresql.run(f"SELECT pg_terminate_backend({process})")
            list_tasks(tx)

    with pytest.raises(OperationFailed) as caught:
        write()
    assert caught.value.reason is Reason.STORAGE_FAILED
    with opened.read() as tx:
        assert list_tasks(tx) == []
    opened.check()


def test_a_server_that_freezes_with_a_lock_does_not_keep_it(opened, url):
    frozen = Database.open(f"{url}&options=-c%20idle_in_transaction_session_timeout%3D300ms")
    locked = threading.Event()
    caught = []

    def freeze():
        try:
            with frozen.write() as tx:
                lock_population(tx, "digits")
                locked.set()
                time.sleep(1)
                tx.exec_driver_sql("SELECT 1")
        except OperationFailed as error:
            caught.append(error.reason)

    thread = threading.Thread(target=freeze)
    thread.start()
    assert locked.wait(10)
    with opened.write() as tx:
        lock_population(tx, "digits")
    thread.join(10)
    frozen.close()
    assert caught == [Reason.STORAGE_FAILED]


def test_connections_that_run_out_are_a_typed_error(opened):
    opened._engine.pool._timeout = 0.05
    with contextlib.ExitStack() as held:

        def take_all():
            for _ in range(100):
                held.enter_context(opened.read())

        with pytest.raises(OperationFailed, match="in use"):
            take_all()
