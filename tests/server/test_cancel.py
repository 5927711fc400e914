"""What devices and operators see of a task that was canceled in the middle of a round."""

import numpy as np
import pytest

from fedcompute.protos import federatedcompute_pb2, learning_pb2, task_assignments_pb2
from fedcompute.server.rounds.aggregate import aggregate
from fedcompute.server.rounds.update import update
from fedcompute.storage.batches import list_batches
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.schema import BatchStatus

GOAL = 2
JOBS = {"COLLECTING": None, "AGGREGATING": aggregate, "APPLYING": update}


@pytest.mark.parametrize("stage", list(JOBS))
def test_nothing_that_comes_after_a_cancel_counts_and_nothing_is_released(run_server, hand_made, make_gate, stage):
    gate = make_gate(JOBS[stage])
    running = run_server(executor=gate)
    api = running.api
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=GOAL))
    task_id = api.open_task("stopped", process, goal=GOAL, rounds=2, room=5)
    body = api.seal(hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]))
    computing, uploading = api.assignment("stopped"), api.assignment("stopped")
    instruction = api.upload_instruction(uploading)
    uploads = 1 if stage == "COLLECTING" else GOAL
    for _ in range(uploads):
        api.contribute("stopped", body=body)
    api.wait(lambda: api.task("stopped", task_id)["assignments"].get("UPLOAD_COMPLETED") == uploads)
    assert stage == "COLLECTING" or gate.reached.wait(30)
    assert api.wait_for("stopped", task_id, stage, iteration=1)

    assert api.http.post(f"{api.url}/taskmanagement/v1/population/stopped/tasks/{task_id}:cancel").status_code == 200
    gate.opened.set()
    for late in (computing, uploading):
        response = api.report(late)
        assert response.status_code == 200
        info = task_assignments_pb2.ReportResultResponse.FromString(response.content).rejection_info
        assert info.reason == federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE
        assert info.HasField("retry_window")
    assert api.report(computing, task_assignments_pb2.ReportResultRequest.FAILED).status_code == 200
    assert api.upload(instruction, body).status_code == 200

    # A whole round of another task: the engine has looked at everything since.
    other = api.open_task("stopped", process, goal=GOAL, room=GOAL)
    for _ in range(GOAL):
        api.contribute("stopped", body=body)
    found = api.wait_for("stopped", other, "COMPLETED")
    assert [one["contributions"] for one in found["ledger"]] == [GOAL]
    found = api.task("stopped", task_id)
    assert (found["task"]["status"], [one["status"] for one in found["iterations"]]) == ("CANCELED", ["CANCELED"])
    assert (found["ledger"], found["metrics"]) == ([], [])
    batched = 0 if stage == "COLLECTING" else GOAL
    counts = {"UPLOAD_COMPLETED": batched, "CANCELED": 2 + uploads - batched}
    assert found["assignments"] == {name: count for name, count in counts.items() if count}
    entries = api.http.get(f"{api.url}/api/v1/populations/stopped/ledger").json()["entries"]
    assert {one["task_id"] for one in entries} == {other}
    for iteration in (1, 2):
        url = f"{api.url}/api/v1/tasks/stopped/{task_id}/checkpoint?iteration={iteration}"
        assert api.http.get(url).status_code == 404
    with running.app.state.context.database.read() as tx:
        batches = list_batches(tx, IterationKey("stopped", task_id, 1))
    sums = {"COLLECTING": [], "AGGREGATING": [(BatchStatus.PUBLISH_COMPLETED, None)]}
    assert [(one.status, one.accepted_size) for one in batches] == sums.get(
        stage, [(BatchStatus.UPLOAD_COMPLETED, GOAL)]
    )
