import re
from datetime import timedelta

import pytest
from sqlalchemy import Engine, delete, event

from fedcompute.errors import Reason
from fedcompute.storage import schema
from fedcompute.storage.assignments import (
    cancel_unused,
    mark_uploaded,
    reject_contribution,
    report_completed,
    report_failed,
    time_out_computing,
)
from fedcompute.storage.batches import create_batch
from fedcompute.storage.iterations import move_iteration
from fedcompute.storage.keys import AssignmentKey, TaskKey
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.summaries import (
    assignments_per_minute,
    round_attempts,
    round_summaries,
    round_timeline,
    settle,
    summaries_after,
    task_totals,
    to_settle,
)

ASSIGNED, DONE, UPLOADED = (
    AssignmentStatus.ASSIGNED,
    AssignmentStatus.LOCAL_COMPLETED,
    AssignmentStatus.UPLOAD_COMPLETED,
)


@pytest.fixture
def lived(database, collecting, check_in, now):
    """A round of five devices: two counted, one rejected, one failed, one still computing; and its end."""
    key = collecting(max_aggregation_size=5)
    sessions = [check_in().assignment.key for _ in range(5)]
    steps = [timedelta(seconds=seconds) for seconds in (30, 50, 90)]
    with database.write() as tx:
        for one, step in zip(sessions, steps, strict=False):
            assert report_completed(tx, one, now + step)
            assert mark_uploaded(tx, key, [one.session_id], now + step + timedelta(seconds=10))
        assert report_failed(tx, sessions[3], AssignmentStatus.LOCAL_NOT_ELIGIBLE, now + timedelta(seconds=5))
        create_batch(tx, key, [one.session_id for one in sessions[:3]], now + timedelta(seconds=100))
        rejected = AssignmentKey(key, sessions[2].session_id)
        assert reject_contribution(tx, rejected, Reason.NOT_FINITE, now + timedelta(seconds=101))
        for old, new, after in (
            (IterationStatus.COLLECTING, IterationStatus.AGGREGATING, 100),
            (IterationStatus.AGGREGATING, IterationStatus.APPLYING, 103),
            (IterationStatus.APPLYING, IterationStatus.COMPLETED, 104),
        ):
            assert move_iteration(tx, key, old, new, now + timedelta(seconds=after))
        cancel_unused(tx, key, now + timedelta(seconds=104))
    return key


def end_of_the_last(database, now):
    with database.write() as tx:
        assert time_out_computing(tx, now + timedelta(hours=1), timedelta(minutes=15))


def test_a_round_tells_what_became_of_its_devices_before_and_after_it_is_summed_up(database, lived, now):
    with database.read() as tx:
        (live,) = round_summaries(tx, lived.task)
    assert live.assignments == {
        ASSIGNED: 1,
        UPLOADED: 2,
        AssignmentStatus.LOCAL_NOT_ELIGIBLE: 1,
        AssignmentStatus.REMOTE_FAILED: 1,
    }
    assert live.rejections == {"not_finite": 1}
    assert (live.collecting_seconds, live.aggregating_seconds, live.applying_seconds) == (100, 3, 1)
    assert (live.completion_seconds, live.released) == (104, now + timedelta(seconds=104))
    assert (live.training_seconds, live.upload_seconds) == (50, 10)
    assert live.assignment_seconds == pytest.approx((40 + 60 + 100) / 3)
    end_of_the_last(database, now)
    with database.read() as tx:
        (before,) = round_attempts(tx, lived.task, 1)
    with database.write() as tx:
        assert settle(tx, lived, now)
    with database.read() as tx:
        assert round_summaries(tx, lived.task) == summaries_after(tx, lived.task) == [before]
    assert before.assignments[AssignmentStatus.LOCAL_TIMEOUT] == 1


def test_what_was_summed_up_stays_when_the_single_assignments_go(database, lived, now):
    end_of_the_last(database, now)
    with database.write() as tx:
        settle(tx, lived, now)
    with database.read() as tx:
        before = (round_summaries(tx, lived.task), task_totals(tx, lived.task))
        minutes = assignments_per_minute(tx, [lived.task], now, now + timedelta(hours=2))
    with database.write() as tx:
        tx.execute(delete(schema.assignment))
    with database.read() as tx:
        assert (round_summaries(tx, lived.task), task_totals(tx, lived.task)) == before
        assert assignments_per_minute(tx, [lived.task], now, now + timedelta(hours=2)) == minutes


def test_only_a_round_that_is_over_and_has_nobody_at_work_is_summed_up_and_that_once(database, lived, collecting, now):
    running = collecting("letters")
    with database.write() as tx:
        assert to_settle(tx) == []
        assert not settle(tx, lived, now)
        assert not settle(tx, running, now)
    end_of_the_last(database, now)
    with database.write() as tx:
        assert to_settle(tx) == [lived]
        assert settle(tx, lived, now)
        assert not settle(tx, lived, now)
        assert to_settle(tx) == []


def test_two_engines_sum_a_round_up_once(database, lived, now, race):
    end_of_the_last(database, now)

    def one(opened, _):
        with opened.write() as tx:
            return settle(tx, lived, now)

    assert sorted(race(4, one)) == [False, False, False, True]
    with database.read() as tx:
        assert sum(task_totals(tx, lived.task).assignments.values()) == 5


def test_a_session_counts_in_the_minute_of_its_first_arrival_in_each_status(database, lived, now):
    minute = now.replace(second=0, microsecond=0)

    def expected(seconds):
        found = {}
        for offset in seconds:
            at = (now + timedelta(seconds=offset)).replace(second=0, microsecond=0)
            found[at] = found.get(at, 0) + 1
        return sorted(found.items())

    for settled in (False, True):
        if settled:
            end_of_the_last(database, now)
            with database.write() as tx:
                settle(tx, lived, now)
        with database.read() as tx:
            found = assignments_per_minute(tx, [lived.task], minute, now + timedelta(hours=2))
            assert found[ASSIGNED] == [(minute, 5)]
            assert found[DONE] == expected((30, 50, 90))
            # A batch id is another row of the same status.
            assert found[UPLOADED] == expected((40, 60, 100))
            assert found[AssignmentStatus.REMOTE_FAILED] == expected((101,))
            assert assignments_per_minute(tx, [TaskKey("other", 1)], minute, now + timedelta(hours=2)) == {}
            later = now + timedelta(hours=3)
            assert assignments_per_minute(tx, [lived.task], later, later) == {}


def test_a_timeline_has_every_status_in_order(database, lived, now):
    with database.read() as tx:
        found = round_timeline(tx, lived)
    assert [status.name for _, status in found] == ["COLLECTING", "AGGREGATING", "APPLYING", "COMPLETED"]
    assert found[-1][0] == now + timedelta(seconds=104)


def test_a_page_of_a_settled_task_reads_no_single_assignment(database, lived, now):
    end_of_the_last(database, now)
    with database.write() as tx:
        settle(tx, lived, now)
    said = []

    def note(connection, cursor, statement, *_):
        said.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with database.read() as tx:
            assert len(round_summaries(tx, lived.task)) == 1
            assert task_totals(tx, lived.task).assignments
            assert assignments_per_minute(tx, [lived.task], now, now + timedelta(hours=2))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert said
    assert not [one for one in said if re.search(r"FROM assignment(_status_history)?\b(?!_)", one)]
