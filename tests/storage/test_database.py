import subprocess
import sys
import textwrap
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import IntegrityError

import fedcompute.storage.migrations as migrations
from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage import schema
from fedcompute.storage.database import Database, sqlite_file
from fedcompute.storage.iterations import get_iteration, move_iteration
from fedcompute.storage.schema import IterationStatus, metadata
from fedcompute.storage.tasks import create_task, list_tasks


def shape(url):
    engine = create_engine(url)
    inspector = inspect(engine)
    tables = {}
    for name in inspector.get_table_names():
        if name == "alembic_version":
            continue
        tables[name] = {
            "columns": {c["name"]: (str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)},
            "key": inspector.get_pk_constraint(name)["constrained_columns"],
            "parents": [
                (f["constrained_columns"], f["referred_table"], f["options"]) for f in inspector.get_foreign_keys(name)
            ],
            "indexes": sorted(
                (
                    i["name"],
                    tuple(i["column_names"]),
                    i["unique"],
                    str({k: str(v) for k, v in i.get("dialect_options", {}).items()}),
                )
                for i in inspector.get_indexes(name)
            ),
        }
    engine.dispose()
    return tables


def test_migrations_and_metadata_give_the_same_schema(database, database_url, empty_url):
    sqlite_file(empty_url)
    engine = create_engine(empty_url)
    metadata.create_all(engine)
    engine.dispose()
    assert shape(database_url) == shape(empty_url)
    with database.read() as tx:
        assert compare_metadata(MigrationContext.configure(tx), metadata) == []


def test_the_newest_migration_is_the_one_that_the_package_names():
    config = Config()
    config.set_main_option("script_location", migrations.__path__[0])
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]


def test_opening_again_keeps_the_rows_and_does_not_import_alembic(database, database_url, task_proto, now):
    with database.write() as tx:
        create_task(tx, task_proto(), now)
    database.close()
    program = textwrap.dedent("""
        import sys
        from fedcompute.storage.database import Database
        from fedcompute.storage.tasks import list_tasks
        with Database.open(sys.argv[1]).read() as tx:
            print(len(list_tasks(tx)), "alembic" in sys.modules)
    """)
    ran = subprocess.run([sys.executable, "-c", program, database_url], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "False"]


def test_processes_that_open_a_new_database_at_once_all_get_a_schema(empty_url):
    program = "import sys; from fedcompute.storage.database import Database; Database.open(sys.argv[1]).check()"
    running = [subprocess.Popen([sys.executable, "-c", program, empty_url]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]


def test_a_database_of_a_newer_release_is_refused(database, database_url):
    with database.write() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(OperationFailed, match="9999"):
        Database.open(database_url)


@pytest.mark.parametrize("url", ["", "mysql://h/d", "sqlite://", "no url", "sqlite:///:memory:"])
def test_a_url_of_no_supported_database_is_a_settings_error(url):
    with pytest.raises(OperationFailed) as caught:
        Database.open(url)
    assert caught.value.reason is Reason.SETTINGS_INVALID


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path):
    (tmp_path / "x.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(OperationFailed) as caught:
        Database.open(f"sqlite:///{tmp_path}/x.db")
    assert caught.value.reason is Reason.STORAGE_FAILED


def test_an_exception_rolls_the_whole_transaction_back(database, task_proto, now):
    def write():
        with database.write() as tx:
            create_task(tx, task_proto(), now)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    with database.read() as tx:
        assert list_tasks(tx) == []


def test_a_reader_neither_waits_for_a_writer_nor_sees_half_of_it(database, task_proto, now):
    with database.write() as tx:
        create_task(tx, task_proto(), now)
        seen = []

        def look():
            with database.read() as reader:
                seen.append(list_tasks(reader))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(10)
        assert seen == [[]]


def test_a_reader_sees_one_moment_however_long_it_looks(database, task_proto, now):
    with database.read() as reader:
        assert list_tasks(reader) == []

        def write():
            with database.write() as tx:
                create_task(tx, task_proto(), now)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert list_tasks(reader) == []
    with database.read() as reader:
        assert len(list_tasks(reader)) == 1


def test_what_stays_locked_is_a_typed_error(database, database_url, collecting, now):
    key, is_sqlite = collecting(), database_url.startswith("sqlite")
    wait = "SET LOCAL lock_timeout = 50"

    def write_in_vain():
        with database.read() if is_sqlite else database.write() as tx:
            tx.exec_driver_sql("PRAGMA busy_timeout = 50" if is_sqlite else wait)
            move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)

    with database.write() as tx:
        assert move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
        with pytest.raises(OperationFailed) as caught:
            write_in_vain()
    assert caught.value.reason is Reason.STORAGE_FAILED
    with database.read() as tx:
        assert get_iteration(tx, key).status is IterationStatus.AGGREGATING


def test_foreign_keys_hold(database):
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"), database.write() as tx:
        tx.execute(
            schema.task_status_history.insert().values(
                population_name="p", task_id=1, status_id=0, status=0, created_time=schema.datetime.now(schema.UTC)
            )
        )


def test_timestamps_without_a_time_zone_are_refused(database, task_proto, now):
    with pytest.raises(Exception, match="time zone"), database.write() as tx:
        create_task(tx, task_proto(), now.replace(tzinfo=None))


def test_a_process_killed_in_mid_transition_leaves_a_database_that_works(database, database_url, collecting, now):
    key = collecting()
    program = textwrap.dedent("""
        import os, signal, sys
        from datetime import UTC, datetime
        from fedcompute.storage.database import Database
        from fedcompute.storage.iterations import move_iteration
        from fedcompute.storage.keys import IterationKey
        from fedcompute.storage.schema import IterationStatus as S
        with Database.open(sys.argv[1]).write() as tx:
            assert move_iteration(tx, IterationKey("digits", 1, 1), S.COLLECTING, S.AGGREGATING, datetime.now(UTC))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", program, database_url]).returncode == -9
    with database.write() as tx:
        assert get_iteration(tx, key).status is IterationStatus.COLLECTING
        assert move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
    with database.read() as tx:
        history = tx.execute(schema.iteration_status_history.select()).all()
    assert [(row.status_id, row.status) for row in history] == [(1, 0), (2, 1)]
