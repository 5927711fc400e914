"""A device's file: its versions, its transactions, and who else uses it."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedcompute.device.state import schema
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.errors import OperationFailed, Reason


@pytest.fixture
def path(tmp_path):
    return tmp_path / "device.db"


@pytest.fixture
def database(path):
    database = DeviceDatabase(path)
    yield database
    database.close()


def put(tx, name, value=b"v"):
    tx.execute("INSERT INTO setting VALUES (?, ?)", (name, value))


def names(tx):
    return [row[0] for row in tx.execute("SELECT name FROM setting ORDER BY name")]


def test_what_is_written_is_there_after_the_file_was_closed(path):
    first = DeviceDatabase(path)
    with first.write() as tx:
        put(tx, "a")
    first.close()
    second = DeviceDatabase(path)
    with second.read() as tx:
        assert names(tx) == ["a"]
    second.close()


def test_the_file_and_all_that_is_beside_it_is_the_owners_only(path):
    before = os.umask(0)
    try:
        database = DeviceDatabase(path)
        with database.write() as tx:
            put(tx, "a")
        found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        database.close()
    finally:
        os.umask(before)
    assert found == dict.fromkeys(["device.db", "device.db-wal", "device.db-shm"], 0o600)


def test_a_block_that_raises_writes_nothing(database):
    def fails():
        with database.write() as tx:
            put(tx, "a")
            raise ValueError

    with pytest.raises(ValueError):
        fails()
    with database.write() as tx:
        assert names(tx) == []
        put(tx, "b")
    with database.read() as tx:
        assert names(tx) == ["b"]


def test_a_fault_of_a_statement_is_not_one_of_storage(database):
    def twice():
        with database.write() as tx:
            put(tx, "a")
            put(tx, "a")

    with pytest.raises(sqlite3.IntegrityError):
        twice()
    with database.read() as tx:
        assert names(tx) == []


def test_a_transaction_within_a_transaction_is_a_fault_and_the_outer_one_is_rolled_back(database):
    def nested():
        with database.write() as tx:
            put(tx, "a")
            with database.read():
                pass

    with pytest.raises(OperationFailed, match="a transaction within a transaction") as caught:
        nested()
    assert caught.value.reason is Reason.INTERNAL
    with database.read() as tx:
        assert names(tx) == []


def test_a_reader_sees_one_state_while_another_connection_writes(path, database):
    other = DeviceDatabase(path)
    with database.read() as tx:
        assert names(tx) == []
        with other.write() as writing:
            put(writing, "a")
        assert names(tx) == []
    with database.read() as tx:
        assert names(tx) == ["a"]
    other.close()


def test_threads_take_turns(database):
    with database.write() as tx:
        put(tx, "count", 0)

    def count():
        for _ in range(50):
            with database.write() as tx:
                (value,) = tx.execute("SELECT value FROM setting").fetchone()
                tx.execute("UPDATE setting SET value = ?", (value + 1,))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as tx:
        assert tx.execute("SELECT value FROM setting").fetchone() == (200,)


def test_changes_of_others_are_noticed_and_ones_own_are_not(path, database):
    other = DeviceDatabase(path)
    seen = database.changes()
    with database.write() as tx:
        put(tx, "mine")
    assert database.changes() == seen
    with other.write() as tx:
        put(tx, "another's")
    assert database.changes() != seen
    other.close()


OPENED = """
import sys
from pathlib import Path
from fedcompute.device.state.database import DeviceDatabase

sys.stdin.read(1)
database = DeviceDatabase(Path(sys.argv[1]))
with database.write() as tx:
    tx.execute("INSERT INTO setting VALUES (?, x'00')", (sys.argv[2],))
"""


def test_processes_that_open_a_new_file_at_the_same_time_all_get_it(path):
    processes = [
        subprocess.Popen([sys.executable, "-c", OPENED, str(path), str(number)], stdin=subprocess.PIPE)
        for number in range(6)
    ]
    time.sleep(0.5)
    for process in processes:
        process.stdin.close()
    assert [process.wait(30) for process in processes] == [0] * 6
    database = DeviceDatabase(path)
    with database.read() as tx:
        assert names(tx) == [f"{number}" for number in range(6)]
    database.close()


def test_opening_a_file_twice_in_a_process_keeps_its_locks(path):
    """The last process that closes a file removes what others have not yet seen, unless they hold their locks."""
    first = DeviceDatabase(path)
    second = DeviceDatabase(path)
    second.close()
    other = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM task').fetchall(); c.close()"
    )
    subprocess.run([sys.executable, "-c", other, str(path)], check=True)
    assert path.with_name("device.db-wal").exists()
    with first.write() as tx:
        put(tx, "a")
    first.close()
    again = DeviceDatabase(path)
    with again.read() as tx:
        assert names(tx) == ["a"]
    again.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from fedcompute.device.state.database import DeviceDatabase

database = DeviceDatabase(Path(sys.argv[1]))
with database.write() as tx:
    tx.execute("INSERT INTO setting VALUES ('before', x'00')")
with database.write() as tx:
    tx.execute("INSERT INTO setting VALUES ('within', x'00')")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_whole_transactions(path):
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    database = DeviceDatabase(path)
    with database.read() as tx:
        assert names(tx) == ["before"]
    database.close()


def test_a_file_of_a_newer_release_is_refused_and_left_alone(path):
    DeviceDatabase(path).close()
    newer = len(schema.MIGRATIONS) + 1
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(OperationFailed, match=f"is of version {newer}; this release knows {newer - 1}") as caught:
        DeviceDatabase(path)
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert path.read_bytes() == before


def test_a_step_that_fails_leaves_the_older_version(path, monkeypatch):
    DeviceDatabase(path).close()
    broken = (*schema.MIGRATIONS, "CREATE TABLE added (x); CREATE TABLE added (x)")
    monkeypatch.setattr("fedcompute.device.state.database.MIGRATIONS", broken)
    with pytest.raises(OperationFailed, match="already exists"):
        DeviceDatabase(path)
    monkeypatch.undo()
    database = DeviceDatabase(path)
    with database.read() as tx:
        assert tx.execute("SELECT name FROM sqlite_master WHERE name = 'added'").fetchone() is None
    database.close()


def test_a_step_is_taken_once(path, monkeypatch):
    DeviceDatabase(path).close()
    monkeypatch.setattr("fedcompute.device.state.database.MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE added (x)"))
    for _ in range(2):
        database = DeviceDatabase(path)
        with database.write() as tx:
            tx.execute("INSERT INTO added VALUES (1)")
        database.close()


def unusable(path: Path) -> str:
    with pytest.raises(OperationFailed) as caught:
        DeviceDatabase(path)
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert "name another device directory" in caught.value.remedy
    return caught.value.detail


def test_what_is_no_database_is_refused(path, tmp_path):
    path.write_bytes(b"no database, whatever its name is" * 100)
    assert unusable(path) == f"{path} cannot be used: file is not a database"
    assert unusable(tmp_path) == f"{tmp_path} cannot be used: unable to open database file"
    absent = tmp_path / "absent" / "device.db"
    assert unusable(absent) == f"{absent} cannot be used: No such file or directory"


def test_a_file_that_gets_damaged_is_a_failure_of_storage(path):
    database = DeviceDatabase(path)
    with database.write() as tx:
        tx.executemany("INSERT INTO setting VALUES (?, ?)", ((str(n), bytes(3000)) for n in range(200)))
    database.close()
    with path.open("r+b") as file:
        # Behind the pages that every table begins with.
        file.seek(100 * 4096)
        file.write(b"\xff" * 100 * 4096)
    database = DeviceDatabase(path)
    with pytest.raises(OperationFailed, match="malformed") as caught, database.read() as tx:
        tx.execute("SELECT SUM(LENGTH(value)) FROM setting").fetchone()
    assert caught.value.reason is Reason.STORAGE_FAILED
    database.close()


def test_a_file_that_another_keeps_locked_is_a_failure_of_storage(path, monkeypatch):
    monkeypatch.setattr("fedcompute.device.state.database._BUSY_SECONDS", 0.1)
    database = DeviceDatabase(path)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with pytest.raises(OperationFailed, match="database is locked") as caught, database.write():
            pass
        assert time.monotonic() - start < 2
        assert caught.value.reason is Reason.STORAGE_FAILED
        with database.read() as tx:
            assert names(tx) == []
        other.execute("ROLLBACK")
    other.close()
    with database.write() as tx:
        put(tx, "a")
    database.close()


def test_what_is_deleted_is_overwritten(path):
    database = DeviceDatabase(path)
    secret = b"a user's secret" * 10
    with database.write() as tx:
        put(tx, "a", secret)
    with database.write() as tx:
        tx.execute("DELETE FROM setting")
    database.close()
    assert secret[:15] not in path.read_bytes()


def test_a_database_in_memory_works_the_same():
    database = DeviceDatabase()
    with database.write() as tx:
        put(tx, "a")
    with database.read() as tx:
        assert names(tx) == ["a"]
    database.close()
