"""Rounds of one task that overlap (`max_parallel`): buffered, staleness-weighted, in the order of their rounds."""

import numpy as np
import pytest

from fedcompute.learning.specification import initial_state
from fedcompute.protos import federatedcompute_pb2, learning_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.rounds.update import update
from fedcompute.tensors.checkpoint import write_checkpoint

Rejection = federatedcompute_pb2.RejectionReason


def open_task(api, hand_made, population, process, *, goal=1, rounds=3, parallel=2):
    task = task_pb2.Task(
        total_iteration=rounds,
        min_aggregation_size=goal,
        max_aggregation_size=goal,
        min_client_version="0",
        max_client_version="999999999",
        max_parallel=parallel,
    )
    response = api.http.post(
        f"{api.url}/taskmanagement/v1/population/{population}:create-task",
        content=task_pb2.CreateTaskRequest(task=task).SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    assert response.status_code == 200, response.text
    task = task_pb2.CreateTaskResponse.FromString(response.content).task
    for url, data in (
        (task.init_checkpoint_url[0], write_checkpoint(initial_state(process, hand_made.initial, ()))),
        (task.server_phase_url[0], hand_made.plan_of(process)),
        (task.client_only_plan_url[0], hand_made.client_plan()),
    ):
        assert api.http.put(url, content=data).status_code == 200
    api.wait(lambda: api.task(population, task.task_id)["task"]["status"] != "CREATED")
    return task.task_id


def upload(api, hand_made, process, assignment, value):
    body = api.seal(hand_made.update_of(process, [np.full(leaf.shape, value) for leaf in hand_made.initial]))
    assert api.upload(api.upload_instruction(assignment), body).status_code == 200


def weights(api, population, task_id, iteration):
    return api.checkpoint(population, task_id, iteration)["server/global_model_weights/trainable/0"]


def test_a_second_round_opens_when_the_first_has_no_place_left_and_their_models_follow_each_other(api, hand_made):
    process = hand_made.process_of()
    task_id = open_task(api, hand_made, "two", process)
    first, second = api.assignment("two"), api.assignment("two")
    assert (first.aggregation_id, second.aggregation_id) == ("1", "2")
    assert first.init_checkpoint.uri.split("?")[0] == second.init_checkpoint.uri.split("?")[0]
    # As many as the task allows: there is no third.
    answer = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(api.check_in("two").content)
    assert answer.rejection_info.reason == Rejection.NO_TASK_AVAILABLE
    upload(api, hand_made, process, second, 1.0)
    api.wait_for("two", task_id, "APPLYING", iteration=2)
    # It waits for the model of the round before it.
    upload(api, hand_made, process, first, 2.0)
    api.wait_for("two", task_id, "COMPLETED", iteration=2)
    after_first = hand_made.initial[0] - hand_made.rate * 2.0
    np.testing.assert_allclose(weights(api, "two", task_id, 1), after_first, atol=1e-5)
    stale = hand_made.rate * 1.0 / np.sqrt(2.0)
    np.testing.assert_allclose(weights(api, "two", task_id, 2), after_first - stale, atol=1e-5)
    third = api.assignment("two", seconds=30)
    assert third.aggregation_id == "3"
    upload(api, hand_made, process, third, 4.0)
    api.wait_for("two", task_id, "COMPLETED")
    # It may have opened before the second was released, or after.
    base = int(third.init_checkpoint.uri.split(f"/two/{task_id}/")[1].split("/")[0])
    assert base in (1, 2)
    moved = hand_made.rate * 4.0 / np.sqrt(1.0 + (2 - base))
    np.testing.assert_allclose(weights(api, "two", task_id, 3), after_first - stale - moved, atol=1e-5)


def test_devices_go_on_while_an_update_is_computed(run_server, make_gate, hand_made):
    gate = make_gate(update)
    api = run_server(executor=gate).api
    process = hand_made.process_of()
    task_id = open_task(api, hand_made, "busy", process, rounds=2)
    upload(api, hand_made, process, api.assignment("busy"), 1.0)
    assert gate.reached.wait(30)
    upload(api, hand_made, process, api.assignment("busy"), 1.0)
    gate.opened.set()
    found = api.wait_for("busy", task_id, "COMPLETED")
    assert [one["status"] for one in found["iterations"]] == ["COMPLETED", "COMPLETED"]


def test_overlapping_rounds_are_private_one_by_one_and_each_has_its_entries(api, hand_made):
    aggregator = learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=1)
    process = hand_made.process_of(aggregator)
    task_id = open_task(api, hand_made, "private-two", process, rounds=2)
    for assignment in (api.assignment("private-two"), api.assignment("private-two")):
        upload(api, hand_made, process, assignment, 0.01)
    found = api.wait_for("private-two", task_id, "COMPLETED")
    assert [one["iteration_id"] for one in found["ledger"]] == [1, 2]


@pytest.mark.parametrize(
    "aggregator",
    [
        learning_pb2.AdaptiveGaussian(),
        learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=1.0, report_goal=1),
    ],
)
def test_a_plan_whose_guarantee_needs_one_round_after_the_other_is_refused(api, hand_made, aggregator):
    name = type(aggregator).__name__
    if isinstance(aggregator, learning_pb2.AdaptiveGaussian):
        aggregator = learning_pb2.AdaptiveGaussian(
            initial_clip_norm=0.1, noise_multiplier=0.01, target_quantile=0.5, learning_rate=0.2, report_goal=1
        )
    process = hand_made.process_of(aggregator)
    task_id = open_task(api, hand_made, f"no-{name}", process)
    found = api.wait_for(f"no-{name}", task_id, "FAILED")
    assert found["failure"]["code"] == "plan_unsupported"
    assert "must not overlap" in found["failure"]["message"]


def test_canceling_a_task_ends_all_of_its_rounds(api, hand_made):
    process = hand_made.process_of()
    task_id = open_task(api, hand_made, "gone", process)
    first, second = api.assignment("gone"), api.assignment("gone")
    api.http.post(f"{api.url}/taskmanagement/v1/population/gone/tasks/{task_id}:cancel")
    found = api.wait_for("gone", task_id, "CANCELED")
    assert [one["status"] for one in found["iterations"]] == ["CANCELED", "CANCELED"]
    for assignment in (first, second):
        answer = task_assignments_pb2.ReportResultResponse.FromString(api.report(assignment).content)
        assert answer.rejection_info.HasField("retry_window")
