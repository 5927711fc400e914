"""What pages ask the database, on both kinds of it: the answers, when a page is stale, and which indexes they use."""

import re
from datetime import timedelta

import pytest
from sqlalchemy import Engine, event

from fedcompute.privacy.budget import Budget, BudgetAssumption
from fedcompute.privacy.chain import Release
from fedcompute.storage.assignments import report_completed, report_failed, time_out_computing
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.budgets import remove_budget, set_budget
from fedcompute.storage.charts import (
    count_released,
    evaluations_of,
    metric_names,
    metric_series,
    newest_attempts,
    newest_entries,
    newest_round,
    overview_version,
    population_names,
    population_overviews,
    recent_tasks,
    round_entries,
    task_entries,
    task_version,
)
from fedcompute.storage.iterations import close_and_open_next, get_iteration, move_iteration, next_iteration
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.releases import standing_of
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.summaries import (
    arrivals_of_round,
    assignments_per_minute,
    round_attempts,
    round_summaries,
    round_timeline,
    settle,
    task_totals,
    to_settle,
    unsettled_attempts,
)
from fedcompute.storage.tasks import cancel_task, create_task, get_task, pause_task

DAY = timedelta(days=1)
CHARGE = {"class": "GaussianDpEvent", "noise_multiplier": 2.0}
# Tables that grow with rounds and devices.
LARGE = (
    "iteration", "iteration_status_history", "iteration_summary", "iteration_outcome", "assignment",
    "assignment_status_history", "assignment_minute", "model_metrics", "privacy_ledger",
)  # fmt: skip


@pytest.fixture
def finish(database, now):
    """Releases a round with metrics, a noised model and noised metrics, and opens the next one; returns its key."""

    def run(key, at=now, *, opens=True, epsilon=None, **metrics):
        place = (key.population, key.task_id, key.iteration_id)
        releases = [
            Release(*place, what, "FIXED_GAUSSIAN", CHARGE, None, 0.1, 2, 2, epsilon, 1e-6)
            for what in ("model", "metrics")
            if epsilon is not None
        ]
        with database.write() as tx:
            row, task = get_iteration(tx, key), get_task(tx, key.task)
            for old, new in (
                (IterationStatus.COLLECTING, IterationStatus.AGGREGATING),
                (IterationStatus.AGGREGATING, IterationStatus.APPLYING),
            ):
                move_iteration(tx, key, old, new, at)
            following = next_iteration(task, row) if opens else None
            standing = standing_of(tx, key.population)
            assert close_and_open_next(
                tx, key, metrics=metrics, releases=releases, standing=standing, following=following, now=at
            )
        return following.key if following else None

    return run


@pytest.fixture
def ask(database):
    """What a function answers about the database as it is."""

    def run(function, *values, **options):
        with database.read() as tx:
            return function(tx, *values, **options)

    return run


def test_a_population_is_told_with_what_runs_in_it_and_what_it_released_and_spent(
    database, collecting, finish, ask, now
):
    key = collecting("b", total_iteration=9)
    key = finish(key, now + DAY, epsilon=1.5, loss=1.0)
    finish(key, now + 2 * DAY, epsilon=2.5, loss=0.5)
    ended = collecting("b", evaluates=1)
    idle = collecting("a")
    with database.write() as tx:
        assert cancel_task(tx, ended.task, now + 3 * DAY)
        set_budget(tx, "b", Budget(8.0, 1e-6, BudgetAssumption.NO_AMPLIFICATION), now)
    first, second = ask(population_overviews)
    assert (first.name, first.tasks, first.active_tasks, first.newest_task) == ("a", 1, 1, idle.task)
    assert (first.rounds_released, first.newest_release, first.last_activity) == (0, None, now)
    assert (first.epsilon, first.delta, first.budget_epsilon) == (None, None, None)
    assert (second.name, second.tasks, second.active_tasks, second.newest_task) == ("b", 2, 1, ended.task)
    assert (second.rounds_released, second.newest_release) == (2, now + 2 * DAY)
    assert second.last_activity == now + 3 * DAY
    assert (second.epsilon, second.delta, second.budget_epsilon) == (2.5, 1e-6, 8.0)


def test_populations_come_by_name_page_after_page(collecting, ask):
    for name in ("c", "a", "b", "B"):
        collecting(name)
    assert [one.name for one in ask(population_overviews, limit=2)] == ["B", "a"]
    assert [one.name for one in ask(population_overviews, after="a")] == ["b", "c"]
    assert [one.name for one in ask(population_overviews, name="b")] == ["b"]
    assert ask(population_overviews, name="d") == ask(population_overviews, after="c") == []
    assert (ask(population_names), ask(population_names, limit=1)) == (["B", "a", "b", "c"], ["B"])


def test_metrics_are_named_by_the_newest_rounds_that_have_any(collecting, finish, ask):
    key = collecting(total_iteration=99)
    assert ask(metric_names, key.task) == []
    key = finish(key, dropped=1.0, loss=1.0)
    assert ask(metric_names, key.task) == ["dropped", "loss"]
    for _ in range(19):
        key = finish(key, loss=1.0)
    assert ask(metric_names, key.task) == ["dropped", "loss"]
    key = finish(key, accuracy=0.5, loss=1.0)
    finish(collecting("others"), elsewhere=1.0)
    assert ask(metric_names, key.task) == ["accuracy", "loss"]


def test_a_series_has_the_newest_rounds_in_their_order_and_gaps_where_a_round_has_no_value(collecting, finish, ask):
    key = collecting(total_iteration=9)
    series = {1: {"loss": 4.0}, 2: {"loss": 3.0, "accuracy": 0.25}, 3: {"loss": float("nan"), "accuracy": 0.5}}
    for metrics in series.values():
        key = finish(key, **metrics)
    task, both = key.task, ["loss", "accuracy"]
    assert ask(metric_series, task, both) == {
        "loss": [(1, 4.0), (2, 3.0), (3, None)],
        "accuracy": [(2, 0.25), (3, 0.5)],
    }
    assert ask(metric_series, task, ["loss"], limit=2) == {"loss": [(2, 3.0), (3, None)]}
    assert ask(metric_series, task, ["loss"], limit=1, before=3) == {"loss": [(2, 3.0)]}
    assert ask(metric_series, task, ["none"]) == ask(metric_series, TaskKey("no", 1), ["none"]) == {"none": []}


def test_the_ledger_is_read_by_round_by_task_and_from_its_end(collecting, finish, ask):
    first, other = collecting(total_iteration=9), collecting(evaluates=1, total_iteration=9)
    second = finish(first, epsilon=1.0)
    finish(other, epsilon=2.0, opens=False)
    finish(second, epsilon=3.0)

    def shown(entries):
        return [(one.task_id, one.iteration_id, one.released) for one in entries]

    pairs = {key: [(*key, "model"), (*key, "metrics")] for key in ((1, 1), (2, 1), (1, 2))}
    assert shown(ask(round_entries, first.task, 1)) == pairs[1, 1]
    assert ask(round_entries, first.task, 3) == []
    assert shown(ask(task_entries, first.task)) == pairs[1, 1] + pairs[1, 2]
    assert shown(ask(task_entries, first.task, released="model", limit=1)) == [(1, 2, "model")]
    assert shown(ask(task_entries, first.task, before=2)) == pairs[1, 1]
    assert ask(task_entries, TaskKey("digits", 3)) == []
    assert [one.sequence for one in ask(newest_entries, "digits", limit=3)] == [6, 5, 4]
    assert [one.sequence for one in ask(newest_entries, "digits", before=4, limit=2)] == [3, 2]
    assert ask(newest_entries, "digits", before=1) == ask(newest_entries, "others") == []


def test_released_rounds_and_newest_attempts_are_those_of_every_attempt(database, collecting, finish, ask, now):
    key = finish(collecting(total_iteration=9))
    with database.write() as tx:
        again = _again(tx, key, now + DAY)
    other = collecting(evaluates=1)
    assert ask(count_released, key.task) == 1
    assert (ask(newest_round, key.task), ask(newest_round, TaskKey("no", 1))) == (2, 0)
    assert [one.key for one in ask(newest_attempts, "digits", limit=3)] == [again, other, key]
    assert [row.key for row in ask(recent_tasks, limit=9)] == [other.task, key.task]
    assert ask(recent_tasks, population="others", limit=9) == []
    finish(again)
    assert ask(count_released, key.task) == 2


def test_an_evaluation_belongs_to_the_task_that_it_measures_in_its_own_population(
    database, collecting, task_proto, ask, now
):
    training = collecting().task
    older, newer = collecting(evaluates=training.task_id).task, None
    with database.write() as tx:
        cancel_task(tx, older, now)
        newer = create_task(tx, task_proto(evaluates=training.task_id), now).key
        cancel_task(tx, newer, now)
        elsewhere = task_proto(evaluates=training.task_id)
        elsewhere.info.evaluation_info.training_population_name = "others"
        foreign = create_task(tx, elsewhere, now).key
        cancel_task(tx, foreign, now)
        create_task(tx, task_proto(evaluates=foreign.task_id), now)
    assert [row.key for row in ask(evaluations_of, training)] == [newer, older]


def _again(tx, key, at):
    from fedcompute.errors import Reason

    collecting, canceled = IterationStatus.COLLECTING, IterationStatus.CANCELED
    return open_attempt(tx, key, old=collecting, ended=canceled, into=collecting, reason=Reason.ROUND_EXPIRED, now=at)


def _budget(tx, name, at, epsilon=8.0):
    set_budget(tx, name, Budget(epsilon, 1e-6, BudgetAssumption.NO_AMPLIFICATION), at)


def test_the_version_of_a_task_changes_with_everything_that_its_page_shows(
    database, collecting, check_in, finish, ask, now
):
    key = collecting(total_iteration=9, max_aggregation_size=9)
    measuring = collecting(evaluates=key.task_id, total_iteration=9, max_aggregation_size=9, weight=0)
    seen = [ask(task_version, key.task)]

    def changes(act):
        act()
        seen.append(ask(task_version, key.task))
        assert seen[-1] not in seen[:-1]
        assert ask(task_version, key.task) == seen[-1]

    def write(function, *values):
        with database.write() as tx:
            assert function(tx, *values) is not False

    sessions = []
    changes(lambda: sessions.append(check_in().assignment.key))
    changes(lambda: sessions.append(check_in().assignment.key))
    changes(lambda: write(report_completed, sessions[0], now))
    changes(lambda: write(pause_task, key.task, now))
    changes(lambda: write(_again, key, now))
    again = IterationKey(key.population, key.task_id, 1, 1)
    changes(lambda: finish(again, epsilon=1.0, opens=False, loss=1.0))
    # A device whose round is over already.
    changes(lambda: write(time_out_computing, now + DAY, timedelta(hours=1)))
    changes(lambda: finish(measuring, opens=False, loss=1.0))
    changes(lambda: write(_budget, "digits", now))
    changes(lambda: write(_budget, "digits", now, 9.0))
    changes(lambda: write(cancel_task, key.task, now))


def test_the_version_of_a_task_stays_when_other_populations_change(database, collecting, check_in, finish, ask, now):
    key, other = collecting(), collecting("others")
    before = ask(task_version, key.task), ask(overview_version, "digits"), ask(overview_version)
    check_in("others")
    assert ask(overview_version) != before[2]
    finish(other, epsilon=1.0, opens=False)
    with database.write() as tx:
        _budget(tx, "others", now)
    assert (ask(task_version, key.task), ask(overview_version, "digits")) == before[:2]


def test_the_version_of_a_list_changes_with_tasks_rounds_devices_and_budgets(
    database, collecting, check_in, finish, ask, now
):
    seen = [(ask(overview_version), ask(overview_version, "digits"))]

    def changed():
        seen.append((ask(overview_version), ask(overview_version, "digits")))
        return all(seen[-1][which] not in [one[which] for one in seen[:-1]] for which in (0, 1))

    key = collecting(total_iteration=9)
    assert changed()
    device = check_in().assignment.key
    assert changed()
    with database.write() as tx:
        assert report_failed(tx, device, AssignmentStatus.LOCAL_FAILED, now)
    assert changed()
    finish(key, loss=1.0)
    assert changed()
    with database.write() as tx:
        _budget(tx, "digits", now)
    assert changed()
    with database.write() as tx:
        assert remove_budget(tx, "digits")
        assert pause_task(tx, key.task, now)
    assert changed()
    with database.write() as tx:
        assert cancel_task(tx, key.task, now)
    assert changed()


@pytest.mark.parametrize("is_settled", [False, True])
def test_no_question_of_a_page_reads_a_large_table_from_end_to_end(
    database, database_url, collecting, uploaded, finish, ask, now, is_settled
):
    key = collecting(total_iteration=9)
    uploaded(key, 3)
    following = finish(key, epsilon=1.0, loss=1.0)
    if is_settled:
        with database.write() as tx:
            assert settle(tx, key, now)
    asked = {}

    def note(connection, cursor, statement, parameters, *_):
        asked[statement] = parameters

    questions = [
        (round_summaries, key.task),
        (round_attempts, key.task, 1),
        (round_timeline, key),
        (arrivals_of_round, key.task, 1),
        (task_totals, key.task),
        (assignments_per_minute, [key.task], now - DAY, now + DAY),
        (unsettled_attempts, [key.task]),
        (to_settle,),
        (population_overviews,),
        (metric_names, key.task),
        (metric_series, key.task, ["loss"]),
        (task_version, key.task),
        (overview_version,),
        (overview_version, "digits"),
        (evaluations_of, key.task),
        (count_released, key.task),
        (lambda tx: newest_attempts(tx, "digits", limit=9),),
        (newest_round, key.task),
        (round_entries, key.task, 1),
        (newest_entries, "digits"),
        (task_entries, key.task),
    ]
    event.listen(Engine, "before_cursor_execute", note)
    try:
        for question, *values in questions:
            ask(question, *values)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    asked = {statement: values for statement, values in asked.items() if statement.lstrip().startswith("SELECT")}
    assert len(asked) > len(questions)
    assert following is not None
    with database.read() as tx:
        is_sqlite = database_url.startswith("sqlite")
        # The index of rounds that are not summed up has few entries, whatever there was.
        if not is_sqlite:
            # Reading everything is the cheapest way to read next to nothing.
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, values in asked.items():
            plan = tx.exec_driver_sql(f"EXPLAIN {'QUERY PLAN ' if is_sqlite else ''}{statement}", values)
            steps = [row.detail if is_sqlite else row[0] for row in plan]
            large = re.compile(rf"(^SCAN|Seq Scan on) ({'|'.join(LARGE)})\b(?! USING INDEX ix_iteration_unsettled)")
            whole = [one for one in steps if large.search(one)]
            assert not whole, (statement, whole)
