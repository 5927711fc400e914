from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from fedcompute.errors import Reason
from fedcompute.privacy.chain import GENESIS, Release, chained
from fedcompute.storage import schema
from fedcompute.storage.assignments import mark_uploaded, report_completed, uploading
from fedcompute.storage.iterations import (
    busy_iterations,
    close_and_open_next,
    create_iteration,
    get_iteration,
    iterations_of,
    list_iterations,
    move_iteration,
    newest_iteration,
    next_iteration,
    tasks_to_advance,
)
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import Standing, append_releases, completed_iterations, ledger_entries, metrics_of
from fedcompute.storage.schema import IterationStatus, TaskStatus
from fedcompute.storage.tasks import cancel_task, create_task, get_task, open_task, pause_task

FIRST = Standing(0, None)


@pytest.fixture
def releases():
    def make(key):
        return [
            Release(
                population=key.population,
                task_id=key.task_id,
                iteration_id=key.iteration_id,
                released=what,
                mechanism="FIXED_GAUSSIAN" if event else "NONE",
                event=event,
                claim=None,
                clip_norm=1.5 if event else None,
                report_goal=2,
                contributions=2,
                cumulative_epsilon=3.25,
                delta=1e-6,
            )
            for what, event in (("model", {"class": "GaussianDpEvent", "noise_multiplier": 0.7}), ("metrics", None))
        ]

    return make


@pytest.fixture
def following(database):
    def make(key):
        with database.read() as tx:
            return next_iteration(get_task(tx, key.task), get_iteration(tx, key))

    return make


def test_the_next_training_iteration_builds_on_the_last(database, collecting):
    key = collecting()
    with database.read() as tx:
        task, first = get_task(tx, key.task), get_iteration(tx, key)
    second = next_iteration(task, first)
    assert (first.base_on_result_id, first.result_id, first.report_goal, first.max_aggregation_size) == (0, 1, 2, 5)
    assert (second.key.iteration_id, second.base_on_result_id, second.result_id) == (2, 1, 2)
    assert first.info.task_info == task.info
    with pytest.raises(ValueError):
        next_iteration(task, first, training_iteration_id=1)


def test_an_evaluation_iteration_serves_its_own_checkpoint(database, collecting):
    collecting()
    key = collecting(evaluates=1)
    with database.read() as tx:
        first = get_iteration(tx, key)
    assert (first.base_on_result_id, first.info.evaluation_training_iteration_id) == (1, 1)


def test_an_iteration_is_created_once_and_only_while_its_task_is_open(database, collecting, following, now):
    key = collecting()
    second = following(key)
    with database.write() as tx:
        assert create_iteration(tx, second, now)
        assert not create_iteration(tx, second, now)
        assert cancel_task(tx, key.task, now)
        third = next_iteration(get_task(tx, key.task), newest_iteration(tx, key.task))
        assert not create_iteration(tx, third, now)
        assert [row.key.iteration_id for row in iterations_of(tx, key.task)] == [1, 2]


def test_the_longest_waiting_iteration_is_listed_first(database, collecting, now):
    keys = [collecting(name) for name in ("a", "b", "c")]
    later = now + timedelta(seconds=1)
    with database.write() as tx:
        assert move_iteration(tx, keys[0], IterationStatus.COLLECTING, IterationStatus.AGGREGATING, later)
        both = (IterationStatus.COLLECTING, IterationStatus.AGGREGATING)
        assert [row.key for row in list_iterations(tx, statuses=both)] == [keys[1], keys[2], keys[0]]
        assert [row.key for row in list_iterations(tx, statuses=both[:1], task=keys[2].task)] == [keys[2]]


def test_the_level_follows_the_status_and_history_repeats_it(database, applying, now):
    key = applying()
    with database.read() as tx:
        assert get_iteration(tx, key).aggregation_level == 2
        rows = tx.execute(schema.iteration_status_history.select().order_by("status_id")).all()
    assert [(row.status_id, row.status, row.aggregation_level) for row in rows] == [(1, 0, 0), (2, 1, 1), (3, 4, 2)]


def test_of_racers_for_a_transition_one_wins(database, collecting, race, now):
    key = collecting()

    def work(opened, _):
        with opened.write() as tx:
            return move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)

    assert sorted(race(8, work)) == [False] * 7 + [True]
    with database.read() as tx:
        assert len(tx.execute(schema.iteration_status_history.select()).all()) == 2


def test_closing_releases_metrics_entry_and_successor_together(database, applying, following, releases, now):
    key = applying()
    metrics = {"x" * 200: 0.5, "loss": float("nan"), "none": None}
    with database.write() as tx:
        assert close_and_open_next(
            tx, key, metrics=metrics, releases=releases(key), standing=FIRST, following=following(key), now=now
        )
    with database.write() as tx:
        assert get_iteration(tx, key).status is IterationStatus.COMPLETED
        assert newest_iteration(tx, key.task).key.iteration_id == 2
        first, second = releases(key)
        created = "2026-03-01T12:00:00.123456+00:00"
        before = chained(None, first, created)
        assert ledger_entries(tx, "digits") == [before, chained(before, second, created)]
        assert before.previous_hash == GENESIS
        assert {row.name: row.value for row in metrics_of(tx, key.task)} == {"x" * 200: 0.5, "loss": None, "none": None}
        assert [(row.iteration_id, row.completed) for row in completed_iterations(tx, key.task)] == [(1, now)]
        assert completed_iterations(tx, key.task, since=now + timedelta(microseconds=1)) == []
        assert not close_and_open_next(tx, key, metrics={}, releases=[], standing=None, following=None, now=now)


def test_the_last_iteration_completes_the_task(database, applying, releases, now):
    key = applying(total_iteration=1)
    with database.write() as tx:
        assert close_and_open_next(tx, key, metrics={}, releases=releases(key), standing=FIRST, following=None, now=now)
        assert get_task(tx, key.task).status is TaskStatus.COMPLETED


def test_an_iteration_without_a_successor_leaves_the_task_open(database, applying, now):
    key = applying()
    with database.write() as tx:
        assert close_and_open_next(tx, key, metrics={}, releases=[], standing=None, following=None, now=now)
        assert get_task(tx, key.task).status is TaskStatus.OPEN


def test_nothing_is_released_when_the_ledger_entry_cannot_be_stored(database, applying, following, releases, now):
    key = applying()
    with database.write() as tx:
        append_releases(tx, key, releases(key)[1:], None, now)
    with database.write() as tx:
        with pytest.raises(IntegrityError):
            close_and_open_next(
                tx,
                key,
                metrics={"loss": 1.0},
                releases=releases(key),
                standing=FIRST,
                following=following(key),
                now=now,
            )
        # The caller may go on with its transaction: the failed release has left nothing in it.
        assert tx.execute(text("SELECT 1")).scalar() == 1
    with database.read() as tx:
        assert get_iteration(tx, key).status is IterationStatus.APPLYING
        assert newest_iteration(tx, key.task).key == key
        assert metrics_of(tx, key.task) == []
        assert len(tx.execute(schema.iteration_status_history.select()).all()) == 3


def test_nothing_is_released_when_the_successor_exists(database, applying, following, releases, now):
    key = applying()
    with database.write() as tx:
        assert create_iteration(tx, following(key), now)
        assert not close_and_open_next(
            tx,
            key,
            metrics={"loss": 1.0},
            releases=releases(key),
            standing=FIRST,
            following=following(key),
            now=now,
        )
    with database.read() as tx:
        assert get_iteration(tx, key).status is IterationStatus.APPLYING
        assert ledger_entries(tx, "digits") == []
        assert metrics_of(tx, key.task) == []


@pytest.mark.parametrize("end", [None, Reason.BUDGET_SPENT])
def test_a_paused_task_releases_its_round_and_opens_and_ends_nothing(database, applying, releases, now, end):
    key = applying()
    with database.write() as tx:
        assert pause_task(tx, key.task, now)
        following = next_iteration(get_task(tx, key.task), get_iteration(tx, key))
        assert not create_iteration(tx, following, now)
        assert close_and_open_next(
            tx, key, metrics={}, releases=releases(key), standing=FIRST,
            following=None if end else following, now=now, end=end,
        )  # fmt: skip
        assert get_task(tx, key.task).status is TaskStatus.PAUSED
        assert [row.status for row in iterations_of(tx, key.task)] == [IterationStatus.COMPLETED]


def test_a_paused_task_completes_with_its_last_round(database, applying, releases, now):
    key = applying(total_iteration=1)
    with database.write() as tx:
        assert pause_task(tx, key.task, now)
        assert close_and_open_next(tx, key, metrics={}, releases=releases(key), standing=FIRST, following=None, now=now)
        assert get_task(tx, key.task).status is TaskStatus.COMPLETED


def test_a_canceled_task_releases_nothing(database, applying, releases, now):
    key = applying(total_iteration=1)
    with database.write() as tx:
        assert cancel_task(tx, key.task, now)
        assert not close_and_open_next(
            tx, key, metrics={}, releases=releases(key), standing=FIRST, following=None, now=now
        )
        assert ledger_entries(tx, "digits") == []


def test_an_entry_or_successor_of_another_iteration_is_a_mistake(database, applying, following, releases, now):
    key = applying()
    other = IterationKey("digits", 1, 7)
    with database.write() as tx:
        with pytest.raises(ValueError, match="ledger"):
            close_and_open_next(tx, key, metrics={}, releases=releases(other), standing=FIRST, following=None, now=now)
        skipping = replace(following(key), key=other)
        with pytest.raises(ValueError, match="follow"):
            close_and_open_next(tx, key, metrics={}, releases=[], standing=None, following=skipping, now=now)


def test_the_ledger_outlives_its_task(database, applying, releases, now):
    key = applying(total_iteration=1)
    with database.write() as tx:
        close_and_open_next(
            tx, key, metrics={"loss": 1.0}, releases=releases(key), standing=FIRST, following=None, now=now
        )
        tx.execute(schema.task.delete())
        assert metrics_of(tx, key.task) == []
        assert tx.execute(schema.iteration_status_history.select()).all() == []
        assert len(ledger_entries(tx, "digits", task=key.task)) == 2


def test_a_metric_is_stored_whatever_the_length_of_its_name(database, applying, now):
    key = applying()
    name = "loss/" + "x" * 300
    with database.write() as tx:
        assert close_and_open_next(tx, key, metrics={name: 1.0}, releases=(), standing=None, following=None, now=now)
        assert [(one.name, one.value) for one in metrics_of(tx, key.task)] == [(name, 1.0)]


def test_tasks_behind_the_first_page_are_advanced_as_well(database, task_proto, collecting, now):
    with database.write() as tx:
        keys = [create_task(tx, task_proto(f"p{number}"), now).key for number in range(5)]
        for key in keys:
            assert open_task(tx, key, now)
    busy, overlapping = collecting("busy"), collecting("overlapping", max_parallel=2)
    with database.read() as tx:
        found, after = [], None
        while page := tasks_to_advance(tx, after=after, limit=2):
            after = page[-1].key
            found += [one.key for one in page]
    assert found == sorted([*keys, overlapping.task])
    assert busy.task not in found


def test_rounds_with_something_to_do_are_told_apart(database, collecting, check_in, uploaded, published, now):
    idle, loose, in_job, arriving, closed = (collecting(name) for name in ("idle", "loose", "job", "coming", "closed"))
    check_in("idle")
    uploaded(loose, 1)
    published(in_job, uploaded(in_job, 2))
    published(closed, uploaded(closed, 2))
    reported = check_in("coming").assignment
    with database.write() as tx:
        assert report_completed(tx, reported.key, now)
        assert move_iteration(tx, closed, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
        assert busy_iterations(tx) == {loose, in_job}
        session = reported.key.session_id
        assert busy_iterations(tx, [session, "unknown"]) == {loose, in_job, arriving}
        assert uploading(tx) == {arriving: {session}}
        assert mark_uploaded(tx, arriving, [session], now)
        assert busy_iterations(tx) == busy_iterations(tx, [session]) == {loose, in_job, arriving}
    assert idle not in {loose, in_job, arriving}


def test_a_task_with_as_many_rounds_as_it_may_have_is_not_looked_at(database, collecting, now):
    first = collecting(max_parallel=2)
    with database.write() as tx:
        assert [one.key for one in tasks_to_advance(tx)] == [first.task]
        following = next_iteration(get_task(tx, first.task), get_iteration(tx, first), released=0)
        assert create_iteration(tx, following, now)
        assert tasks_to_advance(tx) == []
