"""Steps of a second round engine that works from what it read before the first one moved on."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.context import Uploads, now
from fedcompute.server.rounds.aggregate import aggregate
from fedcompute.server.rounds.attempts import batch_failed, update_failed
from fedcompute.server.rounds.collect import collect, finish_aggregating, run_batches
from fedcompute.server.rounds.jobs import Jobs
from fedcompute.server.rounds.update import update
from fedcompute.storage import schema
from fedcompute.storage.assignments import cancel_unused, count_assignments, unbatched
from fedcompute.storage.batches import list_batches
from fedcompute.storage.database import Database, lock_population
from fedcompute.storage.iterations import get_iteration
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.paths import updates_prefix
from fedcompute.storage.schema import AssignmentStatus, BatchStatus, IterationStatus
from fedcompute.storage.tasks import cancel_task


@pytest.fixture(params=["sqlite", "postgresql"])
def start(request, run_server, make_gate):
    """Starts a server whose jobs of one kind do not end; returns it, its gate, and a second engine's context.

    The second has what another process would have: its own connections, jobs and uploads that it alone has seen.
    """
    changes = {"database_url": request.getfixturevalue("postgresql_url")} if request.param == "postgresql" else {}
    opened = []

    def run(held):
        gate = make_gate(held)
        running = run_server(executor=gate, **changes)
        opened.append(Database.open(running.settings.database))
        done = threading.Event()
        jobs = Jobs(make_gate(None), 1, done.set)
        second = replace(running.app.state.context, database=opened[-1], jobs=jobs, uploads=Uploads())
        return running, gate, second, done

    yield run
    for one in opened:
        one.close()


def reported(api, population):
    assignment = api.assignment(population)
    assert api.upload_instruction(assignment).upload_location
    return assignment.assignment_id


def body_of(api, hand_made, process):
    return api.seal(hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]))


def row_of(context, key):
    with context.database.read() as tx:
        return get_iteration(tx, key)


def test_an_engine_with_a_stale_row_adds_no_batch_to_a_round_that_has_closed(start, hand_made):
    running, gate, second, _ = start(update)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("stale", process, goal=1, room=3)
    key = IterationKey("stale", task_id, 1)
    second.uploads.add(session := reported(api, "stale"), updates_prefix(key.task, 1))
    collecting = row_of(second, key)
    api.contribute("stale", body=body_of(api, hand_made, process))
    api.wait_for("stale", task_id, "APPLYING", iteration=1)
    assert not collect(second, collecting)
    with second.database.read() as tx:
        assert [one.batch_size for one in list_batches(tx, key)] == [1]
        assert unbatched(tx, key) == []
    # Not forgotten: a round may collect again.
    assert second.uploads.all() == {session}
    gate.opened.set()
    found = api.wait_for("stale", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 1, "CANCELED": 1}


def test_an_engine_that_meets_the_end_of_a_round_waits_for_it_and_then_adds_nothing(start, hand_made):
    running, _, second, _ = start(None)
    task_id = running.api.open_task("ended", hand_made.process_of(), goal=1, room=3)
    key = IterationKey("ended", task_id, 1)
    second.uploads.add(reported(running.api, "ended"), updates_prefix(key.task, 1))
    collecting = row_of(second, key)
    with ThreadPoolExecutor(1) as other:
        with running.app.state.context.database.write() as tx:
            lock_population(tx, "ended")
            late = other.submit(collect, second, collecting)
            # Time for it to take whatever lock it takes before it waits for this one.
            time.sleep(0.3)
            assert not late.done()
            assert cancel_unused(tx, key, now()) == 1
            assert cancel_task(tx, key.task, now())
        assert late.result(30) is False
    with second.database.read() as tx:
        assert list_batches(tx, key) == []
        assert count_assignments(tx, key)[AssignmentStatus.CANCELED] == 1


def test_a_sum_that_is_ready_after_its_round_has_ended_is_not_recorded(start, hand_made):
    running, _, second, done = start(aggregate)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("late", process, goal=1, room=1)
    key = IterationKey("late", task_id, 1)
    api.contribute("late", body=body_of(api, hand_made, process))
    api.wait_for("late", task_id, "AGGREGATING", iteration=1)
    aggregating = row_of(second, key)
    assert not run_batches(second, aggregating)
    assert done.wait(30)
    with second.database.write() as tx:
        assert cancel_task(tx, key.task, now())
    assert not finish_aggregating(second, aggregating)
    with second.database.read() as tx:
        (batch,) = list_batches(tx, key)
    assert (batch.status, batch.accepted_size) == (BatchStatus.PUBLISH_COMPLETED, None)


def test_a_failure_that_is_told_after_its_round_has_gone_on_changes_nothing(start, hand_made):
    running, gate, second, _ = start(aggregate)
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("told", process, goal=1, room=1)
    key = IterationKey("told", task_id, 1)
    api.contribute("told", body=body_of(api, hand_made, process))
    api.wait_for("told", task_id, "AGGREGATING", iteration=1)
    aggregating = row_of(second, key)
    with second.database.read() as tx:
        (batch,) = list_batches(tx, key)
    gate.opened.set()
    before = api.wait_for("told", task_id, "COMPLETED")
    error = OperationFailed(Reason.INTERNAL, "the machine is on fire")
    assert not batch_failed(second, aggregating, batch, error)
    assert not update_failed(second, replace(aggregating, status=IterationStatus.APPLYING), error)
    assert api.task("told", task_id) == before
    with second.database.read() as tx:
        history = tx.execute(schema.iteration_status_history.select()).all()
    assert [row.status for row in sorted(history, key=lambda row: row.status_id)] == [0, 1, 4, 50]
