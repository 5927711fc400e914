"""Which checkpoint an evaluation measures when some are old, given up or lost."""

from datetime import timedelta

import numpy as np
import pytest

from fedcompute.protos import task_pb2
from fedcompute.server.context import now
from fedcompute.server.retention import Retention
from fedcompute.storage import schema


@pytest.fixture
def trained(run_server, hand_made):
    """A server with a training task of three released rounds."""

    def start(**settings):
        server = run_server(**{"retention_period": 0.0, **settings})
        process = hand_made.process_of()
        task_id = server.api.open_task("trained", process, goal=1, rounds=3, room=1)
        for number in (1, 2, 3):
            deltas = [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]
            server.api.contribute("trained", hand_made.update_of(process, deltas))
            server.api.wait_for("trained", task_id, "COMPLETED", iteration=number)
        return server, process, task_id

    return start


@pytest.fixture
def measured(hand_made):
    """Runs an evaluation of so many rounds; returns the training rounds that it measured."""

    def run(server, process, trained, rounds=3):
        evaluation = hand_made.evaluation_of(process, ["sparse_categorical_accuracy"])
        info = task_pb2.TaskInfo(traffic_weight=1)
        info.evaluation_info.training_population_name = "trained"
        info.evaluation_info.training_task_id = trained
        info.evaluation_info.check_point_selector.iteration_selector.size = 1
        task_id = server.api.open_task("measuring", evaluation, goal=1, rounds=rounds, room=1, info=info)
        leaves = hand_made.update_of(evaluation, [], metrics=(3, 4, 1, 4))
        for number in range(1, rounds + 1):
            server.api.contribute("measuring", leaves)
            server.api.wait_for("measuring", task_id, "COMPLETED", iteration=number)
        found = server.api.task("measuring", task_id)
        return [one["evaluated_iteration_id"] for one in found["iterations"]]

    return run


def test_every_stored_checkpoint_is_measured_before_one_is_measured_again(trained, measured):
    assert sorted(measured(*trained())) == [1, 2, 3]


def test_a_checkpoint_that_retention_gave_up_is_not_measured(trained, measured):
    server, process, task_id = trained(keep_newest_checkpoints=2)
    context = server.app.state.context
    removed = Retention(context.database, context.blobs, context.settings).look(now() + timedelta(days=361))
    assert removed.checkpoints == [f"trained/{task_id}/1"]
    assert sorted(set(measured(server, process, task_id))) == [2, 3]


def test_a_checkpoint_that_the_store_has_lost_is_passed_over_for_another(trained, measured):
    server, process, task_id = trained()
    folder = server.settings.data_dir / "blobs" / "model" / "trained" / str(task_id)
    for number in (1, 3):
        (folder / str(number) / "s" / "0" / "checkpoint").unlink()
    assert measured(server, process, task_id) == [2, 2, 2]


def test_only_checkpoints_within_the_look_back_are_measured(trained, measured):
    server, process, task_id = trained(evaluation_lookback_hours=24.0)
    history = schema.iteration_status_history
    with server.app.state.context.database.write() as tx:
        old = history.update().where(history.c.iteration_id < 3)
        tx.execute(old.values(created_time=now() - timedelta(hours=25)))
    assert measured(server, process, task_id) == [3, 3, 3]
