"""How often a known device may take part in a task: rounds that lie far enough apart."""

from dataclasses import replace

import pytest

from fedcompute.errors import Reason
from fedcompute.storage.assignments import cancel_late, find_assignment, rebind_session, report_failed
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.check_ins import Assigned, CheckIn, Declined, DeclineKind, assign, assign_all
from fedcompute.storage.iterations import create_iteration, get_iteration, move_iteration, next_iteration
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.tasks import get_task

FULL = Declined(DeclineKind.ITERATION_FULL)


@pytest.fixture
def visit(check_in, collecting):
    """One check-in of a participant to the task of `collecting`, with a distance between its rounds."""
    key = collecting(max_aggregation_size=50)

    def run(participant="one", separation=1, known=True):
        return check_in(participant=participant, separations={key.task: separation} if known else {})

    run.key = key
    return run


@pytest.fixture
def later_round(database, visit, now):
    """Replaces the round that collects by the one `steps` after it."""

    def go(steps=1):
        key = visit.key
        for _ in range(steps):
            with database.write() as tx:
                done = get_iteration(tx, key)
                move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
                move_iteration(tx, key, IterationStatus.AGGREGATING, IterationStatus.APPLYING, now)
                move_iteration(tx, key, IterationStatus.APPLYING, IterationStatus.COMPLETED, now)
                new = next_iteration(get_task(tx, key.task), done)
                key = new.key
                assert create_iteration(tx, new, now)
        visit.key = key
        return key

    return go


def test_a_participant_takes_part_once_in_a_round_and_nobody_else_is_kept_out(visit):
    assert isinstance(visit("one"), Assigned)
    assert visit("one") == FULL
    assert isinstance(visit("two"), Assigned)
    assert visit("two") == FULL


def test_a_device_that_nobody_knows_and_a_task_without_distance_have_no_limit(visit):
    for _ in range(3):
        assert isinstance(visit(None, known=False), Assigned)
        assert isinstance(visit("one", separation=0), Assigned)


def test_a_participant_gets_nothing_of_a_task_whose_distance_is_not_known(visit):
    assert visit(known=False) == FULL


@pytest.mark.parametrize("separation", [1, 2, 3])
def test_rounds_of_one_participant_lie_as_far_apart_as_they_must(visit, later_round, separation):
    assert isinstance(visit(separation=separation), Assigned)
    for _ in range(separation - 1):
        later_round()
        assert visit(separation=separation) == FULL
    later_round()
    assert isinstance(visit(separation=separation), Assigned)


@pytest.mark.parametrize(
    "status",
    [
        AssignmentStatus.LOCAL_FAILED,
        AssignmentStatus.LOCAL_NOT_ELIGIBLE,
        AssignmentStatus.LOCAL_FAILED_EXAMPLE_GENERATION,
        AssignmentStatus.LOCAL_FAILED_MODEL_COMPUTATION,
        AssignmentStatus.LOCAL_FAILED_OPS_ERROR,
    ],
)
def test_a_participant_that_contributed_nothing_may_come_again(visit, database, now, status):
    first = visit()
    with database.write() as tx:
        assert report_failed(tx, first.assignment.key, status, now)
    assert isinstance(visit(), Assigned)


def test_a_cancelled_participation_counts_as_one(visit, database, now):
    with_place = visit()
    with database.write() as tx:
        assert cancel_late(tx, with_place.assignment.key, now)
    assert visit() == FULL


def test_a_second_attempt_of_a_round_is_the_same_round(visit, database, now):
    first = visit().assignment
    with database.write() as tx:
        assert open_attempt(
            tx,
            visit.key,
            old=IterationStatus.COLLECTING,
            ended=IterationStatus.AGGREGATING_FAILED,
            into=IterationStatus.COLLECTING,
            reason=Reason.ROUND_EXPIRED,
            now=now,
        )
    assert visit() == FULL
    with database.read() as tx:
        moved = find_assignment(tx, visit.key.task, visit.key.iteration_id, first.key.session_id)
    assert (moved.key.iteration.attempt_id, moved.participant) == (1, "one")
    assert isinstance(visit("two"), Assigned)


def test_of_check_ins_that_are_decided_together_a_participant_gets_one(visit, database, now):
    one = CheckIn("digits", 1, participant="one", separations={visit.key.task: 1})
    with database.write() as tx:
        answers = assign_all(tx, [one, replace(one, participant="two"), one, one], now, choose=lambda n: 0)
    assert [isinstance(answer, Assigned) for answer in answers] == [True, True, False, False]


def test_of_check_ins_at_once_a_participant_gets_one(visit, race, now):
    one = CheckIn("digits", 1, participant="one", separations={visit.key.task: 1})

    def run(opened, _):
        with opened.write() as tx:
            return assign(tx, one, now, choose=lambda n: 0)

    answers = race(6, run)
    assert sum(isinstance(answer, Assigned) for answer in answers) == 1


def test_a_session_keeps_the_token_that_it_was_assigned_with_until_it_is_bound_to_another(
    check_in, collecting, database
):
    collecting()
    row = check_in(token_hash="a" * 64).assignment
    with database.write() as tx:
        assert rebind_session(tx, row, "b" * 64)
        # Whoever still knows it by its first token has lost the race.
        assert not rebind_session(tx, row, "c" * 64)
