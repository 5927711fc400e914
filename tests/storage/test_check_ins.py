"""Many check-ins in one transaction; a single one's rules are in test_assignments."""

import random
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from fedcompute.storage.assignments import count_assignments, list_assignments, report_failed
from fedcompute.storage.check_ins import Assigned, CheckIn, Declined, DeclineKind, assign, assign_all, standing_answers
from fedcompute.storage.schema import AssignmentStatus


@contextmanager
def statements(tx):
    """The statements that a transaction sends while this lasts."""
    seen = []

    def note(connection, cursor, statement, parameters, context, executemany):
        if connection is tx:
            seen.append(statement)

    event.listen(tx.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(tx.engine, "before_cursor_execute", note)


@pytest.fixture
def together(database, now):
    def make(*check_ins, choose=lambda n: 0, at=now):
        with database.write() as tx:
            return assign_all(tx, check_ins, at, choose=choose)

    return make


def outline(answers):
    """Answers without what is drawn: each assignment by the order in which it was made."""
    order = {}
    return [
        answer
        if isinstance(answer, Declined)
        else (answer.iteration.key, order.setdefault(answer.assignment.key.session_id, len(order)), answer.repeated)
        for answer in answers
    ]


def test_check_ins_that_come_together_are_answered_as_if_one_came_after_the_other(database, collecting, now):
    random_ = random.Random(5)
    answers = {}
    for way in ("together", "in-turn"):
        training = collecting(way, max_aggregation_size=7, max_client_version="20")
        evaluation = collecting(way, max_aggregation_size=4, min_client_version="10", evaluates=1, weight=3)
        separations = {training.task: 1, evaluation.task: 0}
        random_.seed(5)
        check_ins = [
            CheckIn(
                way,
                random_.choice([5, 15, 25]),
                random_.choice([None, "a", "b", "c", *map(str, range(20))]),
                f"run {index}",
                participant=random_.choice([None, None, "p", "q"]),
                separations=separations,
            )
            for index in range(40)
        ]
        with database.write() as tx:
            draw = random.Random(7).randrange
            if way == "together":
                found = assign_all(tx, check_ins, now, choose=draw)
            else:
                found = [assign(tx, one, now, choose=draw) for one in check_ins]
        first = min(training.task_id, evaluation.task_id)
        answers[way] = [
            one if isinstance(one, Declined) else (one[0].task_id - first, *one[1:]) for one in outline(found)
        ]
        with database.read() as tx:
            for key in (training, evaluation):
                stored = {row.key: row for row in list_assignments(tx, key)}
                given = {one.assignment.key: one.assignment for one in found if isinstance(one, Assigned)}
                assert stored == {key_: row for key_, row in given.items() if key_.iteration == key}
    assert answers["together"] == answers["in-turn"]
    assert {type(one) for one in answers["together"]} == {Declined, tuple}


def test_no_more_places_are_given_together_than_there_are(database, collecting, together):
    key = collecting(max_aggregation_size=5)
    answers = together(*[CheckIn("digits", 1) for _ in range(12)])
    assert [type(answer) for answer in answers] == [Assigned] * 5 + [Declined] * 7
    assert {answer.kind for answer in answers[5:]} == {DeclineKind.ITERATION_FULL}
    with database.read() as tx:
        assert count_assignments(tx, key)[AssignmentStatus.ASSIGNED] == 5


def test_attempts_of_one_check_in_that_come_together_get_one_assignment(database, collecting, together):
    key = collecting()
    first, other, *again = together(*[CheckIn("digits", 1, name) for name in ("a", "b", "a", "a")])
    assert [answer.repeated for answer in (first, other, *again)] == [False, False, True, True]
    assert {answer.assignment for answer in again} == {first.assignment}
    assert together(CheckIn("digits", 1, "a"))[0].assignment == first.assignment
    with database.read() as tx:
        assert len(list_assignments(tx, key)) == 2


def test_a_participant_who_comes_twice_at_once_takes_part_once(collecting, together):
    key = collecting()
    who = CheckIn("digits", 1, participant="device", separations={key.task: 1})
    first, second = together(who, who)
    assert isinstance(first, Assigned)
    assert second == Declined(DeclineKind.ITERATION_FULL)


def test_how_often_the_database_is_asked_does_not_grow_with_the_check_ins(database, collecting, now):
    # Lesson D3.
    key = collecting(max_aggregation_size=150)
    asked = []
    for count in (2, 100, 100):
        check_ins = [
            CheckIn("digits", 1, f"{count}/{len(asked)}/{index}", participant=str(index), separations={key.task: 0})
            for index in range(count)
        ]
        with database.write() as tx, statements(tx) as seen:
            assign_all(tx, check_ins, now, choose=lambda n: 0)
        asked.append(len(seen))
    assert max(asked) <= asked[0] + 1
    with database.read() as tx:
        assert count_assignments(tx, key)[AssignmentStatus.ASSIGNED] == 150


def test_who_gets_no_place_is_answered_without_writing_and_a_freed_place_is_seen_at_once(
    database, collecting, check_in, now
):
    # Lesson C17.
    collecting(max_aggregation_size=2)
    first = check_in(key="a")
    check_in()
    asking = [CheckIn("digits", 1), CheckIn("digits", 1, "a"), CheckIn("letters", 1), CheckIn("digits", -1)]
    with database.read() as tx:
        full, repeated, idle, old = standing_answers(tx, asking, now)
    assert (full, idle, old) == tuple(
        map(Declined, (DeclineKind.ITERATION_FULL, DeclineKind.NOT_ACTIVE, DeclineKind.VERSION_MISMATCH))
    )
    assert (repeated.assignment, repeated.repeated) == (first.assignment, True)
    with database.write() as tx:
        assert report_failed(tx, first.assignment.key, AssignmentStatus.LOCAL_FAILED, now)
    with database.read() as tx:
        assert standing_answers(tx, asking[:2], now) == [None, None]


def test_check_ins_of_several_populations_are_kept_apart(database, collecting, together):
    collecting("digits", max_aggregation_size=2)
    collecting("letters", max_aggregation_size=2)
    check_ins = [CheckIn(population, 1, "same key") for population in ("digits", "letters", "nobody")]
    if not database.takes_turns:
        # Two populations' locks at once could make two servers wait for each other.
        with pytest.raises(ValueError, match="3 populations"):
            together(*check_ins)
        return
    first, second, nothing = together(*check_ins)
    assert (first.iteration.key.population, second.iteration.key.population) == ("digits", "letters")
    assert nothing == Declined(DeclineKind.NOT_ACTIVE)
