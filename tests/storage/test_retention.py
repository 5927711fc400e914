"""What counts as old, on both kinds of database; `tests/server/test_retention.py` removes it for real."""

from datetime import timedelta

import pytest

from fedcompute.errors import Reason
from fedcompute.storage import retention, schema
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.iterations import (
    close_and_open_next,
    create_iteration,
    get_iteration,
    move_iteration,
    next_iteration,
)
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import IterationStatus
from fedcompute.storage.summaries import settle
from fedcompute.storage.tasks import (
    cancel_task,
    create_task,
    fail_task,
    get_task,
    open_task,
    pause_task,
)

DAY = timedelta(days=1)


@pytest.fixture
def finish(database, now):
    """Releases a round of a training task, or completes one of an evaluation, and opens the next one."""

    def run(key, at=now, *, opens=True):
        with database.write() as tx:
            row, task = get_iteration(tx, key), get_task(tx, key.task)
            if row.status is IterationStatus.COLLECTING:
                move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, at)
                move_iteration(tx, key, IterationStatus.AGGREGATING, IterationStatus.APPLYING, at)
            following = next_iteration(task, row) if task.is_training and opens else None
            assert close_and_open_next(
                tx, key, metrics={"loss": 1.0}, releases=[], standing=None, following=following, now=at
            )
        return following.key if following else None

    return run


@pytest.fixture
def evaluate(database, task_proto, now):
    """Opens an evaluation, of a population of its own or not, that measures a training round."""

    def start(training, population="others"):
        with database.write() as tx:
            proto = task_proto(population, evaluates=training.task_id)
            proto.info.evaluation_info.training_population_name = training.population
            key = create_task(tx, proto, now).key
            assert open_task(tx, key, now)
            new = next_iteration(get_task(tx, key), None, training_iteration_id=training.iteration_id)
            assert create_iteration(tx, new, now)
        return new.key

    return start


def settled(database, before):
    with database.read() as tx:
        return [(str(one), one.released) for one in retention.settled_rounds(tx, before)]


def old(database, before, keep_newest=1):
    with database.read() as tx:
        return [one.iteration_id for one in retention.old_checkpoints(tx, before, keep_newest)]


def clean(database, before, now):
    with database.write() as tx:
        for one in retention.settled_rounds(tx, before):
            retention.mark_cleaned(tx, one, now)


def test_a_released_round_is_settled_at_the_given_age_and_only_once(database, collecting, finish, now):
    key = collecting()
    finish(key)
    assert settled(database, now - timedelta(microseconds=1)) == []
    assert settled(database, now) == [("digits/1/1", True)]
    clean(database, now, now + DAY)
    assert settled(database, now + 9 * DAY) == []


def test_a_round_under_way_is_never_settled_and_a_paused_task_keeps_its_rounds(database, collecting, applying, now):
    waiting, computing = collecting("a"), applying(population="b")
    with database.write() as tx:
        assert pause_task(tx, waiting.task, now)
        assert pause_task(tx, computing.task, now)
    assert settled(database, now + 999 * DAY) == []


def test_a_failed_attempt_keeps_its_uploads_until_another_attempt_is_released(database, applying, finish, now):
    key = applying()
    with database.write() as tx:
        again = open_attempt(
            tx,
            key,
            old=IterationStatus.APPLYING,
            ended=IterationStatus.APPLYING_FAILED,
            into=IterationStatus.APPLYING,
            reason=Reason.INTERNAL,
            now=now,
        )
    assert settled(database, now + DAY) == []
    finish(again, now + DAY)
    assert settled(database, now) == []
    assert settled(database, now + DAY) == [("digits/1/1", True)]
    clean(database, now + DAY, now + 2 * DAY)
    with database.read() as tx:
        times = tx.execute(schema.iteration.select().where(schema.iteration.c.iteration_id == 1)).all()
    assert [row.cleaned_time for row in times] == [now + 2 * DAY] * 2


def test_a_round_that_failed_while_its_task_goes_on_may_be_tried_again_and_keeps_its_uploads(database, applying, now):
    key = applying()
    with database.write() as tx:
        move_iteration(tx, key, IterationStatus.APPLYING, IterationStatus.APPLYING_FAILED, now)
    assert settled(database, now + 9 * DAY) == []
    with database.write() as tx:
        fail_task(tx, key.task, now + DAY)
    assert settled(database, now) == []
    assert settled(database, now + DAY) == [("digits/1/1", False)]


@pytest.mark.parametrize("end", [cancel_task, fail_task])
def test_rounds_of_a_task_that_ended_early_are_settled_as_not_released(database, collecting, end, now):
    key = collecting()
    with database.write() as tx:
        assert end(tx, key.task, now + DAY)
    assert settled(database, now) == []
    assert settled(database, now + DAY) == [("digits/1/1", False)]


def test_the_newest_checkpoints_and_the_one_that_the_next_round_starts_from_stay(database, collecting, finish, now):
    key = collecting(total_iteration=9)
    for _ in range(5):
        key = finish(key)
    assert old(database, now + DAY) == []  # uploads go first
    clean(database, now, now)
    assert old(database, now - DAY) == []
    assert old(database, now, keep_newest=2) == [1, 2, 3]
    assert old(database, now, keep_newest=1) == [1, 2, 3, 4]
    assert old(database, now, keep_newest=9) == []
    with database.write() as tx:
        # Rounds that overlap may start from an older one.
        tx.execute(schema.iteration.update().where(schema.iteration.c.iteration_id == 6).values(base_on_result_id=2))
    assert old(database, now) == [1, 3, 4]


def test_a_round_that_a_later_attempt_released_holds_no_checkpoint_back(database, applying, finish, now):
    key = finish(applying(total_iteration=9))
    with database.write() as tx:
        move_iteration(tx, key, IterationStatus.COLLECTING, IterationStatus.APPLYING, now)
        again = open_attempt(
            tx,
            key,
            old=IterationStatus.APPLYING,
            ended=IterationStatus.APPLYING_FAILED,
            into=IterationStatus.APPLYING,
            reason=Reason.INTERNAL,
            now=now,
        )
    clean(database, now, now)
    assert old(database, now) == []
    key = finish(again)
    assert old(database, now) == [1]
    finish(key)
    clean(database, now, now)
    assert old(database, now) == [1, 2]


def test_a_checkpoint_that_an_evaluation_measures_stays_until_it_is_over(database, collecting, finish, evaluate, now):
    key = collecting(total_iteration=9)
    first = key
    for _ in range(3):
        key = finish(key)
    measuring = evaluate(first)
    clean(database, now, now)
    assert old(database, now) == [2]
    (one,) = [one for one in _rounds(database, now) if one.iteration_id == 2]
    with database.write() as tx:
        assert not retention.give_up_checkpoint(tx, _as(one, 1), now)
        assert retention.give_up_checkpoint(tx, one, now)
        assert not retention.give_up_checkpoint(tx, one, now)
    finish(measuring, opens=False)
    assert old(database, now) == [1]


def _rounds(database, now):
    with database.read() as tx:
        return retention.old_checkpoints(tx, now, 1)


def _as(one, iteration_id):
    return retention.Round(one.task, iteration_id, iteration_id, one.is_training, one.released)


def test_a_checkpoint_that_was_given_up_is_no_candidate_and_is_finished_after_a_kill(database, collecting, finish, now):
    from fedcompute.storage.releases import completed_iterations

    key = collecting(total_iteration=9)
    for _ in range(3):
        key = finish(key)
    clean(database, now, now)
    with database.write() as tx:
        for one in retention.old_checkpoints(tx, now, 1):
            assert retention.give_up_checkpoint(tx, one, now + DAY)
    with database.read() as tx:
        assert [one.iteration_id for one in completed_iterations(tx, key.task)] == [1, 2, 3]
        assert [one.iteration_id for one in completed_iterations(tx, key.task, stored=True)] == [3]
        pending = retention.given_up_checkpoints(tx)
    assert [one.iteration_id for one in pending] == [1, 2]
    with database.write() as tx:
        assert not retention.claim_checkpoint(tx, key.task, 1)
        assert retention.claim_checkpoint(tx, key.task, 3)
        assert not retention.claim_checkpoint(tx, key.task, 4)
        retention.mark_cleaned(tx, pending[0], now + DAY)
        assert [one.iteration_id for one in retention.given_up_checkpoints(tx)] == [2]


def test_of_a_purge_and_an_evaluation_that_race_for_a_checkpoint_one_loses(
    database, collecting, finish, evaluate, task_proto, race, now
):
    from fedcompute.storage.database import lock_population

    key = collecting(total_iteration=99)
    first = key
    for _ in range(12):
        key = finish(key)
    clean(database, now, now)
    with database.write() as tx:
        proto = task_proto("others", evaluates=first.task_id, total_iteration=99)
        proto.info.evaluation_info.training_population_name = "digits"
        evaluation = create_task(tx, proto, now).key
        open_task(tx, evaluation, now)
    candidates = _rounds(database, now)
    assert len(candidates) == 11

    for number, one in enumerate(candidates):

        def work(opened, index, one=one, number=number):
            with opened.write() as tx:
                if index:
                    return retention.give_up_checkpoint(tx, one, now)
                lock_population(tx, "others")
                if not retention.claim_checkpoint(tx, one.task, one.iteration_id):
                    return False
                row = get_task(tx, evaluation)
                new = next_iteration(row, None, training_iteration_id=one.iteration_id)
                key = type(new.key)("others", evaluation.task_id, number + 1)
                return create_iteration(tx, type(new)(**{**vars(new), "key": key}), now)

        assert sorted(race(2, work)) == [False, True]


def test_assignments_and_batches_of_a_task_go_long_after_its_end_and_its_rounds_and_metrics_stay(
    database, collecting, uploaded, published, finish, now
):
    from fedcompute.storage.releases import metrics_of

    key = collecting(total_iteration=1, max_aggregation_size=9)
    other = collecting("others", max_aggregation_size=9)
    published(key, uploaded(key, 3))
    published(other, uploaded(other, 2))
    finish(key, opens=False)
    with database.write() as tx:
        assert get_task(tx, key.task).status.name == "COMPLETED"
        assert retention.old_tasks(tx, now) == []  # what became of the devices is not summed up
        assert settle(tx, key, now)
        assert retention.old_tasks(tx, now - DAY) == []
        assert retention.old_tasks(tx, now) == [TaskKey("digits", 1)]
        assert retention.count_devices(tx, key.task) == 3
        assert retention.forget_devices(tx, key.task, limit=2) == 2
        assert retention.forget_devices(tx, key.task, limit=2) == 1
        assert retention.old_tasks(tx, now) == [TaskKey("digits", 1)]
        assert retention.forget_devices(tx, key.task) == 1
        assert retention.forget_devices(tx, key.task) == 0
        assert retention.old_tasks(tx, now + 999 * DAY) == []
        for table in (schema.assignment, schema.assignment_status_history, schema.aggregation_batch):
            assert {row.population_name for row in tx.execute(table.select())} == {"others"}
        assert get_iteration(tx, key).status is IterationStatus.COMPLETED
        assert [one.name for one in metrics_of(tx, key.task)] == ["loss"]
