from datetime import timedelta

import pytest

from fedcompute.errors import Reason
from fedcompute.storage.activity import Activity, activity, leading_tasks, rounds_opened
from fedcompute.storage.assignments import report_completed
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.iterations import create_iteration, get_iteration, move_iteration, next_iteration
from fedcompute.storage.schema import IterationStatus, TaskStatus
from fedcompute.storage.tasks import cancel_task, create_task, get_task, newest_tasks, open_task


@pytest.fixture
def complete(database, now):
    """Ends a round well, an hour after it began."""

    def completed(key):
        with database.write() as tx:
            for old, new in (
                (IterationStatus.COLLECTING, IterationStatus.AGGREGATING),
                (IterationStatus.AGGREGATING, IterationStatus.APPLYING),
                (IterationStatus.APPLYING, IterationStatus.COMPLETED),
            ):
                assert move_iteration(tx, key, old, new, now + timedelta(hours=1))

    return completed


@pytest.fixture
def history(database, task_proto, now):
    """Task 1 trains; tasks 2 to 5 were canceled after it began."""
    with database.write() as tx:
        assert open_task(tx, create_task(tx, task_proto("long"), now).key, now)
        for _ in range(4):
            assert cancel_task(tx, create_task(tx, task_proto("long", evaluates=1), now).key, now)


def test_nothing_goes_on_in_an_empty_database(database, now):
    with database.read() as tx:
        assert activity(tx, now) == Activity(populations=0, active_tasks=0, released=0, working=0)


def test_what_goes_on_is_counted_over_all_populations(database, collecting, check_in, complete, now):
    first, second = collecting("first", max_aggregation_size=5), collecting("second", max_aggregation_size=5)
    sessions = [check_in("first").assignment.key for _ in range(3)]
    check_in("second")
    with database.write() as tx:
        assert report_completed(tx, sessions[0], now)
    complete(second)
    with database.read() as tx:
        assert activity(tx, now) == Activity(populations=2, active_tasks=2, released=1, working=4)
        # A round counts as long as it was released within the time that is asked for.
        assert activity(tx, now + timedelta(hours=1)).released == 1
        assert activity(tx, now + timedelta(hours=2)).released == 0
    with database.write() as tx:
        assert cancel_task(tx, first.task, now)
    with database.read() as tx:
        assert activity(tx, now).active_tasks == 1


def test_active_tasks_lead_and_then_the_newest(database, history):
    with database.read() as tx:
        assert [row.key.task_id for row in leading_tasks(tx, "long", limit=3)] == [1, 5, 4]
        assert [row.key.task_id for row in leading_tasks(tx, "long", limit=1)] == [1]
        assert leading_tasks(tx, "other", limit=4) == []


def test_tasks_of_one_status_fill_a_page(database, history):
    with database.read() as tx:
        canceled = newest_tasks(tx, "long", status=TaskStatus.CANCELED, limit=3)
        assert [row.key.task_id for row in canceled] == [5, 4, 3]
        older = newest_tasks(tx, "long", status=TaskStatus.CANCELED, before=3, limit=3)
        assert [row.key.task_id for row in older] == [2]
        assert [row.key.task_id for row in newest_tasks(tx, "long", status=TaskStatus.OPEN, limit=3)] == [1]


def test_a_round_is_told_once_by_its_first_opening(database, collecting, complete, now):
    first = collecting(total_iteration=5)
    collected, failed = IterationStatus.AGGREGATING, IterationStatus.AGGREGATING_FAILED
    with database.write() as tx:
        assert move_iteration(tx, first, IterationStatus.COLLECTING, collected, now + timedelta(minutes=1))
        again = open_attempt(
            tx,
            first,
            old=collected,
            ended=failed,
            into=IterationStatus.COLLECTING,
            reason=Reason.INTERNAL,
            now=now + timedelta(minutes=2),
        )
    assert again is not None
    complete(again)
    with database.write() as tx:
        assert create_iteration(
            tx, next_iteration(get_task(tx, first.task), get_iteration(tx, again)), now + timedelta(hours=1)
        )
    with database.read() as tx:
        second = (2, now + timedelta(hours=1))
        assert rounds_opened(tx, first.task, now, limit=10) == [(1, now), second]
        assert rounds_opened(tx, first.task, now, limit=1) == [second]
        assert rounds_opened(tx, first.task, now + timedelta(minutes=1), limit=10) == [second]
