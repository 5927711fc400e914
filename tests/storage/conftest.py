"""One database per test, each test once per kind of database."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from fedcompute.protos import task_pb2
from fedcompute.storage.assignments import mark_uploaded, report_completed
from fedcompute.storage.batches import create_batch, publish_batch
from fedcompute.storage.check_ins import CheckIn, assign
from fedcompute.storage.database import Database
from fedcompute.storage.iterations import create_iteration, move_iteration, next_iteration
from fedcompute.storage.schema import IterationStatus
from fedcompute.storage.tasks import create_task, get_task, open_task


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    """A file with the present schema; a copy takes a tenth of the time of the migrations."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    Database.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """A database with the present schema and no rows."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql_url")
    shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "fedcompute.db")
    return f"sqlite:///{tmp_path}/fedcompute.db"


@pytest.fixture
def empty_url(request, database_url, tmp_path):
    """A database of the same kind that nothing was ever made in."""
    if database_url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path}/new/empty.db"
        return
    server = request.getfixturevalue("postgresql")
    name = server.create()
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def database(database_url):
    opened = Database.open(database_url)
    yield opened
    opened.close()


@pytest.fixture
def race(database_url):
    """Runs `work(database, index)` in threads that start together; returns their answers by index.

    Every thread has a database of its own, as processes have, so that only the database keeps them apart.
    """

    def run(count, work):
        databases = [Database.open(database_url) for _ in range(count)]
        start = threading.Barrier(count)

        def one(index):
            start.wait()
            return work(databases[index], index)

        try:
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(one, range(count)))
        finally:
            for opened in databases:
                opened.close()

    return run


@pytest.fixture
def now():
    return datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture
def task_proto():
    def make(population="digits", *, evaluates=None, weight=1, **fields):
        task = task_pb2.Task(
            population_name=population,
            total_iteration=3,
            min_aggregation_size=2,
            max_aggregation_size=5,
            min_client_version="0",
            max_client_version="999999999",
        )
        task.info.traffic_weight = weight
        if evaluates is None:
            task.info.training_info.SetInParent()
        else:
            task.info.evaluation_info.training_task_id = evaluates
            task.info.evaluation_info.check_point_selector.iteration_selector.size = 1
        for name, value in fields.items():
            setattr(task, name, value)
        return task

    return make


@pytest.fixture
def collecting(database, task_proto, now):
    """Creates and opens a task and its first iteration; returns the iteration's key."""

    def make(population="digits", *, evaluates=None, weight=1, **fields):
        with database.write() as tx:
            key = create_task(tx, task_proto(population, evaluates=evaluates, weight=weight, **fields), now).key
            assert open_task(tx, key, now)
            new = next_iteration(get_task(tx, key), None, training_iteration_id=evaluates and 1)
            assert create_iteration(tx, new, now)
        return new.key

    return make


@pytest.fixture
def check_in(database, now):
    def make(population="digits", *, version=1, at=now, key=None, choose=lambda n: 0, on=database, **who):
        with on.write() as tx:
            return assign(tx, CheckIn(population, version, key, **who), at, choose=choose)

    return make


@pytest.fixture
def uploaded(database, check_in, now):
    """Takes `count` devices as far as UPLOAD_COMPLETED, one microsecond apart; returns their sessions in order."""

    def make(iteration, count):
        sessions = []
        for index in range(count):
            at = now + timedelta(microseconds=index)
            assignment = check_in(iteration.population, at=at).assignment
            with database.write() as tx:
                assert report_completed(tx, assignment.key, at)
                assert mark_uploaded(tx, iteration, [assignment.key.session_id], at)
            sessions.append(assignment.key.session_id)
        return sessions

    return make


@pytest.fixture
def published(database, now):
    """Puts sessions into a batch that a job has."""

    def make(iteration, sessions):
        with database.write() as tx:
            batch = create_batch(tx, iteration, sessions, now)
            assert publish_batch(tx, batch.key, now)
        return batch.key

    return make


@pytest.fixture
def applying(database, collecting, now):
    """An iteration whose update is being computed."""

    def make(**fields):
        key = collecting(**fields)
        with database.write() as tx:
            for old, new in (
                (IterationStatus.COLLECTING, IterationStatus.AGGREGATING),
                (IterationStatus.AGGREGATING, IterationStatus.APPLYING),
            ):
                assert move_iteration(tx, key, old, new, now)
        return key

    return make
