from datetime import timedelta

import pytest
from sqlalchemy import Select

from fedcompute.errors import Reason, RequestRejected
from fedcompute.protos import task_pb2
from fedcompute.storage import schema
from fedcompute.storage.assignments import list_assignments, report_completed
from fedcompute.storage.iterations import (
    create_iteration,
    get_iteration,
    iterations_of,
    list_iterations,
    next_iteration,
)
from fedcompute.storage.keys import AssignmentKey, BatchKey, IterationKey, TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, AssignmentStatus, IterationStatus, TaskKind, TaskStatus
from fedcompute.storage.tasks import (
    cancel_task,
    complete_task,
    create_task,
    fail_task,
    get_task,
    list_tasks,
    open_task,
    pause_task,
    resume_task,
    task_message,
)


def test_keys_print_as_the_ids_of_the_protocol_and_sort():
    iteration = IterationKey("p:1", 2, 3)
    assert str(iteration.task) == "p:1/2"
    assert str(iteration) == "p:1/2/3/0"
    assert str(AssignmentKey(iteration, "s")) == "p:1/2/3/0/s"
    assert str(BatchKey(iteration, "b")) == "p:1/2/3/0/b"
    assert sorted([TaskKey("p", 10), TaskKey("p", 9)])[0].task_id == 9


def test_a_task_comes_back_as_it_was_created(database, task_proto, now):
    sent = task_proto("a:population.1", max_parallel=4, correlation_id="mine")
    sent.info.training_info.eligibility_task_info.eligibility_policies.add().min_sep_policy.minimum_separation = 2**40
    sent.do_not_create_iteration_after.FromDatetime(now + timedelta(days=1))
    with database.write() as tx:
        key = create_task(tx, sent, now).key
        row = get_task(tx, key)
    message = task_message(row)
    assert message.created_time.ToDatetime(tzinfo=now.tzinfo) == now
    sent.task_id = 1
    sent.status = task_pb2.TaskStatus.CREATED
    sent.created_time.CopyFrom(message.created_time)
    assert message == sent


def test_a_task_without_info_trains_with_weight_one(database, task_proto, now):
    sent = task_proto()
    sent.ClearField("info")
    with database.write() as tx:
        row = create_task(tx, sent, now)
    assert row.kind is TaskKind.TRAINING
    assert row.info.traffic_weight == 1


def test_ids_are_counted_per_population_over_both_kinds(database, task_proto, now):
    with database.write() as tx:
        ids = [
            create_task(tx, proto, now).key.task_id
            for proto in (task_proto("a"), task_proto("a", evaluates=1), task_proto("b"))
        ]
    assert ids == [1, 2, 1]


@pytest.mark.parametrize("end", [cancel_task, fail_task, complete_task])
def test_one_active_task_of_a_kind_and_the_next_after_its_end(database, task_proto, now, end):
    with database.write() as tx:
        key = create_task(tx, task_proto(), now).key
        for _ in range(2):
            with pytest.raises(RequestRejected) as caught:
                create_task(tx, task_proto(), now)
            assert caught.value.reason is Reason.TASK_CONFLICT
            open_task(tx, key, now)
        assert end(tx, key, now)
        assert create_task(tx, task_proto(), now).key.task_id == 2


def test_the_database_itself_refuses_a_second_active_task_of_a_kind(database, task_proto, now):
    with database.write() as tx:
        create_task(tx, task_proto(), now)
        with pytest.raises(RequestRejected) as caught:
            create_task(_BlindToTasks(tx), task_proto(), now)
        assert caught.value.reason is Reason.TASK_CONFLICT
        assert len(list_tasks(tx)) == 1


class _BlindToTasks:
    """A transaction that asked for active tasks too early; a stand-in because no real one can: they take turns."""

    def __init__(self, tx):
        self._tx = tx
        self._asked = False
        self.dialect = tx.dialect

    def execute(self, statement, *args):
        if self._asked or not isinstance(statement, Select):
            return self._tx.execute(statement, *args)
        self._asked = True
        return self._tx.execute(schema.task.select().where(schema.task.c.population_name == "nobody"))

    def begin_nested(self):
        return self._tx.begin_nested()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"population": ""}, "population_name"),
        ({"population": "p" * 65}, "65 characters"),
        ({"population": "a/b"}, "population_name"),
        ({"population": "   "}, "population_name"),
        ({"population": ".."}, "population_name"),
        ({"population": "a%2Fb"}, "population_name"),
        ({"total_iteration": 0}, "total_iteration"),
        ({"min_aggregation_size": 0}, "min_aggregation_size"),
        ({"max_aggregation_size": -1}, "max_aggregation_size"),
        ({"min_aggregation_size": 6}, "below the minimum"),
        ({"min_client_version": ""}, "min_client_version"),
        ({"max_client_version": "1.2"}, "max_client_version"),
        ({"max_client_version": str(2**63)}, "max_client_version"),
        ({"min_client_version": "10", "max_client_version": "9"}, "min_client_version 10"),
        ({"weight": -1}, "traffic_weight"),
        ({"evaluates": 0}, "training_task_id"),
        ({"status": task_pb2.TaskStatus.COMPLETED}, "status"),
    ],
)
def test_a_task_that_could_not_run_is_refused_with_the_field_named(database, task_proto, now, fields, problem):
    with database.write() as tx:
        with pytest.raises(RequestRejected, match=problem) as caught:
            create_task(tx, task_proto(**fields), now)
        assert caught.value.reason is Reason.TASK_INVALID
        assert list_tasks(tx) == []


def test_a_task_of_no_kind_or_with_an_empty_selector_is_refused(database, task_proto, now):
    kindless, unselected, zero = task_proto(), task_proto(evaluates=1), task_proto(evaluates=1)
    kindless.info.ClearField("training_info")
    unselected.info.evaluation_info.ClearField("check_point_selector")
    zero.info.evaluation_info.check_point_selector.duration_selector.hours = 0
    with database.write() as tx:
        for proto in (kindless, unselected, zero):
            with pytest.raises(RequestRejected, match=r"neither|selector"):
                create_task(tx, proto, now)


def test_all_problems_are_listed_at_once(database, task_proto, now):
    with database.write() as tx, pytest.raises(RequestRejected) as caught:
        create_task(tx, task_proto(population="", total_iteration=0, max_client_version="x"), now)
    assert caught.value.detail.count(";") == 2


def test_transitions_ask_for_the_old_status_and_write_history_from_zero(database, task_proto, now):
    later = now + timedelta(hours=1)
    with database.write() as tx:
        key = create_task(tx, task_proto(), now).key
        assert not complete_task(tx, key, now)
        assert open_task(tx, key, now)
        assert not open_task(tx, key, now)
        assert complete_task(tx, key, later)
        assert not fail_task(tx, key, later)
        assert not cancel_task(tx, key, later)
        assert not cancel_task(tx, TaskKey("nobody", 1), later)
        row = get_task(tx, key)
        history = tx.execute(schema.task_status_history.select().order_by("status_id")).all()
    assert (row.status, row.started, row.stopped) == (TaskStatus.COMPLETED, now, later)
    assert [(entry.status_id, entry.status) for entry in history] == [(0, 2), (1, 0), (2, 1)]
    assert [entry.created_time for entry in history] == [now, now, later]


def test_a_task_is_paused_and_resumed_as_often_as_wanted_each_time_once_and_in_history(database, task_proto, now):
    with database.write() as tx:
        key = create_task(tx, task_proto(), now).key
        assert not pause_task(tx, key, now)
        assert open_task(tx, key, now)
        for _ in range(2):
            assert not resume_task(tx, key, now)
            assert pause_task(tx, key, now)
            assert not pause_task(tx, key, now)
            assert get_task(tx, key).status is TaskStatus.PAUSED
            assert resume_task(tx, key, now)
        assert (get_task(tx, key).status, get_task(tx, key).stopped) == (TaskStatus.OPEN, None)
        history = tx.execute(schema.task_status_history.select().order_by("status_id")).all()
    assert [(entry.status_id, entry.status) for entry in history] == [(0, 2), (1, 0), (2, 3), (3, 0), (4, 3), (5, 0)]


@pytest.mark.parametrize("end", [cancel_task, fail_task, complete_task])
def test_a_paused_task_is_active_and_every_end_is_open_to_it(database, task_proto, now, end):
    with database.write() as tx:
        key = create_task(tx, task_proto(), now).key
        assert open_task(tx, key, now)
        assert pause_task(tx, key, now)
        with pytest.raises(RequestRejected) as caught:
            create_task(tx, task_proto(), now)
        assert caught.value.reason is Reason.TASK_CONFLICT
        assert task_message(get_task(tx, key)).status == task_pb2.TaskStatus.PAUSED == 6
        assert not complete_task(tx, key, now, statuses=[TaskStatus.OPEN])
        assert end(tx, key, now)
        assert not resume_task(tx, key, now)
        assert not pause_task(tx, key, now)
        assert get_task(tx, key).stopped == now


@pytest.mark.parametrize("end", [cancel_task, fail_task])
def test_ending_a_task_ends_its_active_iteration(database, applying, now, end):
    key = applying()
    with database.write() as tx:
        assert end(tx, key.task, now)
        assert get_iteration(tx, key).status is IterationStatus.CANCELED
        assert list_iterations(tx, statuses=ACTIVE_ITERATION) == []


def test_lists_are_filtered_and_paged(database, task_proto, now):
    with database.write() as tx:
        for population in ("a", "b", "c"):
            create_task(tx, task_proto(population), now)
        open_task(tx, TaskKey("b", 1), now)
        first = list_tasks(tx, limit=2)
        assert [row.key.population for row in first] == ["a", "b"]
        assert [row.key.population for row in list_tasks(tx, after=first[-1].key)] == ["c"]
        assert [row.key.population for row in list_tasks(tx, statuses=[TaskStatus.OPEN])] == ["b"]
        assert [row.key.population for row in list_tasks(tx, population="c")] == ["c"]


def test_names_sort_by_the_codes_of_their_characters_whatever_the_order_of_the_database_is(database, task_proto, now):
    names = ["-", "B", "_", "a", "b"]
    with database.write() as tx:
        for population in reversed(names):
            create_task(tx, task_proto(population), now)
        assert [row.key.population for row in list_tasks(tx)] == names
        assert [row.key.population for row in list_tasks(tx, after=TaskKey("B", 1))] == names[2:]


def test_text_with_a_nul_is_no_failure_of_the_database(database, task_proto, now):
    with database.write() as tx:
        key = create_task(tx, task_proto(correlation_id="a\0b"), now).key
        assert get_task(tx, key).correlation_id == "a\ufffdb"
        assert get_task(tx, TaskKey("digits\0", 1)) is None
        assert list_tasks(tx, population="\0") == []


def test_what_rounds_under_way_no_longer_need_ends_with_their_task(
    database, collecting, uploaded, published, check_in, now
):
    first = collecting("p", max_parallel=2, max_aggregation_size=3)
    batched, loose, _ = uploaded(first, 3)
    published(first, [batched])
    with database.write() as tx:
        task = get_task(tx, first.task)
        assert create_iteration(tx, next_iteration(task, get_iteration(tx, first), released=0), now)
    working, uploading = check_in("p").assignment, check_in("p").assignment
    with database.write() as tx:
        assert report_completed(tx, uploading.key, now)
        assert complete_task(tx, first.task, now, reason=Reason.BUDGET_SPENT)
        second = working.key.iteration
        assert {one.status for one in iterations_of(tx, first.task)} == {IterationStatus.CANCELED}
        found = {row.key.session_id: row.status for key in (first, second) for row in list_assignments(tx, key)}
    assert found[batched] is AssignmentStatus.UPLOAD_COMPLETED
    assert found[loose] is found[uploading.key.session_id] is AssignmentStatus.CANCELED
    # Its report or its time-out tells how it fared.
    assert found[working.key.session_id] is AssignmentStatus.ASSIGNED
