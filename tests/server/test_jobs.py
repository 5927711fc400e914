from concurrent.futures import Future

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.rounds.jobs import AheadKey, Jobs
from fedcompute.server.rounds.leases import Leases
from fedcompute.storage.database import Database
from fedcompute.storage.keys import BatchKey, IterationKey

KEY = IterationKey("p", 1, 1)


class ByHand:
    """An executor whose jobs end when the test says so; timing is what these tests are about."""

    capacity = 2

    def __init__(self):
        self.futures = []

    def submit(self, job, argument):
        self.futures.append(Future())
        return self.futures[-1]

    def warm_up(self):
        pass

    def close(self):
        pass


@pytest.fixture
def executor():
    return ByHand()


@pytest.fixture
def jobs(executor):
    return Jobs(executor, attempts=3, on_done=lambda: None)


def poll(jobs, key=KEY):
    return jobs.poll(key, print, lambda: None)


def test_a_job_runs_once_until_its_outcome_is_recorded(jobs, executor):
    assert poll(jobs) is None
    assert poll(jobs) is None
    assert len(executor.futures) == 1
    executor.futures[0].set_result(7)
    assert poll(jobs).result == 7
    assert poll(jobs).result == 7
    jobs.forget(KEY)
    assert poll(jobs) is None
    assert len(executor.futures) == 2


def test_a_failing_job_runs_again_and_then_gives_its_typed_error(jobs, executor, monkeypatch):
    moment = 0.0
    monkeypatch.setattr("fedcompute.server.rounds.jobs.time.monotonic", lambda: moment)
    error = OperationFailed(Reason.PLAN_MALFORMED, "no plan")
    for attempt in range(3):
        assert poll(jobs) is None
        assert len(executor.futures) == attempt + 1
        executor.futures[-1].set_exception(error)
        outcome = poll(jobs)
        moment += 10
    assert outcome.error is error
    assert poll(jobs).error is error


def test_jobs_of_rounds_that_are_over_are_forgotten(jobs, executor):
    batch = BatchKey(KEY, "b")
    poll(jobs)
    poll(jobs, batch)
    jobs.retain({KEY})
    poll(jobs)
    poll(jobs, batch)
    assert len(executor.futures) == 2
    jobs.retain(set())
    poll(jobs)
    poll(jobs, batch)
    assert len(executor.futures) == 4


def test_storage_that_fails_is_waited_for_however_often_a_job_may_fail(jobs, executor, monkeypatch, caplog):
    moment = 0.0
    monkeypatch.setattr("fedcompute.server.rounds.jobs.time.monotonic", lambda: moment)
    for _ in range(100):
        assert poll(jobs) is None
        executor.futures[-1].set_exception(OperationFailed(Reason.STORAGE_FAILED, "the disk is full"))
        assert poll(jobs) is None
        moment += 10
    assert poll(jobs) is None
    executor.futures[-1].set_result(7)
    assert poll(jobs).result == 7
    assert len(caplog.records) == 7


def test_a_look_ahead_outlives_passes_in_which_its_round_is_not_open_yet(jobs, executor):
    ahead = AheadKey(KEY)
    for waiting in ({KEY.task}, {KEY.task}, set()):
        assert jobs.poll(ahead, len, lambda: ()) is None
        jobs.retain(set(), waiting)
    assert len(executor.futures) == 1
    assert jobs.poll(ahead, len, lambda: ()) is None
    assert len(executor.futures) == 2
    jobs.retain({KEY}, set())
    assert jobs.poll(ahead, len, lambda: ()) is None
    assert len(executor.futures) == 2


def test_jobs_that_wait_for_storage_keep_no_others_back_and_other_engines_may_try_them(tmp_path, monkeypatch):
    moment = 100.0
    monkeypatch.setattr("fedcompute.server.rounds.jobs.time.monotonic", lambda: moment)
    monkeypatch.setattr("fedcompute.server.rounds.leases.time.monotonic", lambda: moment)
    database = Database.open(f"sqlite:///{tmp_path}/leases.db")
    executors = [ByHand(), ByHand()]
    here, there = (Jobs(one, 3, lambda: None, Leases(database, 10.0)) for one in executors)
    cut_off = [BatchKey(KEY, name) for name in ("a", "b")]
    for key in cut_off:
        poll(here, key)
        assert poll(there, key) is None
    poll(here)
    # It had as many as it may have, and the other engine none: what is leased is not its own.
    assert (len(executors[0].futures), len(executors[1].futures)) == (2, 0)
    for future, key in zip(executors[0].futures[:2], cut_off, strict=True):
        future.set_exception(OperationFailed(Reason.STORAGE_FAILED, "no way to the store"))
        assert poll(here, key) is None
    poll(here)
    assert len(executors[0].futures) == 3
    moment += 2
    for key in cut_off:
        poll(there, key)
    assert len(executors[1].futures) == 2
    for key in cut_off:
        poll(here, key)
    assert len(executors[0].futures) == 3
    database.close()
