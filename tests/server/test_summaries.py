"""The engine sums rounds up once nothing about them changes any more; `tests/storage` has the sums themselves."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from fedcompute.protos.task_assignments_pb2 import ReportResultRequest
from fedcompute.server.context import now
from fedcompute.server.rounds.summarize import summarize
from fedcompute.storage import schema, transitions
from fedcompute.storage.database import Database
from fedcompute.storage.iterations import create_iteration, move_iteration, next_iteration
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.summaries import assignments_per_minute, task_totals, unsettled_attempts
from fedcompute.storage.tasks import cancel_task, get_task, open_task

HOUR = timedelta(hours=1)
ROUNDS, DEVICES = 45, 2


def unsettled(context, key):
    with context.database.read() as tx:
        return [(one.iteration_id, one.attempt_id) for one in unsettled_attempts(tx, [key])]


def totals(context, key):
    with context.database.read() as tx:
        return {status.name: count for status, count in task_totals(tx, key).assignments.items()}


def arrivals(context, key):
    with context.database.read() as tx:
        found = assignments_per_minute(tx, [key], now() - HOUR, now() + HOUR)
    return {status.name: sum(count for _, count in counts) for status, counts in found.items()}


def test_a_round_is_summed_up_after_its_last_device_and_tells_the_same_before_and_after(run_server, hand_made):
    running = run_server()
    api, context, process = running.api, running.app.state.context, hand_made.process_of()
    task_id = api.open_task("late", process, goal=1, room=3)
    key = TaskKey("late", task_id)
    computing = api.assignment("late")
    api.contribute("late", hand_made.update_of(process, [leaf * 0 for leaf in hand_made.initial]))
    api.wait_for("late", task_id, "COMPLETED")
    assert not summarize(context)
    assert unsettled(context, key) == [(1, 0)]
    assert totals(context, key) == {"ASSIGNED": 1, "UPLOAD_COMPLETED": 1}

    assert api.report(computing, ReportResultRequest.NOT_ELIGIBLE).status_code == 200
    ended = {"UPLOAD_COMPLETED": 1, "LOCAL_NOT_ELIGIBLE": 1}
    assert totals(context, key) == ended
    before = api.task("late", task_id)
    api.wait(lambda: not unsettled(context, key))
    assert api.task("late", task_id) == before
    assert totals(context, key) == ended
    assert arrivals(context, key) == {"ASSIGNED": 2, "LOCAL_COMPLETED": 1, **ended}


def test_a_device_that_never_comes_back_does_not_keep_its_round_from_being_summed_up(run_server, hand_made):
    running = run_server(local_compute_timeout=0.2)
    api, context, process = running.api, running.app.state.context, hand_made.process_of()
    task_id = api.open_task("gone", process, goal=1, room=3)
    api.assignment("gone")
    url = f"{api.url}/taskmanagement/v1/population/gone/tasks/{task_id}:cancel"
    assert api.http.post(url).status_code == 200
    api.wait(lambda: not unsettled(context, TaskKey("gone", task_id)))
    assert totals(context, TaskKey("gone", task_id)) == {"LOCAL_TIMEOUT": 1}


@pytest.fixture
def unnoticed(run_server, postgresql_url):
    """A server without an engine, and a task whose rounds nobody summed up when they ended, as of an older release."""
    running = run_server(roles=("api",), database_url=postgresql_url)
    task_id = running.api.create_task("older", goal=1, rounds=ROUNDS).task_id
    context, key = running.app.state.context, TaskKey("older", task_id)
    with context.database.write() as tx:
        assert open_task(tx, key, now())
        new = next_iteration(get_task(tx, key), None)
        for number in range(1, ROUNDS + 1):
            mine = IterationKey("older", task_id, number)
            assert create_iteration(tx, replace(new, key=mine), now())
            place = dict(zip(schema.ITERATION_COLUMNS, ("older", task_id, number, 0), strict=True))
            devices = [{**place, "session_id": f"{number}-{device}", "correlation_id": ""} for device in range(DEVICES)]
            transitions.enter_all(tx, transitions.ASSIGNMENT, devices, AssignmentStatus.LOCAL_FAILED, now())
            assert move_iteration(tx, mine, IterationStatus.COLLECTING, IterationStatus.CANCELED, now())
        assert cancel_task(tx, key, now())
    return running, key


def test_engines_catch_up_with_old_rounds_a_few_at_a_time_and_count_each_device_once(unnoticed):
    running, key = unnoticed
    context = running.app.state.context
    others = [replace(context, database=Database.open(running.settings.database)) for _ in range(2)]
    try:
        assert len(unsettled(context, key)) == ROUNDS
        assert summarize(others[0])
        assert ROUNDS / 4 < len(unsettled(context, key)) < ROUNDS
        with ThreadPoolExecutor(2) as pool:
            while unsettled(context, key):
                list(pool.map(summarize, others))
    finally:
        for one in others:
            one.database.close()
    assert totals(context, key) == arrivals(context, key) == {"LOCAL_FAILED": ROUNDS * DEVICES}
    with context.database.read() as tx:
        assert tx.execute(select(func.count()).select_from(schema.iteration_summary)).scalar_one() == ROUNDS
