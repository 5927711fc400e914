import random
from collections import Counter
from datetime import timedelta

import pytest

from fedcompute.errors import Reason
from fedcompute.storage import schema
from fedcompute.storage.assignments import (
    DEVICE_FAILURES,
    cancel_late,
    cancel_unused,
    count_assignments,
    find_assignment,
    get_assignment,
    list_assignments,
    mark_uploaded,
    reject_contribution,
    report_completed,
    report_failed,
    time_out_computing,
    time_out_uploading,
    unbatched,
    uploading_among,
)
from fedcompute.storage.batches import create_batch
from fedcompute.storage.check_ins import Assigned, Declined, DeclineKind, forget_idempotency
from fedcompute.storage.iterations import move_iteration
from fedcompute.storage.keys import AssignmentKey, IterationKey, TaskKey
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.summaries import task_totals
from fedcompute.storage.tasks import pause_task, resume_task

MINUTES_15 = timedelta(minutes=15)


def test_a_check_in_gets_a_place_in_the_collecting_iteration(database, collecting, check_in, now):
    key = collecting()
    answer = check_in()
    assert isinstance(answer, Assigned)
    assert (answer.iteration.key, answer.task.key, answer.repeated) == (key, key.task, False)
    with database.read() as tx:
        assert get_assignment(tx, answer.assignment.key) == answer.assignment
        found = find_assignment(tx, key.task, 1, answer.assignment.key.session_id)
        assert found == answer.assignment
        assert find_assignment(tx, TaskKey("digits", 2), 1, answer.assignment.key.session_id) is None
        assert find_assignment(tx, key.task, 2, answer.assignment.key.session_id) is None


def test_concurrent_check_ins_never_overshoot_the_capacity(database, collecting, check_in, race):
    key = collecting()
    answers = race(20, lambda opened, _: check_in(on=opened))
    assert Counter(type(answer) for answer in answers) == {Assigned: 5, Declined: 15}
    assert {answer.kind for answer in answers if isinstance(answer, Declined)} == {DeclineKind.ITERATION_FULL}
    with database.read() as tx:
        assert count_assignments(tx, key)[AssignmentStatus.ASSIGNED] == 5
        assert len(tx.execute(schema.assignment_status_history.select()).all()) == 5


def test_a_failure_frees_a_place_and_a_finished_device_keeps_its_own(database, collecting, check_in, now):
    collecting(max_aggregation_size=2)
    first, second = check_in(), check_in()
    with database.write() as tx:
        assert report_completed(tx, first.assignment.key, now)
    assert check_in() == Declined(DeclineKind.ITERATION_FULL)
    with database.write() as tx:
        assert report_failed(tx, second.assignment.key, AssignmentStatus.LOCAL_NOT_ELIGIBLE, now)
    assert isinstance(check_in(), Assigned)


def test_the_most_hopeful_reason_is_given(database, collecting, check_in, now):
    assert check_in() == Declined(DeclineKind.NOT_ACTIVE)
    training = collecting(min_client_version="10", max_client_version="20", max_aggregation_size=2)
    for version in (9, 21, -1):
        assert check_in(version=version) == Declined(DeclineKind.VERSION_MISMATCH)
    evaluation = collecting(evaluates=1, max_client_version="5", max_aggregation_size=2)
    with database.write() as tx:
        assert move_iteration(tx, evaluation, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
    assert check_in(version=9) == Declined(DeclineKind.NOT_OPEN)
    assert isinstance(check_in(version=10), Assigned)
    assert isinstance(check_in(version=20), Assigned)
    assert check_in(version=15) == Declined(DeclineKind.ITERATION_FULL)
    with database.write() as tx:
        for key, old in ((training, IterationStatus.COLLECTING), (evaluation, IterationStatus.AGGREGATING)):
            assert move_iteration(tx, key, old, IterationStatus.AGGREGATING_FAILED, now)
    assert check_in(version=15) == Declined(DeclineKind.NOT_OPEN)


def test_a_repeated_check_in_gets_the_same_assignment_for_five_minutes(collecting, check_in, now):
    collecting("digits")
    collecting("letters")
    first = check_in(key="owner/1")
    again = check_in(key="owner/1", at=now + timedelta(minutes=4, seconds=59))
    assert again.repeated
    assert (again.assignment, again.iteration, again.task) == (first.assignment, first.iteration, first.task)
    others = [
        check_in(key="owner/2"),
        check_in(key=None),
        check_in("letters", key="owner/1"),
        check_in(key="owner/1", at=now + timedelta(minutes=5)),
    ]
    assert not any(other.repeated for other in others)
    assert len({other.assignment.key for other in [first, *others]}) == 5


def test_a_repeated_check_in_is_answered_even_when_the_iteration_is_full(collecting, check_in):
    collecting(max_aggregation_size=2)
    first = check_in(key="a")
    check_in(key="b")
    assert check_in(key="a").assignment == first.assignment
    assert isinstance(check_in(key="c"), Declined)


def test_a_repetition_after_the_assignment_ended_is_a_new_check_in(database, collecting, check_in, now):
    key = collecting()
    first = check_in(key="a")
    with database.write() as tx:
        report_failed(tx, first.assignment.key, AssignmentStatus.LOCAL_FAILED, now)
    second = check_in(key="a")
    assert not second.repeated
    assert check_in(key="a").assignment == second.assignment
    with database.write() as tx:
        move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
    assert check_in(key="a") == Declined(DeclineKind.NOT_OPEN)


def test_concurrent_repetitions_of_a_check_in_make_one_assignment(database, collecting, check_in, race):
    key = collecting()
    answers = race(6, lambda opened, _: check_in(key="same", on=opened))
    assert sorted(answer.repeated for answer in answers) == [False] + [True] * 5
    with database.read() as tx:
        (row,) = list_assignments(tx, key)
    assert {answer.assignment for answer in answers} == {row}


def test_idempotency_keys_are_stored_hashed_and_forgotten(database, collecting, check_in, now):
    collecting()
    check_in(key="secret-owner")
    with database.write() as tx:
        assert "secret-owner" not in str(tx.execute(schema.idempotency.select()).all())
        assert forget_idempotency(tx, now + timedelta(minutes=4)) == 0
        assert forget_idempotency(tx, now + timedelta(minutes=5)) == 1


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((100, 300), (0.25, 0.75)), ((0, 7), (0.0, 1.0)), ((7, 0), (1.0, 0.0)), ((0, 0), (0.5, 0.5))],
)
def test_the_choice_follows_the_traffic_weights(collecting, check_in, weights, shares):
    collecting(weight=weights[0], max_aggregation_size=1000)
    collecting(weight=weights[1], max_aggregation_size=1000, evaluates=1)
    drawn = random.Random(5)
    chosen = Counter(check_in(choose=drawn.randrange).task.key.task_id for _ in range(200))
    for task_id, share in zip((1, 2), shares, strict=True):
        assert chosen[task_id] / 200 == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)


def test_a_single_candidate_of_weight_zero_is_chosen_without_drawing(collecting, check_in):
    collecting(weight=0)

    def refuse(n):
        raise AssertionError

    assert isinstance(check_in(choose=refuse), Assigned)


def test_a_completed_report_may_come_again_but_not_after_the_end(database, collecting, check_in, now):
    key = collecting()
    assignment = check_in().assignment.key
    with database.write() as tx:
        assert report_completed(tx, assignment, now)
        assert report_completed(tx, assignment, now)
        assert mark_uploaded(tx, key, [assignment.session_id], now)
        assert not report_completed(tx, assignment, now)
        assert not report_completed(tx, AssignmentKey(key, "unknown"), now)


@pytest.mark.parametrize("status", DEVICE_FAILURES)
def test_a_failure_report_counts_once(database, collecting, check_in, now, status):
    collecting()
    assignment = check_in().assignment.key
    with database.write() as tx:
        assert report_failed(tx, assignment, status, now)
        assert not report_failed(tx, assignment, status, now)
        assert get_assignment(tx, assignment).status is status
        with pytest.raises(ValueError):
            report_failed(tx, assignment, AssignmentStatus.LOCAL_TIMEOUT, now)


def test_marking_uploads_moves_those_that_can_and_skips_the_rest(database, collecting, check_in, now):
    key = collecting()
    ready, early = check_in().assignment.key, check_in().assignment.key
    with database.write() as tx:
        report_completed(tx, ready, now)
        sessions = [ready.session_id, early.session_id, "unknown"]
        assert mark_uploaded(tx, key, sessions, now) == [ready.session_id]
        assert mark_uploaded(tx, key, sessions, now) == []
        assert mark_uploaded(tx, key, [], now) == []


def test_lists_are_in_assignment_order(database, collecting, uploaded):
    key = collecting()
    sessions = uploaded(key, 4)
    with database.read() as tx:
        assert [row.key.session_id for row in unbatched(tx, key)] == sessions
        assert [row.key.session_id for row in list_assignments(tx, key, limit=2)] == sessions[:2]
        assert list_assignments(tx, key, statuses=[AssignmentStatus.ASSIGNED]) == []


def test_an_upload_outside_a_batch_cannot_be_rejected(database, collecting, uploaded, now):
    key = collecting()
    [session] = uploaded(key, 1)
    with database.write() as tx:
        assert not reject_contribution(tx, AssignmentKey(key, session), Reason.NOT_FINITE, now)


def test_time_outs_come_after_the_age_and_not_at_it(database, collecting, check_in, now):
    key = collecting()
    computing, uploading = check_in().assignment.key, check_in().assignment.key
    with database.write() as tx:
        report_completed(tx, uploading, now + timedelta(minutes=1))
        exactly = now + MINUTES_15
        assert time_out_computing(tx, exactly, MINUTES_15) == []
        assert time_out_computing(tx, exactly + timedelta(microseconds=1), MINUTES_15) == [computing]
        assert time_out_uploading(tx, exactly + timedelta(minutes=1), MINUTES_15) == []
        late = exactly + timedelta(minutes=1, microseconds=1)
        assert time_out_uploading(tx, late, MINUTES_15, keep=[uploading.session_id]) == []
        assert time_out_uploading(tx, late, MINUTES_15, iteration=IterationKey("digits", 1, 9)) == []
        assert time_out_uploading(tx, late, MINUTES_15, iteration=key) == [uploading]
        counts = count_assignments(tx, key)
    assert counts[AssignmentStatus.LOCAL_TIMEOUT] == counts[AssignmentStatus.UPLOAD_TIMEOUT] == 1
    assert sum(counts.values()) == 2


def test_time_outs_reach_closed_iterations_oldest_first(database, collecting, check_in, now):
    key = collecting()
    keys = [check_in(at=now + timedelta(seconds=index)).assignment.key for index in range(3)]
    late = now + timedelta(hours=1)
    with database.write() as tx:
        move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
        assert time_out_computing(tx, late, MINUTES_15, limit=2) == sorted(keys[:2])
        assert time_out_computing(tx, late, MINUTES_15) == keys[2:]


def test_a_report_and_a_time_out_race_and_one_of_them_counts(database, collecting, check_in, race, now):
    key = collecting(max_aggregation_size=40)
    keys = [check_in().assignment.key for _ in range(20)]
    late = now + timedelta(hours=1)

    def work(opened, index):
        won = []
        for assignment in keys:
            with opened.write() as tx:
                if index == 0:
                    won += [assignment] if report_completed(tx, assignment, late) else []
                else:
                    won += time_out_computing(tx, late, MINUTES_15, limit=1)
        return won

    reported, timed_out = race(2, work)
    assert sorted(reported + timed_out) == sorted(keys)
    with database.read() as tx:
        history = tx.execute(schema.assignment_status_history.select()).all()
        rows = list_assignments(tx, key)
    assert len(history) == 40
    last = {row.session_id: row.status for row in sorted(history, key=lambda row: row.status_id)}
    assert last == {row.key.session_id: row.status for row in rows}


def test_the_capacity_count_reads_an_index(database, database_url):
    query = (
        "SELECT count(*) FROM assignment WHERE population_name = 'p' AND task_id = 1"
        " AND iteration_id = 1 AND attempt_id = 0 AND status <= 99"
    )
    with database.read() as tx:
        if database_url.startswith("sqlite"):
            plan = " ".join(row.detail for row in tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}"))
            assert "COVERING INDEX ix_assignment_iteration_status" in plan
        else:
            # Reading everything is the cheapest way to read nothing.
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
            plan = " ".join(row[0] for row in tx.exec_driver_sql(f"EXPLAIN {query}"))
            assert "using ix_assignment_iteration_status" in plan or "on ix_assignment_iteration_status" in plan
            assert "Filter" not in plan


def test_a_paused_task_gives_no_place_away_and_keeps_those_it_gave(database, collecting, check_in, now):
    key = collecting()
    first = check_in(key="device/1")
    with database.write() as tx:
        assert pause_task(tx, key.task, now)
    assert check_in() == Declined(DeclineKind.NOT_OPEN)
    assert check_in(key="device/2") == Declined(DeclineKind.NOT_OPEN)
    assert check_in(key="device/1").assignment == first.assignment
    assert check_in("others") == Declined(DeclineKind.NOT_ACTIVE)
    with database.write() as tx:
        assert report_completed(tx, first.assignment.key, now)
        assert move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.COMPLETED, now)
    # Between two rounds a task has nothing yet.
    assert check_in() == Declined(DeclineKind.NOT_OPEN)
    with database.write() as tx:
        assert resume_task(tx, key.task, now)
    assert check_in() == Declined(DeclineKind.NOT_OPEN)


def test_a_paused_task_leaves_devices_to_the_other_task(collecting, check_in, database, now):
    training, evaluation = collecting(), collecting(evaluates=1, weight=0)
    with database.write() as tx:
        assert pause_task(tx, training.task, now)
    assert check_in().iteration.key == evaluation


def test_a_late_device_is_canceled_once_and_only_while_it_is_open(database, collecting, check_in, uploaded, now):
    key = collecting()
    (collected,) = uploaded(key, 1)
    late = check_in().assignment
    with database.write() as tx:
        assert cancel_late(tx, late.key, now)
        assert not cancel_late(tx, late.key, now)
        assert not cancel_late(tx, AssignmentKey(key, collected), now)
        assert not report_completed(tx, late.key, now)


def test_a_completed_round_cancels_uploads_that_it_did_not_use(database, collecting, check_in, uploaded, now):
    key = collecting()
    used, _spare = uploaded(key, 2)
    reported, _computing = check_in().assignment, check_in().assignment
    with database.write() as tx:
        assert create_batch(tx, key, [used], now)
        assert report_completed(tx, reported.key, now)
        assert cancel_unused(tx, key, now) == 2
        assert task_totals(tx, key.task).assignments == {
            AssignmentStatus.ASSIGNED: 1,
            AssignmentStatus.UPLOAD_COMPLETED: 1,
            AssignmentStatus.CANCELED: 2,
        }


def test_of_many_sessions_those_are_found_that_the_round_waits_for(database, collecting, check_in, now):
    # Lesson D4: what a pass of the collector costs depends on what arrived, not on how many devices take part.
    key, other = collecting(max_aggregation_size=5), collecting("letters")
    waiting, computing = check_in(), check_in()
    elsewhere = check_in("letters")
    with database.write() as tx:
        for one in (waiting, elsewhere):
            assert report_completed(tx, one.assignment.key, now)
    asked = {one.assignment.key.session_id for one in (waiting, computing, elsewhere)} | {"unknown"}
    with database.read() as tx:
        assert uploading_among(tx, key, asked) == [waiting.assignment.key.session_id]
        assert uploading_among(tx, other, asked) == [elsewhere.assignment.key.session_id]
        assert uploading_among(tx, key, []) == []
