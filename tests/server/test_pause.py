"""Tasks that are paused and resumed over HTTP."""

import numpy as np
import pytest

from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.protos import federatedcompute_pb2, learning_pb2, task_assignments_pb2, task_pb2
from fedcompute.storage.schema import task_status_history

Rejection = federatedcompute_pb2.RejectionReason
DELTA = 1e-6


def change(api, population, task_id, verb):
    return api.http.post(f"{api.url}/taskmanagement/v1/population/{population}/tasks/{task_id}:{verb}")


def changed(api, population, task_id, verb) -> task_pb2.Task:
    response = change(api, population, task_id, verb)
    assert response.status_code == 200, response.text
    return task_pb2.GetTaskByIdResponse.FromString(response.content).task


def is_conflict(response, status):
    assert response.status_code == 409, response.text
    assert response.json()["code"] == "task_conflict"
    assert f"is {status} and stays so" in response.json()["message"]


def reason_of(response):
    assert response.status_code == 200, response.text
    info = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(response.content).rejection_info
    assert info.retry_window.delay_max.ToMilliseconds() == 20
    return info.reason


def private(hand_made, goal=1):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=goal))
    process.privacy_claim.participation = learning_pb2.PrivacyClaim.Participation.NO_AMPLIFICATION
    process.privacy_claim.estimated_population = 100
    process.privacy_claim.delta = DELTA
    return process


def body_of(api, hand_made, process):
    return api.seal(hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]))


def evaluation_info(population, training_task_id):
    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = population
    info.evaluation_info.training_task_id = training_task_id
    info.evaluation_info.check_point_selector.iteration_selector.size = 1
    return info


def test_a_paused_task_assigns_nobody_and_its_round_completes_with_the_devices_it_has(api, hand_made):
    process = private(hand_made, goal=2)
    task_id = api.open_task("paused", process, goal=2, rounds=2, room=3)
    body = body_of(api, hand_made, process)
    devices = [api.assignment("paused") for _ in range(2)]
    assert changed(api, "paused", task_id, "pause").status == task_pb2.TaskStatus.PAUSED
    assert reason_of(api.check_in("paused")) == Rejection.NO_TASK_AVAILABLE
    for device in devices:
        assert api.upload(api.upload_instruction(device), body).status_code == 200
    found = api.wait_for("paused", task_id, "COMPLETED", iteration=1)
    assert (found["task"]["status"], len(found["iterations"])) == ("PAUSED", 1)
    assert [one["contributions"] for one in found["ledger"]] == [2]
    # There is no round any more, and still there is a task.
    assert reason_of(api.check_in("paused")) == Rejection.NO_TASK_AVAILABLE
    assert len(api.task("paused", task_id)["iterations"]) == 1
    assert changed(api, "paused", task_id, "resume").status == task_pb2.TaskStatus.OPEN
    for _ in range(2):
        api.contribute("paused", body=body)
    found = api.wait_for("paused", task_id, "COMPLETED")
    assert [one["contributions"] for one in found["ledger"]] == [2, 2]


def test_a_paused_task_completes_with_its_last_round(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("last", process, goal=1)
    device = api.assignment("last")
    changed(api, "last", task_id, "pause")
    assert api.upload(api.upload_instruction(device), body_of(api, hand_made, process)).status_code == 200
    api.wait_for("last", task_id, "COMPLETED")
    is_conflict(change(api, "last", task_id, "pause"), "COMPLETED")
    is_conflict(change(api, "last", task_id, "resume"), "COMPLETED")


def test_to_pause_or_resume_what_is_not_open_or_not_paused_is_a_conflict_and_changes_nothing(api, hand_made):
    waiting = api.create_task("twice").task_id
    is_conflict(change(api, "twice", waiting, "pause"), "CREATED")
    changed(api, "twice", waiting, "cancel")
    task_id = api.open_task("twice", hand_made.process_of())
    is_conflict(change(api, "twice", task_id, "resume"), "OPEN")
    changed(api, "twice", task_id, "pause")
    is_conflict(change(api, "twice", task_id, "pause"), "PAUSED")
    changed(api, "twice", task_id, "resume")
    is_conflict(change(api, "twice", task_id, "resume"), "OPEN")
    assert change(api, "twice", 99, "pause").status_code == 404
    assert change(api, "twice", task_id, "halt").status_code == 404
    assert api.task("twice", task_id)["task"]["status"] == "OPEN"


def test_a_paused_task_keeps_its_place_as_the_active_one_until_it_is_canceled(api, hand_made):
    task_id = api.open_task("place", hand_made.process_of())
    device = api.assignment("place")
    changed(api, "place", task_id, "pause")
    with pytest.raises(AssertionError, match="task_conflict"):
        api.create_task("place")
    assert changed(api, "place", task_id, "cancel").status == task_pb2.TaskStatus.CANCELED
    assert api.task("place", task_id)["iterations"][0]["status"] == "CANCELED"
    assert not api.upload_instruction(device).upload_location
    is_conflict(change(api, "place", task_id, "resume"), "CANCELED")
    assert api.open_task("place", hand_made.process_of()) == task_id + 1


def test_a_paused_evaluation_finishes_its_round_and_leaves_the_devices_to_training(api, hand_made):
    training = hand_made.process_of()
    trained = api.open_task("both", training, goal=1, rounds=9, room=9)
    api.contribute("both", body=body_of(api, hand_made, training))
    evaluation = hand_made.evaluation_of(training, ["sparse_categorical_accuracy"])
    info = evaluation_info("both", trained)
    task_id = api.open_task("both", evaluation, goal=1, rounds=2, room=1, info=info)
    changed(api, "both", trained, "pause")
    device = api.assignment("both")
    assert device.task_id == str(task_id)
    changed(api, "both", task_id, "pause")
    changed(api, "both", trained, "resume")
    assert {api.assignment("both").task_id for _ in range(4)} == {str(trained)}
    measured = api.seal(hand_made.update_of(evaluation, [], metrics=(3, 4, 1, 4)))
    assert api.upload(api.upload_instruction(device), measured).status_code == 200
    found = api.wait_for("both", task_id, "COMPLETED", iteration=1)
    assert (found["task"]["status"], len(found["iterations"])) == ("PAUSED", 1)
    changed(api, "both", trained, "pause")
    changed(api, "both", task_id, "resume")
    assert api.assignment("both").aggregation_id == "2"


def test_a_check_in_repeated_after_the_pause_gets_the_assignment_that_it_had(api, hand_made):
    task_id = api.open_task("again", hand_made.process_of())
    headers = {"odp-idempotency-key": "1 - a", "fcp-owner-id-digest": "app/cls-AB"}
    first = api.check_in("again", headers=headers)
    changed(api, "again", task_id, "pause")
    second = api.check_in("again", headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    parsed = [task_assignments_pb2.CreateTaskAssignmentResponse.FromString(one.content) for one in (first, second)]
    assert len({one.task_assignment.assignment_id for one in parsed}) == 1


def test_a_pause_survives_a_restart_while_time_outs_run(run_server, hand_made):
    fast = {"local_compute_timeout": 0.2, "upload_timeout": 0.2}
    first = run_server(**fast)
    process = hand_made.process_of()
    task_id = first.api.open_task("kept", process, goal=1, rounds=2)
    first.api.assignment("kept")
    changed(first.api, "kept", task_id, "pause")
    first.stop()
    second = run_server(**fast)
    api = second.api
    found = api.wait(
        lambda: (found := api.task("kept", task_id))["assignments"].get("LOCAL_TIMEOUT") and found, seconds=30
    )
    assert found["task"]["status"] == "PAUSED"
    assert reason_of(api.check_in("kept")) == Rejection.NO_TASK_AVAILABLE
    changed(api, "kept", task_id, "resume")
    api.assignment("kept")
    with second.app.state.context.database.read() as tx:
        history = tx.execute(task_status_history.select().order_by("status_id")).all()
    # CREATED, OPEN, PAUSED, OPEN
    assert [(one.status_id, one.status) for one in history] == [(0, 2), (1, 0), (2, 3), (3, 0)]


@pytest.mark.parametrize("raised", [False, True])
def test_a_paused_task_asks_for_its_budget_only_when_it_is_resumed(api, hand_made, raised):
    process = private(hand_made)
    population = f"spent-{raised}"
    task_id = api.open_task(population, process, goal=1, rounds=2, room=1)
    budget = {"epsilon": gaussian_epsilon(1.0, DELTA) * 1.05, "delta": DELTA}
    url = f"{api.url}/api/v1/populations/{population}/budget"
    assert api.http.put(url, json=budget).status_code == 200
    device = api.assignment(population)
    changed(api, population, task_id, "pause")
    assert api.upload(api.upload_instruction(device), body_of(api, hand_made, process)).status_code == 200
    found = api.wait_for(population, task_id, "COMPLETED", iteration=1)
    assert (found["task"]["status"], found["failure"]) == ("PAUSED", None)
    if raised:
        assert api.http.put(url, json={**budget, "epsilon": 100.0}).status_code == 200
    changed(api, population, task_id, "resume")
    if raised:
        api.contribute(population, body=body_of(api, hand_made, process))
    found = api.wait_for(population, task_id, "COMPLETED")
    assert found["task"]["reason"] == (None if raised else "budget_spent")
    assert len(found["ledger"]) == (2 if raised else 1)
