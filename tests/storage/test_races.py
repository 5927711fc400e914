"""Writers that really run at the same time, each with a connection of its own: SQLite lets them in one after the other,
PostgreSQL side by side."""

import threading
import time
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from fedcompute.errors import Reason, RequestRejected
from fedcompute.privacy.budget import Budget
from fedcompute.privacy.chain import Release, verify_chain
from fedcompute.storage import schema
from fedcompute.storage.assignments import (
    cancel_unused,
    count_assignments,
    list_assignments,
    mark_uploaded,
    report_completed,
    time_out_computing,
)
from fedcompute.storage.batches import finish_batch, get_batch
from fedcompute.storage.budgets import budget_of, set_budget
from fedcompute.storage.check_ins import Assigned, Declined, DeclineKind
from fedcompute.storage.iterations import (
    close_and_open_next,
    create_iteration,
    get_iteration,
    iterations_of,
    move_iteration,
    newest_iteration,
    next_iteration,
)
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.leases import acquire_lease
from fedcompute.storage.releases import (
    LedgerMoved,
    Standing,
    append_releases,
    ledger_entries,
    metrics_of,
    standing_of,
)
from fedcompute.storage.schema import AssignmentStatus, IterationStatus, TaskStatus
from fedcompute.storage.tasks import cancel_task, create_task, get_task, list_tasks, pause_task

FIRST = Standing(0, None)


def release_of(key, *, charged=True):
    return Release(
        population=key.population,
        task_id=key.task_id,
        iteration_id=key.iteration_id,
        released="model",
        mechanism="FIXED_GAUSSIAN" if charged else "NONE",
        event={"class": "GaussianDpEvent", "noise_multiplier": 2.0} if charged else None,
        claim=None,
        clip_norm=0.1 if charged else None,
        report_goal=2,
        contributions=2,
        cumulative_epsilon=1.5,
        delta=1e-6,
    )


def test_of_check_ins_that_race_for_the_last_place_one_gets_it(database, collecting, check_in, race):
    key = collecting(max_aggregation_size=3)
    check_in(), check_in()
    answers = race(8, lambda opened, _: check_in(on=opened))
    assert Counter(type(answer) for answer in answers) == {Assigned: 1, Declined: 7}
    with database.read() as tx:
        assert count_assignments(tx, key)[AssignmentStatus.ASSIGNED] == 3


def test_no_device_is_sent_away_for_days_while_one_round_follows_the_other(database, collecting, check_in, race, now):
    rounds = 15
    task = collecting(total_iteration=rounds + 1, max_aggregation_size=1000).task

    def work(opened, index):
        kinds = Counter()
        if index == 0:
            for iteration_id in range(1, rounds + 1):
                key = IterationKey(task.population, task.task_id, iteration_id)
                with opened.write() as tx:
                    move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
                    move_iteration(tx, key, IterationStatus.AGGREGATING, IterationStatus.APPLYING, now)
                with opened.write() as tx:
                    following = next_iteration(get_task(tx, task), get_iteration(tx, key))
                    assert close_and_open_next(
                        tx, key, metrics={}, releases=[], standing=None, following=following, now=now
                    )
            return kinds
        for _ in range(rounds):
            answer = check_in(on=opened)
            kinds[answer.kind if isinstance(answer, Declined) else "assigned"] += 1
        return kinds

    found = sum(race(4, work), Counter())
    assert set(found) <= {"assigned", DeclineKind.NOT_OPEN}
    with database.read() as tx:
        assert newest_iteration(tx, task).key.iteration_id == rounds + 1


def test_an_idempotency_key_that_comes_twice_at_once_takes_one_place(database, collecting, check_in, race):
    key = collecting(max_aggregation_size=1000)
    for attempt in range(5):
        first, second = race(2, lambda opened, _, name=f"key {attempt}": check_in(key=name, on=opened))
        assert first.assignment == second.assignment
        assert first.repeated != second.repeated
    with database.read() as tx:
        assert len(list_assignments(tx, key)) == 5


def test_of_two_that_close_a_round_one_releases_it(database, applying, race, now):
    key = applying()
    with database.read() as tx:
        following = next_iteration(get_task(tx, key.task), get_iteration(tx, key))

    def work(opened, index):
        with opened.write() as tx:
            return close_and_open_next(
                tx,
                key,
                metrics={"loss": float(index)},
                releases=[release_of(key, charged=False)],
                standing=None,
                following=following,
                now=now,
            )

    answers = race(4, work)
    assert sorted(answers) == [False, False, False, True]
    with database.read() as tx:
        assert [row.value for row in metrics_of(tx, key.task)] == [float(answers.index(True))]
        assert len(ledger_entries(tx, "digits")) == 1
        assert [row.status for row in iterations_of(tx, key.task)] == [
            IterationStatus.COMPLETED,
            IterationStatus.COLLECTING,
        ]


def test_a_round_that_is_closed_and_canceled_at_once_is_one_of_the_two(database, applying, race, now):
    for population in ("a", "b", "c"):
        key = applying(population=population, total_iteration=1)

        def work(opened, index, key=key):
            with opened.write() as tx:
                if index == 0:
                    return cancel_task(tx, key.task, now)
                return close_and_open_next(
                    tx, key, metrics={}, releases=[release_of(key)], standing=FIRST, following=None, now=now
                )

        canceled, closed = race(2, work)
        assert canceled != closed
        with database.read() as tx:
            ended = TaskStatus.CANCELED if canceled else TaskStatus.COMPLETED
            assert get_task(tx, key.task).status is ended
            assert len(ledger_entries(tx, population)) == closed


def test_a_round_that_is_closed_while_its_task_is_paused_is_released_and_followed_by_at_most_the_one_next(
    database, applying, race, now
):
    for population in ("a", "b", "c"):
        key = applying(population=population)

        def work(opened, index, key=key):
            with opened.write() as tx:
                if index == 0:
                    return pause_task(tx, key.task, now)
                following = next_iteration(get_task(tx, key.task), get_iteration(tx, key))
                return close_and_open_next(
                    tx, key, metrics={}, releases=[release_of(key)], standing=FIRST, following=following, now=now
                )

        assert race(2, work) == [True, True]
        with database.read() as tx:
            assert get_task(tx, key.task).status is TaskStatus.PAUSED
            assert len(ledger_entries(tx, population)) == 1
            first, *rest = [row.status for row in iterations_of(tx, key.task)]
        assert first is IterationStatus.COMPLETED
        assert rest in ([], [IterationStatus.COLLECTING])


def test_entries_that_race_for_a_place_in_the_ledger_get_one_each(database, race, now):
    def work(opened, index):
        written = []
        for iteration_id in range(1, 6):
            key = IterationKey("a", index + 1, iteration_id)
            with opened.write() as tx:
                written += append_releases(tx, key, [release_of(key, charged=False)], None, now)
        return written

    written = sorted((entry for entries in race(4, work) for entry in entries), key=lambda entry: entry.sequence)
    with database.read() as tx:
        entries = ledger_entries(tx, "a")
    assert entries == written
    assert [entry.sequence for entry in entries] == list(range(1, 21))
    assert verify_chain(entries) == []


def test_of_charges_that_were_decided_on_the_same_ledger_one_is_entered_and_the_others_look_again(database, race, now):
    def work(opened, index):
        key = IterationKey("a", index + 1, 1)
        looks, standing = 1, FIRST
        while True:
            try:
                with opened.write() as tx:
                    append_releases(tx, key, [release_of(key)], standing, now)
                return looks
            except LedgerMoved:
                looks += 1
                with opened.read() as tx:
                    standing = standing_of(tx, "a")

    looks = race(4, work)
    assert sorted(looks)[0] == 1
    assert 1 not in sorted(looks)[1:]
    with database.read() as tx:
        entries = ledger_entries(tx, "a")
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4]
    assert verify_chain(entries) == []


def test_the_database_itself_refuses_a_second_entry_of_one_sequence(database, race, now):
    def work(opened, index):
        key = IterationKey("a", 1, 1)
        with opened.write() as tx:
            append_releases(tx, key, [release_of(key)], FIRST, now)
            return tx.execute(schema.privacy_ledger.select()).mappings().one()

    (row,) = race(1, work)

    def write(opened, index):
        try:
            with opened.write() as tx:
                tx.execute(schema.privacy_ledger.insert().values({**row, "sequence": 2, "task_id": index + 2}))
        except IntegrityError:
            return "refused"
        return "entered"

    assert Counter(race(3, write)) == {"entered": 1, "refused": 2}


def test_a_budget_that_two_operators_set_at_once_is_one_of_theirs(database, race, now):
    def work(opened, index):
        with opened.write() as tx:
            set_budget(tx, "a", Budget(index + 1.0, 1e-6), now)

    race(4, work)
    with database.read() as tx:
        assert budget_of(tx, "a").epsilon in (1.0, 2.0, 3.0, 4.0)


def test_tasks_that_are_created_at_once_get_ids_of_their_own_and_one_of_a_kind_is_active(
    database, task_proto, race, now
):
    def work(opened, index):
        proto = task_proto("a", evaluates=1) if index % 2 else task_proto("a")
        try:
            with opened.write() as tx:
                return create_task(tx, proto, now).key.task_id
        except RequestRejected as rejected:
            return rejected.reason

    answers = race(6, work)
    assert Counter(map(str, answers)) == {"1": 1, "2": 1, str(Reason.TASK_CONFLICT): 4}
    with database.read() as tx:
        assert [task.key.task_id for task in list_tasks(tx, population="a")] == [1, 2]


def test_a_task_that_ends_while_its_next_round_opens_has_no_round_under_way(database, collecting, race, now):
    for population in ("a", "b", "c"):
        key = collecting(population)
        with database.write() as tx:
            new = next_iteration(get_task(tx, key.task), get_iteration(tx, key))

        def work(opened, index, key=key, new=new):
            with opened.write() as tx:
                return cancel_task(tx, key.task, now) if index == 0 else create_iteration(tx, new, now)

        canceled, _ = race(2, work)
        assert canceled
        with database.read() as tx:
            assert get_task(tx, key.task).status is TaskStatus.CANCELED
            assert {row.status for row in iterations_of(tx, key.task)} == {IterationStatus.CANCELED}


def test_sweeps_that_run_at_once_time_every_device_out_once(database, collecting, check_in, race, now):
    collecting(max_aggregation_size=1000)
    keys = [check_in().assignment.key for _ in range(30)]
    late = now + timedelta(hours=1)

    def work(opened, _):
        moved, idle = [], 0
        # What another sweep has locked is its own; an empty answer may mean that it has all of the rest.
        while idle < 3:
            with opened.write() as tx:
                found = time_out_computing(tx, late, timedelta(minutes=15), limit=4)
            moved += found
            idle = 0 if found else idle + 1
        return moved

    assert sorted(key for moved in race(3, work) for key in moved) == sorted(keys)
    with database.read() as tx:
        assert len(tx.execute(schema.assignment_status_history.select()).all()) == 60


def test_writers_that_move_the_same_devices_do_not_wait_in_a_circle(database, collecting, check_in, race, now):
    key = collecting(max_aggregation_size=1000)
    sessions = sorted((check_in().assignment.key for _ in range(20)), reverse=True)
    with database.write() as tx:
        # So that they lie backwards in their table.
        for session in sessions:
            assert report_completed(tx, session, now)
    names = sorted(session.session_id for session in sessions)
    first_half_done = threading.Event()

    def work(opened, index):
        if index:
            first_half_done.wait(10)
            with opened.write() as tx:
                return cancel_unused(tx, key, now)
        with opened.write() as tx:
            moved = mark_uploaded(tx, key, names[:10], now)
            first_half_done.set()
            # Time for the other to lock what it comes upon, and to wait for the first half.
            time.sleep(0.2)
            return len(moved + mark_uploaded(tx, key, names[10:], now))

    assert race(2, work)[0] == 20
    with database.read() as tx:
        assert sum(count_assignments(tx, key).values()) == 20


def test_a_batch_that_two_jobs_finish_counts_once(database, collecting, uploaded, published, race, now):
    key = collecting()
    sessions = uploaded(key, 3)
    batch = published(key, sessions)

    def work(opened, index):
        rejected = {sessions[0]: Reason.NOT_FINITE} if index else {}
        with opened.write() as tx:
            return finish_batch(tx, batch, 3 - len(rejected), rejected, now)

    answers = race(2, work)
    assert sorted(answers) == [False, True]
    with database.read() as tx:
        failed = count_assignments(tx, key)[AssignmentStatus.REMOTE_FAILED]
        assert (get_batch(tx, batch).accepted_size, failed) == ((3, 0) if answers[0] else (2, 1))


def test_a_lease_that_is_free_for_all_goes_to_one(database, race, now):
    def work(opened, index):
        with opened.write() as tx:
            return acquire_lease(tx, "round", f"server {index}", now, timedelta(seconds=10))

    assert sorted(race(5, work)) == [False] * 4 + [True]


def test_populations_do_not_wait_for_each_other(database, database_url, collecting, check_in, race, now):
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer")
    collecting("a")
    collecting("b")
    with database.write() as tx:
        assert set_budget(tx, "a", Budget(1.0, 1e-6), now) is None
        (answer,) = race(1, lambda opened, _: check_in("b", on=opened))
    assert isinstance(answer, Assigned)
