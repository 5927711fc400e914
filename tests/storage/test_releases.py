"""The ledger as stored: chained entries, standings, budgets, and what becomes of a ledger of the first schema."""

from dataclasses import replace
from datetime import timedelta

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, column, create_engine, table, text
from sqlalchemy.exc import IntegrityError

import fedcompute.storage.migrations as migrations
from fedcompute.errors import Reason, RequestRejected
from fedcompute.privacy.budget import Budget, BudgetAssumption, spent_of
from fedcompute.privacy.chain import Release, tasks_of, verify_chain, verify_epsilons, verify_events
from fedcompute.privacy.ledger import GaussianEvent, TreeEvent
from fedcompute.privacy.participation import Participation
from fedcompute.storage import schema
from fedcompute.storage.budgets import budget_of, remove_budget, set_budget
from fedcompute.storage.database import Database
from fedcompute.storage.iterations import (
    close_and_open_next,
    end_unreleased,
    get_iteration,
    iterations_of,
    move_iteration,
)
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.releases import (
    CompletedIteration,
    LedgerMoved,
    Standing,
    append_releases,
    charged_entries,
    completed_iterations,
    count_entries,
    ledger_entries,
    standing_of,
)
from fedcompute.storage.schema import IterationStatus, TaskKind, TaskStatus
from fedcompute.storage.tasks import get_task

FIRST = Standing(0, None)
CHARGE = {"class": "GaussianDpEvent", "noise_multiplier": 2.0}


def releases_of(key, *, event=CHARGE, released="model", epsilon=1.5):
    return [
        Release(
            population=key.population,
            task_id=key.task_id,
            iteration_id=key.iteration_id,
            released=released,
            mechanism="FIXED_GAUSSIAN" if event else "NONE",
            event=event,
            claim=None,
            clip_norm=0.1 if event else None,
            report_goal=2,
            contributions=2,
            cumulative_epsilon=epsilon,
            delta=1e-6,
        )
    ]


def test_entries_of_a_population_are_one_chain_and_read_as_they_were_written(database, now):
    keys = [IterationKey("a", 1, 1), IterationKey("b", 1, 1), IterationKey("a", 2, 1), IterationKey("a", 1, 2)]
    written = {}
    with database.write() as tx:
        for key in keys:
            written[key] = append_releases(tx, key, releases_of(key), standing_of(tx, key.population), now)
    with database.read() as tx:
        entries = ledger_entries(tx, "a")
        assert entries == [*written[keys[0]], *written[keys[2]], *written[keys[3]]]
        assert [one.sequence for one in entries] == [1, 2, 3]
        assert verify_chain(entries) == verify_chain(ledger_entries(tx, "b")) == []
        assert ledger_entries(tx, "a", task=keys[2].task) == written[keys[2]]
        assert ledger_entries(tx, "a", after=1, limit=1) == entries[1:2]
        assert count_entries(tx, "a") == {1: 2, 2: 1}


def test_what_charges_nothing_repeats_epsilon_and_leaves_the_standing_as_it_is(database, now):
    key, other = IterationKey("a", 1, 1), IterationKey("a", 2, 1)
    with database.write() as tx:
        (before,) = append_releases(tx, other, releases_of(other, event=None, released="metrics"), None, now)
        assert (before.cumulative_epsilon, before.delta) == (0.0, 1e-6)
        assert standing_of(tx, "a") == FIRST
        append_releases(tx, key, releases_of(key), FIRST, now)
        second = replace(other, iteration_id=2)
        (entry,) = append_releases(
            tx, second, releases_of(second, event=None, released="metrics", epsilon=9), None, now
        )
        assert entry.cumulative_epsilon == 1.5
        assert standing_of(tx, "a") == Standing(2, None)
        assert [one.sequence for one in charged_entries(tx, "a")] == [2]


def test_a_charge_that_was_decided_on_an_old_ledger_or_budget_is_not_entered(database, now):
    key, other = IterationKey("a", 1, 1), IterationKey("a", 2, 1)
    with database.write() as tx:
        append_releases(tx, key, releases_of(key), FIRST, now)
        with pytest.raises(LedgerMoved):
            append_releases(tx, other, releases_of(other), FIRST, now)
        set_budget(tx, "a", Budget(1.0, 1e-6), now)
        with pytest.raises(LedgerMoved):
            append_releases(tx, other, releases_of(other), Standing(1, None), now)
        with pytest.raises(ValueError, match="look"):
            append_releases(tx, other, releases_of(other), None, now)
        assert len(ledger_entries(tx, "a")) == 1


def test_one_thing_of_a_round_is_entered_once(database, now):
    key = IterationKey("a", 1, 1)
    with database.write() as tx:
        append_releases(tx, key, releases_of(key), FIRST, now)
    with pytest.raises(IntegrityError), database.write() as tx:
        append_releases(tx, key, releases_of(key), standing_of(tx, "a"), now)


def test_of_two_tasks_that_race_for_the_last_of_a_budget_one_gets_it(database, collecting, race, now):
    # Both were told that there is room for one more release, and there was.
    keys = [collecting(), collecting(evaluates=1)]
    with database.write() as tx:
        for key in keys:
            for old, new in ((0, 1), (1, 4)):
                assert move_iteration(tx, key, IterationStatus(old), IterationStatus(new), now)

    def work(opened, index):
        try:
            with opened.write() as tx:
                return close_and_open_next(
                    tx,
                    keys[index],
                    metrics={},
                    releases=releases_of(keys[index]),
                    standing=FIRST,
                    following=None,
                    now=now,
                )
        except LedgerMoved:
            return "moved"

    assert sorted(map(str, race(2, work))) == ["True", "moved"]
    with database.read() as tx:
        assert len(ledger_entries(tx, "digits")) == 1
        statuses = sorted(get_iteration(tx, key).status for key in keys)
        assert statuses == [IterationStatus.APPLYING, IterationStatus.COMPLETED]


def test_a_refused_round_ends_with_its_task_unless_the_ledger_moved(database, applying, now):
    key = applying()
    with pytest.raises(LedgerMoved), database.write() as tx:
        end_unreleased(tx, key, Standing(7, None), Reason.BUDGET_SPENT, now)
    with database.write() as tx:
        assert get_iteration(tx, key).status is IterationStatus.APPLYING
        assert end_unreleased(tx, key, FIRST, Reason.BUDGET_SPENT, now)
        assert not end_unreleased(tx, key, FIRST, Reason.BUDGET_SPENT, now)
        assert get_iteration(tx, key).status is IterationStatus.CANCELED
        task = get_task(tx, key.task)
        assert (task.status, task.reason, task.stopped) == (TaskStatus.COMPLETED, "budget_spent", now)
        assert ledger_entries(tx, "digits") == []


def test_a_budget_is_kept_replaced_and_removed(database, now):
    wary = Budget(3.0, 1e-5, BudgetAssumption.NO_AMPLIFICATION)
    with database.write() as tx:
        set_budget(tx, "a", Budget(1.0, 1e-6), now)
        set_budget(tx, "a", wary, now)
        assert budget_of(tx, "a") == wary
        assert budget_of(tx, "b") is None
        assert remove_budget(tx, "a")
        assert not remove_budget(tx, "a")
        for bad in (Budget(0.0, 1e-6), Budget(float("inf"), 1e-6), Budget(1.0, 0.0)):
            with pytest.raises(RequestRejected) as caught:
                set_budget(tx, "a", bad, now)
            assert caught.value.reason is Reason.BUDGET_INVALID
        with pytest.raises(RequestRejected, match="characters"):
            set_budget(tx, "x" * 65, wary, now)


OLD_TABLE = table(
    "privacy_ledger",
    *(column(name) for name in ("population_name", "task_id", "iteration_id")),
    column("event", JSON),
    *(column(name) for name in ("clip_norm", "report_goal", "contributions")),
    column("created_time", schema.UtcDateTime),
)


@pytest.fixture
def old_database(empty_url, tmp_path, now):
    """The URL of a database of the first schema, with a ledger."""
    tree = {"class": "TreeAggregationStep", "noise_multiplier": 3.0, "step": 1}
    both = {"class": "ComposedDpEvent", "events": [CHARGE, {**CHARGE, "noise_multiplier": 9.5}]}
    rows = [
        ("b", 1, 1, tree, 0.3, 10, 11, now + timedelta(seconds=2)),
        ("a", 1, 2, CHARGE, 0.1, 10, 10, now + timedelta(seconds=1)),
        ("a", 1, 1, CHARGE, 0.1, 10, 10, now.replace(microsecond=0)),
        ("a", 2, 1, both, 0.1, 10, 10, now + timedelta(seconds=2)),
    ]
    config = Config()
    config.set_main_option("script_location", migrations.__path__[0])
    (tmp_path / "new").mkdir(exist_ok=True)
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(OLD_TABLE.insert(), [dict(zip(OLD_TABLE.c.keys(), row, strict=True)) for row in rows])
    engine.dispose()
    return empty_url


def test_a_ledger_of_the_first_schema_is_chained_in_its_order_and_assumes_nothing_of_devices(old_database, now):
    database = Database.open(old_database)
    with database.write() as tx:
        entries = ledger_entries(tx, "a")
        assert [(one.task_id, one.iteration_id, one.mechanism) for one in entries] == [
            (1, 1, "FIXED_GAUSSIAN"),
            (1, 2, "FIXED_GAUSSIAN"),
            (2, 1, "ADAPTIVE_GAUSSIAN"),
        ]
        assert {(one.released, one.claim, one.cumulative_epsilon) for one in entries} == {("model", None, None)}
        assert verify_chain(entries) == verify_events(entries) == verify_epsilons(entries) == []
        tasks = tasks_of(entries)
        assert [task.assumption.participation for task in tasks] == [Participation.NO_AMPLIFICATION] * 2
        assert list(tasks[1].rounds) == [(GaussianEvent(2.0), GaussianEvent(9.5))]
        (tree,) = ledger_entries(tx, "b")
        assert tree.mechanism == "TREE_AGGREGATION"
        assert list(tasks_of([tree])[0].rounds) == [(TreeEvent(3.0, 1),)]
        # The chain goes on from there.
        key = IterationKey("a", 2, 2)
        append_releases(tx, key, releases_of(key), standing_of(tx, "a"), now)
        assert verify_chain(ledger_entries(tx, "a")) == []
        assert tx.execute(text("SELECT version_num FROM alembic_version")).scalar() == migrations.HEAD
        assert tx.execute(schema.task.select()).all() == []
    database.close()


def old_rows(kind, task_id, moment):
    """A completed round of a task as the first schema has it."""
    task = {
        "population_name": "plain", "task_id": task_id, "kind": int(kind), "total_iteration": 2,
        "min_aggregation_size": 5, "max_aggregation_size": 6, "status": 0, "status_id": 1, "status_time": moment,
        "created_time": moment, "max_parallel": 1, "correlation_id": "", "min_client_version": "0",
        "max_client_version": "9", "info": {},
    }  # fmt: skip
    iteration = {
        "population_name": "plain", "task_id": task_id, "iteration_id": 1, "attempt_id": 0, "status": 50,
        "status_id": 1, "status_time": moment, "created_time": moment, "base_iteration_id": 0, "base_on_result_id": 0,
        "report_goal": 5, "result_id": 1, "info": {}, "aggregation_level": 2, "max_aggregation_size": 6,
        "min_client_version": "0", "max_client_version": "9",
    }  # fmt: skip
    return task, iteration


def old_table(name, row):
    types = {"info": JSON, "status_time": schema.UtcDateTime, "created_time": schema.UtcDateTime}
    return table(name, *(column(key, types.get(key)) for key in row))


def test_rounds_that_the_first_schema_had_no_entry_for_are_in_the_chain_as_unprotected(old_database, now):
    engine = create_engine(old_database)
    with engine.begin() as connection:
        for kind, task_id in ((TaskKind.TRAINING, 1), (TaskKind.EVALUATION, 2)):
            for name, row in zip(("task", "iteration"), old_rows(kind, task_id, now), strict=True):
                connection.execute(old_table(name, row).insert(), [row])
    engine.dispose()
    database = Database.open(old_database)
    with database.read() as tx:
        entries = ledger_entries(tx, "plain")
    assert [(one.task_id, one.released, one.mechanism) for one in entries] == [
        (1, "model", "NONE"),
        (1, "metrics", "NONE"),
        (2, "metrics", "NONE"),
    ]
    assert verify_chain(entries) == verify_events(entries) == verify_epsilons(entries) == []
    # A budget that is set later knows that nothing is left of it.
    assert spent_of(Budget(100.0, 1e-6), tasks_of(entries)) == float("inf")
    database.close()


def test_an_upgrade_renumbers_no_status_and_evaluations_still_see_old_rounds(old_database, now):
    task, iteration = old_rows(TaskKind.TRAINING, 1, now)
    place = {name: iteration[name] for name in ("population_name", "task_id", "iteration_id", "attempt_id")}
    codes = [int(IterationStatus[name]) for name in ("COLLECTING", "AGGREGATING", "APPLYING", "COMPLETED")]
    history = [
        {**place, "status_id": number, "status": code, "created_time": now, "aggregation_level": 0}
        for number, code in enumerate(codes, 1)
    ]
    engine = create_engine(old_database)
    with engine.begin() as connection:
        for name, rows in (("task", [task]), ("iteration", [iteration]), ("iteration_status_history", history)):
            connection.execute(old_table(name, rows[0]).insert(), rows)
    engine.dispose()
    database = Database.open(old_database)
    with database.read() as tx:
        (row,) = iterations_of(tx, TaskKey("plain", 1))
        assert row.status is IterationStatus.COMPLETED
        kept = tx.execute(schema.iteration_status_history.select().order_by("status_id")).all()
        assert [one.status for one in kept] == codes == [0, 1, 4, 50]
        assert completed_iterations(tx, row.key.task, stored=True) == [CompletedIteration(1, now)]
    database.close()
