"""Another attempt at a round keeps what its devices gave."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from fedcompute.errors import Reason
from fedcompute.storage import schema
from fedcompute.storage.assignments import (
    assignments_of_batch,
    count_assignments,
    find_assignment,
    hold_assignment,
    report_completed,
    report_failed,
    unbatched,
)
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.batches import finish_batch, get_batch, list_batches, sum_batches
from fedcompute.storage.iterations import (
    active_iterations,
    expired_iterations,
    get_iteration,
    newest_iteration,
    newest_release,
)
from fedcompute.storage.keys import BatchKey, IterationKey
from fedcompute.storage.schema import AssignmentStatus, BatchStatus, IterationStatus
from fedcompute.storage.tasks import pause_task, resume_task

COLLECTING = IterationStatus.COLLECTING


def again(tx, key, now, *, old=COLLECTING, ended=IterationStatus.CANCELED, into=COLLECTING, **options):
    return open_attempt(tx, key, old=old, ended=ended, into=into, reason=Reason.ROUND_EXPIRED, now=now, **options)


@pytest.fixture
def half_done(collecting, uploaded, published, check_in, database, now):
    """A round with a finished batch of two (one rejected), one upload, one device at work, one that failed."""
    key = collecting("p" * 64, max_aggregation_size=9)
    sessions = uploaded(key, 3)
    batch = published(key, sessions[:2])
    working, failed = check_in("p" * 64).assignment, check_in("p" * 64).assignment
    with database.write() as tx:
        assert finish_batch(tx, batch, 1, {sessions[1]: Reason.NOT_FINITE}, now)
        assert report_failed(tx, failed.key, AssignmentStatus.LOCAL_FAILED, now)
    return key, batch, sessions, working.key.session_id, failed.key.session_id


def test_an_attempt_takes_over_what_holds_a_place_and_leaves_what_failed(database, half_done, now):
    key, batch, sessions, working, failed = half_done
    with database.write() as tx:
        new = again(tx, key, now, expires=now + timedelta(hours=1))
        assert new == IterationKey(key.population, key.task_id, key.iteration_id, 1)
        old_row, new_row = get_iteration(tx, key), get_iteration(tx, new)
        assert (old_row.status, old_row.reason) == (IterationStatus.CANCELED, "round_expired")
        assert (new_row.status, new_row.reason, new_row.expires) == (COLLECTING, None, now + timedelta(hours=1))
        assert (new_row.result_id, new_row.base_on_result_id) == (old_row.result_id, old_row.base_on_result_id)
        assert newest_iteration(tx, key.task) == new_row
        assert active_iterations(tx, key.task) == [new_row]
        assert get_batch(tx, batch) is None
        assert sum_batches(tx, new).accepted == 1
        assert [one.key.session_id for one in unbatched(tx, new)] == [sessions[2]]
        found = {one: find_assignment(tx, key.task, key.iteration_id, one) for one in (*sessions, working, failed)}
    attempts = {one: row.key.iteration.attempt_id for one, row in found.items()}
    assert attempts == {sessions[0]: 1, sessions[1]: 0, sessions[2]: 1, working: 1, failed: 0}
    assert found[sessions[1]].rejection == "not_finite"


def test_histories_go_over_with_their_rows(database, half_done, now):
    key, _, sessions, *_ = half_done
    table = schema.assignment_status_history

    def histories(tx):
        query = table.select().order_by(table.c.session_id, table.c.status_id)
        return [{**row, "attempt_id": None} for row in tx.execute(query).mappings()]

    with database.write() as tx:
        before = histories(tx)
        again(tx, key, now)
        assert histories(tx) == before
        moved = table.select().where(table.c.session_id == sessions[0])
        assert {row.attempt_id for row in tx.execute(moved)} == {1}


def test_a_device_that_is_still_at_work_reports_to_the_new_attempt(database, half_done, now):
    key, _, _, working, _ = half_done
    with database.write() as tx:
        new = again(tx, key, now)
        row = find_assignment(tx, key.task, key.iteration_id, working)
        assert report_completed(tx, row.key, now)
        assert count_assignments(tx, new)[AssignmentStatus.LOCAL_COMPLETED] == 1


def test_members_of_a_dissolved_batch_wait_to_be_batched_again(database, half_done, now):
    key, batch, sessions, *_ = half_done
    with database.write() as tx:
        new = again(tx, key, now, ended=IterationStatus.AGGREGATING_FAILED, dissolve=[batch.batch_id])
        assert [one.key.session_id for one in unbatched(tx, new)] == [sessions[0], sessions[2]]
        assert get_batch(tx, batch).status is BatchStatus.FAILED
        assert assignments_of_batch(tx, BatchKey(new, batch.batch_id)) == []
        assert list_batches(tx, new) == []


def test_a_round_that_has_moved_on_is_left_alone(database, applying, now):
    key = applying()
    with database.write() as tx:
        assert again(tx, key, now) is None
        assert again(tx, IterationKey("nobody", 1, 1), now) is None
        assert get_iteration(tx, key).status is IterationStatus.APPLYING
        assert newest_iteration(tx, key.task).key == key


def test_a_repeated_update_keeps_its_place_in_the_round(database, applying, now):
    key = applying()
    applying_now = IterationStatus.APPLYING
    with database.write() as tx:
        new = again(tx, key, now, old=applying_now, ended=IterationStatus.APPLYING_FAILED, into=applying_now)
        row = get_iteration(tx, new)
        assert (row.status, row.aggregation_level) == (applying_now, 2)
        assert newest_release(tx, key.task) == 0


def test_rounds_of_paused_tasks_do_not_expire_and_live_as_much_longer(database, collecting, now):
    key = collecting()
    hour = timedelta(hours=1)
    with database.write() as tx:
        new = again(tx, key, now, expires=now + hour)
        assert expired_iterations(tx, now + hour / 2) == []
        assert [one.key for one in expired_iterations(tx, now + hour)] == [new]
        assert pause_task(tx, key.task, now + hour / 2)
        assert expired_iterations(tx, now + 3 * hour) == []
        assert resume_task(tx, key.task, now + 3 * hour)
        assert get_iteration(tx, new).expires == now + 3.5 * hour
        assert expired_iterations(tx, now + 3.4 * hour) == []
        assert [one.key for one in expired_iterations(tx, now + 3.5 * hour)] == [new]


def test_of_two_workers_that_try_a_round_again_one_succeeds(half_done, race, now):
    key = half_done[0]

    def work(opened, _):
        with opened.write() as tx:
            return again(tx, key, now)

    assert [answer is None for answer in race(2, work)].count(True) == 1


@pytest.mark.parametrize("report_is_first", [True, False])
def test_a_report_that_meets_a_new_attempt_is_not_lost(database, collecting, check_in, now, report_is_first):
    key = collecting()
    session = check_in().assignment.key.session_id

    def report(tx):
        row = hold_assignment(tx, key.task, key.iteration_id, session)
        return report_completed(tx, row.key, now)

    def another(tx):
        return again(tx, key, now) is not None

    first, second = (report, another) if report_is_first else (another, report)
    with ThreadPoolExecutor(1) as other:
        with database.write() as tx:
            assert first(tx)
            waiting = other.submit(lambda: _in_transaction(database, second))
            time.sleep(0.3)
            assert not waiting.done()
        assert waiting.result(30)
    with database.read() as tx:
        row = find_assignment(tx, key.task, key.iteration_id, session)
        history = schema.assignment_status_history
        steps = tx.execute(history.select().where(history.c.session_id == session).order_by(history.c.status_id)).all()
    assert (row.key.iteration.attempt_id, row.status) == (1, AssignmentStatus.LOCAL_COMPLETED)
    assert [(one.attempt_id, one.status_id, one.status) for one in steps] == [(1, 1, 0), (1, 2, 1)]


def _in_transaction(database, work):
    with database.write() as tx:
        return work(tx)
