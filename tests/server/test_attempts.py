"""Rounds that expire or fail are tried again with what their devices gave; tasks start, stop and give up in time."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.server.rounds import aggregate as aggregate_job
from fedcompute.server.rounds import attempts
from fedcompute.server.rounds import update as update_job
from fedcompute.storage.iterations import get_iteration, move_iteration
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.schema import IterationStatus
from fedcompute.storage.tasks import pause_task

Rejection = federatedcompute_pb2.RejectionReason


class Faulty:
    """An executor of threads whose jobs of one kind fail at first, after their work is stored."""

    capacity = 4

    def __init__(self, kind, times, harm=lambda: None):
        self._harm = harm
        self._pool = ThreadPoolExecutor(2)
        self._kind = kind
        self.left = times
        self.runs = 0

    def submit(self, job, argument):
        return self._pool.submit(self._run, job, argument)

    def _run(self, job, argument):
        result = job(argument)
        if job is self._kind:
            self.runs += 1
            if self.left:
                self.left -= 1
                self._harm()
                raise OperationFailed(Reason.INTERNAL, "the machine is on fire")
        return result

    def warm_up(self):
        pass

    def close(self):
        self._pool.shutdown(wait=False, cancel_futures=True)


def body_of(api, hand_made, process, value):
    return api.seal(hand_made.update_of(process, [np.full(leaf.shape, value) for leaf in hand_made.initial]))


def mean_of(api, hand_made, population, task_id, iteration=1):
    state = api.checkpoint(population, task_id, iteration)["server/global_model_weights/trainable/0"]
    return (hand_made.initial[0] - state) / hand_made.rate


def attempts_of(found):
    return [(one["iteration_id"], one["attempt_id"], one["status"]) for one in found["iterations"]]


def test_an_expired_round_goes_on_with_what_it_has(run_server, hand_made):
    api = run_server(round_expiry=1.0, round_attempts=50).api
    process = hand_made.process_of()
    task_id = api.open_task("slow", process, goal=2, room=3)
    api.contribute("slow", body=body_of(api, hand_made, process, 0.5))
    # Asked before the round expires; what it does later counts in the next attempt.
    late = api.assignment("slow")
    found = api.wait(lambda: (one := api.task("slow", task_id)) and len(one["iterations"]) > 1 and one)
    assert attempts_of(found)[0] == (1, 0, "CANCELED")
    assert found["task"]["status"] == "OPEN"
    assert api.upload(api.upload_instruction(late), body_of(api, hand_made, process, 1.5)).status_code == 200
    found = api.wait_for("slow", task_id, "COMPLETED")
    assert attempts_of(found)[-1][2] == "COMPLETED"
    assert found["assignments"] == {"UPLOAD_COMPLETED": 2}
    np.testing.assert_allclose(mean_of(api, hand_made, "slow", task_id), np.full((3, 2), 1.0), atol=1e-5)


def test_a_round_that_expires_in_its_last_attempt_fails_its_task_with_the_reason(run_server, hand_made):
    api = run_server(round_expiry=0.3, round_attempts=2).api
    task_id = api.open_task("lonely", hand_made.process_of(), goal=2)
    found = api.wait_for("lonely", task_id, "FAILED")
    assert found["task"]["reason"] == found["failure"]["code"] == "round_expired"
    assert attempts_of(found) == [(1, 0, "CANCELED"), (1, 1, "CANCELED")]


@pytest.mark.parametrize("kind", ["aggregate", "update"])
def test_a_round_whose_jobs_fail_is_tried_again_and_counts_every_upload_once(run_server, hand_made, kind):
    job = {"aggregate": aggregate_job.aggregate, "update": update_job.update}[kind]
    executor = Faulty(job, times=2)
    api = run_server(executor=executor, job_attempts=2, collector_batch_size=2).api
    process = hand_made.process_of()
    task_id = api.open_task("again", process, goal=3, room=3)
    for value in (1.0, 2.0, 6.0):
        api.contribute("again", body=body_of(api, hand_made, process, value))
    found = api.wait_for("again", task_id, "COMPLETED")
    failed = {"aggregate": "AGGREGATING_FAILED", "update": "APPLYING_FAILED"}[kind]
    if kind == "update":
        assert attempts_of(found) == [(1, 0, failed), (1, 1, "COMPLETED")]
    assert attempts_of(found)[-1][2] == "COMPLETED"
    assert found["assignments"] == {"UPLOAD_COMPLETED": 3}
    np.testing.assert_allclose(mean_of(api, hand_made, "again", task_id), np.full((3, 2), 3.0), atol=1e-5)


def test_an_update_that_is_repeated_releases_what_its_first_run_stored(run_server, hand_made):
    from fedcompute.protos import learning_pb2

    executor = Faulty(update_job.update, times=1)
    server = run_server(executor=executor, job_attempts=1)
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=1))
    api = server.api
    task_id = api.open_task("noised", process, goal=1, room=1)
    path = server.settings.data_dir / "blobs" / "model" / "noised" / str(task_id) / "1" / "s" / "0" / "checkpoint"
    api.contribute("noised", body=body_of(api, hand_made, process, 0.01))
    api.wait(path.exists)
    first = path.read_bytes()
    found = api.wait_for("noised", task_id, "COMPLETED")
    assert attempts_of(found) == [(1, 0, "APPLYING_FAILED"), (1, 1, "COMPLETED")]
    assert executor.runs == 2
    assert path.read_bytes() == first
    assert len(found["ledger"]) == 1


def test_a_sum_that_is_damaged_after_its_result_is_stored_is_not_needed_again(run_server, hand_made, tmp_path):
    blobs = tmp_path / "data" / "blobs"

    def harm():
        for path in (blobs / "aggregated").rglob("gradient"):
            path.unlink()
        next((blobs / "gradient").rglob("gradient")).unlink()

    api = run_server(executor=Faulty(update_job.update, times=1, harm=harm), job_attempts=1).api
    process = hand_made.process_of()
    task_id = api.open_task("once", process, goal=2, room=2)
    for value in (1.0, 3.0):
        api.contribute("once", body=body_of(api, hand_made, process, value))
    found = api.wait_for("once", task_id, "COMPLETED")
    # The round's one result is in the store; to collect again could only make the ledger tell of others.
    assert attempts_of(found) == [(1, 0, "APPLYING_FAILED"), (1, 1, "COMPLETED")]
    assert found["assignments"] == {"UPLOAD_COMPLETED": 2}
    entries = api.http.get(f"{api.url}/api/v1/populations/once/ledger").json()["entries"]
    assert [one["contributions"] for one in entries] == [2, 2]
    np.testing.assert_allclose(mean_of(api, hand_made, "once", task_id), np.full((3, 2), 2.0), atol=1e-5)


@pytest.mark.parametrize("ended", ["CANCELED", "AGGREGATING_FAILED"])
def test_a_task_whose_last_attempt_ended_while_its_server_was_killed_fails(run_server, hand_made, ended):
    server = run_server()
    context = server.app.state.context
    task_id = server.api.open_task("cut", hand_made.process_of())
    key = IterationKey("cut", task_id, 1)
    with context.database.write() as tx:
        assert move_iteration(
            tx, key, IterationStatus.COLLECTING, IterationStatus[ended], now(), reason=Reason.ROUND_EXPIRED
        )
    found = server.api.wait_for("cut", task_id, "FAILED")
    assert found["task"]["reason"] == "round_expired"


@pytest.mark.parametrize("kind", ["aggregate", "update"])
def test_a_round_that_fails_in_every_attempt_fails_its_task_with_the_reason(run_server, hand_made, kind):
    executor = Faulty({"aggregate": aggregate_job.aggregate, "update": update_job.update}[kind], times=99)
    api = run_server(executor=executor, job_attempts=1, round_attempts=2).api
    process = hand_made.process_of()
    task_id = api.open_task("hopeless", process, goal=1, room=1)
    api.contribute("hopeless", body=body_of(api, hand_made, process, 1.0))
    found = api.wait_for("hopeless", task_id, "FAILED")
    failed = {"aggregate": "AGGREGATING_FAILED", "update": "APPLYING_FAILED"}[kind]
    assert attempts_of(found) == [(1, 0, failed), (1, 1, failed)]
    assert executor.runs == 2
    assert found["failure"] == {
        "code": "internal",
        "message": "the machine is on fire",
        "remedy": "look at the server's log for the request's id",
    }


def test_a_task_without_artifacts_fails_when_its_time_is_over(run_server):
    api = run_server(artifact_expiry=0.5).api
    task_id = api.create_task("empty").task_id
    found = api.wait_for("empty", task_id, "FAILED")
    assert found["failure"]["code"] == "artifacts_missing"
    # The population is free again (lessons B7).
    assert api.create_task("empty").task_id == task_id + 1


def _timed(api, hand_made, population, **times):
    """A task with times, in seconds from now; goal 1, three rounds."""
    task = task_pb2.Task(
        total_iteration=3,
        min_aggregation_size=1,
        max_aggregation_size=1,
        min_client_version="0",
        max_client_version="999999999",
    )
    for name, seconds in times.items():
        getattr(task, name).FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return api.http.post(
        f"{api.url}/taskmanagement/v1/population/{population}:create-task",
        content=task_pb2.CreateTaskRequest(task=task).SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )


def _artifacts(api, hand_made, task, process):
    from fedcompute.learning.specification import initial_state
    from fedcompute.tensors.checkpoint import write_checkpoint

    for url, data in (
        (task.init_checkpoint_url[0], write_checkpoint(initial_state(process, hand_made.initial, ()))),
        (task.server_phase_url[0], hand_made.plan_of(process)),
        (task.client_only_plan_url[0], hand_made.client_plan()),
    ):
        assert api.http.put(url, content=data).status_code == 200


def test_a_task_starts_no_round_before_its_time_and_tells_devices_to_come_back_soon(run_server, hand_made):
    api = run_server().api
    process = hand_made.process_of()
    start = time.monotonic() + 3
    response = _timed(api, hand_made, "later", start_task_no_earlier_than=3)
    task = task_pb2.CreateTaskResponse.FromString(response.content).task
    _artifacts(api, hand_made, task, process)
    api.wait_for("later", task.task_id, "OPEN")
    if time.monotonic() < start - 0.5:
        answer = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(api.check_in("later").content)
        assert answer.rejection_info.reason == Rejection.NO_TASK_AVAILABLE
    api.assignment("later", seconds=30)
    assert time.monotonic() >= start - 0.1


def test_a_task_opens_no_round_after_its_stop_time_but_ends_the_one_it_has(run_server, hand_made):
    api = run_server().api
    process = hand_made.process_of()
    stop = time.monotonic() + 4
    response = _timed(api, hand_made, "brief", do_not_create_iteration_after=4)
    task = task_pb2.CreateTaskResponse.FromString(response.content).task
    _artifacts(api, hand_made, task, process)
    api.wait_for("brief", task.task_id, "OPEN")
    assignment = api.assignment("brief")
    time.sleep(max(0.0, stop - time.monotonic()) + 0.2)
    body = body_of(api, hand_made, process, 1.0)
    assert api.upload(api.upload_instruction(assignment), body).status_code == 200
    found = api.wait_for("brief", task.task_id, "COMPLETED")
    assert attempts_of(found) == [(1, 0, "COMPLETED")]
    assert found["task"]["reason"] == "stop_time_passed"


@pytest.mark.parametrize(
    ("times", "word"),
    [
        ({"do_not_create_iteration_after": -1}, "has passed already"),
        ({"do_not_create_iteration_after": 5, "start_task_no_earlier_than": 9}, "is not later than"),
    ],
)
def test_times_that_leave_no_room_for_a_round_are_refused_at_creation(api, hand_made, times, word):
    response = _timed(api, hand_made, "never", **times)
    assert response.status_code == 400
    assert response.json()["code"] == "task_invalid"
    assert word in response.json()["message"]


def test_a_task_whose_artifacts_come_after_its_stop_time_opens_no_round(run_server, hand_made):
    api = run_server().api
    response = _timed(api, hand_made, "missed", do_not_create_iteration_after=1)
    task = task_pb2.CreateTaskResponse.FromString(response.content).task
    time.sleep(1.2)
    _artifacts(api, hand_made, task, hand_made.process_of())
    found = api.wait_for("missed", task.task_id, "COMPLETED")
    assert (found["iterations"], found["task"]["reason"]) == ([], "stop_time_passed")


def test_a_round_whose_task_is_paused_just_when_it_expires_stays(run_server, hand_made, monkeypatch):
    server = run_server(round_expiry=3_600.0, round_attempts=1)
    context = server.app.state.context
    task_id = server.api.open_task("held", hand_made.process_of())
    key = IterationKey("held", task_id, 1)
    ask = attempts.expired_iterations
    with context.database.write() as tx:
        row = get_iteration(tx, key)
        assert pause_task(tx, key.task, now())
    # As an engine sees it that asked before the pause, and works on after it.
    monkeypatch.setattr(attempts, "expired_iterations", lambda tx, at, key=None: ask(tx, at, key=key) if key else [row])
    attempts.expire(context)
    assert attempts_of(server.api.task("held", task_id)) == [(1, 0, "COLLECTING")]


def test_a_round_that_had_all_it_needs_when_its_server_stopped_does_not_expire(run_server, hand_made, postgresql_url):
    expires = {"round_expiry": 4.0, "round_attempts": 1, "database_url": postgresql_url}
    process = hand_made.process_of()
    server = run_server(**expires)
    task_id = server.api.open_task("asleep", process, goal=1)
    opened = time.monotonic()
    server.stop()
    server = run_server(roles=("api",), database_url=postgresql_url)
    server.api.contribute("asleep", body=body_of(server.api, hand_made, process, 1.0))
    server.stop()
    time.sleep(max(0.0, opened + 4.5 - time.monotonic()))
    found = run_server(**expires).api.wait_for("asleep", task_id, "COMPLETED")
    assert attempts_of(found) == [(1, 0, "COMPLETED")]
