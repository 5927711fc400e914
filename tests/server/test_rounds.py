import gzip
import json
from datetime import timedelta

import numpy as np
import pytest

from fedcompute.privacy.noise import SystemNoise
from fedcompute.protos import learning_pb2
from fedcompute.server.context import now
from fedcompute.server.rounds.spending import Spending
from fedcompute.server.rounds.sums import SumGroup
from fedcompute.server.rounds.update import UpdateJob, update
from fedcompute.storage import schema
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import Standing

TRAINABLE = "server/global_model_weights/trainable"


def test_a_round_of_three_devices_gives_the_mean_of_their_updates(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("fedavg", process, goal=3, rounds=2)
    generator = np.random.default_rng(1)
    deltas = [[generator.normal(size=leaf.shape) for leaf in hand_made.initial] for _ in range(3)]
    for one in deltas:
        api.contribute("fedavg", hand_made.update_of(process, one))
    found = api.wait_for("fedavg", task_id, "COMPLETED", iteration=1)

    state = api.checkpoint("fedavg", task_id, 1)
    for index, initial in enumerate(hand_made.initial):
        mean = np.mean([one[index].astype(np.float32) for one in deltas], axis=0)
        np.testing.assert_allclose(state[f"{TRAINABLE}/{index}"], initial - hand_made.rate * mean, atol=1e-6)
    metrics = {one["name"]: one["value"] for one in found["metrics"]}
    assert metrics["server/client_work/train/sparse_categorical_accuracy"] == 0.5
    assert metrics["server/client_work/train/loss"] == 0.75
    assert found["ledger"] == []
    assert found["iterations"][1]["status"] == "COLLECTING"


def dp(goal=3, clip=1.0, noise=0.0):
    return learning_pb2.FixedGaussian(clip_norm=clip, noise_multiplier=noise, report_goal=goal)


def small(hand_made, scale=0.01):
    return [np.full(leaf.shape, scale) for leaf in hand_made.initial]


def test_a_private_round_is_noised_once_and_entered_in_the_ledger(api, hand_made):
    process = hand_made.process_of(dp(noise=0.5))
    task_id = api.open_task("private", process, goal=3)
    for _ in range(3):
        api.contribute("private", hand_made.update_of(process, small(hand_made)))
    found = api.wait_for("private", task_id, "COMPLETED")

    (entry,) = found["ledger"]
    assert entry["event"] == {"class": "GaussianDpEvent", "noise_multiplier": 0.5}
    assert (entry["iteration_id"], entry["contributions"], entry["clip_norm"]) == (1, 3, 1.0)
    state = api.checkpoint("private", task_id, 1)
    noiseless = hand_made.initial[0] - hand_made.rate * 0.01
    assert not np.allclose(state[f"{TRAINABLE}/0"], noiseless, atol=1e-6)
    assert "metrics/client_work/train/loss" in state


def test_under_a_fixed_denominator_no_more_than_the_goal_is_added(api, hand_made):
    process = hand_made.process_of(dp())
    task_id = api.open_task("capped", process, goal=3, room=6)
    body = api.seal(hand_made.update_of(process, small(hand_made)))
    ready = [api.assignment("capped") for _ in range(5)]
    instructions = [api.upload_instruction(one) for one in ready]
    answers = [api.upload(one, body) for one in instructions]
    assert {answer.status_code for answer in answers} == {200}
    found = api.wait_for("capped", task_id, "COMPLETED")
    assert found["ledger"][0]["contributions"] == 3
    assert found["assignments"] == {"UPLOAD_COMPLETED": 3, "CANCELED": 2}
    expected = hand_made.initial[0] - hand_made.rate * 0.01
    np.testing.assert_allclose(api.checkpoint("capped", task_id, 1)[f"{TRAINABLE}/0"], expected, atol=1e-6)


def test_the_metrics_object_is_plain_json_and_the_next_client_checkpoint_is_gzip(run_server, hand_made):
    running = run_server()
    process = hand_made.process_of()
    task_id = running.api.open_task("files", process, goal=1, rounds=2)
    running.api.contribute("files", hand_made.update_of(process, small(hand_made), metrics=(0, 0, 0, 0)))
    running.api.wait_for("files", task_id, "COMPLETED", iteration=1)

    folder = running.settings.data_dir / "blobs" / "model" / "files" / str(task_id) / "1"
    metrics = json.loads((folder / "s" / "0" / "metrics").read_bytes())
    assert metrics["server/client_work/train/loss"] is None
    assert metrics["server/finalizer/update_non_finite"] == 0
    assignment = running.api.assignment("files")
    response = running.api.http.get(assignment.init_checkpoint.uri)
    assert response.headers["content-encoding"] == "gzip"
    assert gzip.decompress((folder / "d" / "0" / "client_checkpoint").read_bytes()) == response.content


def bad_uploads(api, hand_made, process):
    """Reason -> body of an upload that must be rejected with it."""
    good = hand_made.update_of(process, small(hand_made))
    names = {("x/" + name if name.endswith("/0") else name): value for name, value in good.items()}
    kernel = "update/1/0"
    sealed = api.seal(good)
    envelope = json.loads(gzip.decompress(sealed))
    other = {**envelope, "keyId": "no-such-key"}
    garbled = {**envelope, "encryptedPayload": envelope["encryptedPayload"][:-8] + "AAAAAAA="}
    return {
        "wrong_leaf_names": api.seal(names),
        "wrong_leaf_shape": api.seal({**good, kernel: np.zeros((2, 3), np.float32)}),
        "wrong_leaf_type": api.seal({**good, kernel: good[kernel].astype(np.float64)}),
        "not_finite": api.seal({**good, kernel: np.full((3, 2), np.nan, np.float32)}),
        "norm_too_large": api.seal({**good, kernel: np.full((3, 2), 9, np.float32)}),
        "upload_truncated": sealed[: len(sealed) // 2],
        "unknown_key": gzip.compress(json.dumps(other).encode()),
        "decryption_failed": gzip.compress(json.dumps(garbled).encode()),
        "upload_not_encrypted": gzip.compress(b"\x00 no envelope"),
        "upload_too_large": gzip.compress(bytes(10_000_000)),
    }


def test_every_kind_of_bad_upload_is_rejected_alone_and_the_round_completes(api, hand_made):
    process = hand_made.process_of(dp(goal=3))
    task_id = api.open_task("hostile", process, goal=3, room=40)
    bad = bad_uploads(api, hand_made, process)
    for body in bad.values():
        api.contribute("hostile", body=body)
    for _ in range(3):
        api.contribute("hostile", hand_made.update_of(process, small(hand_made)))
    found = api.wait_for("hostile", task_id, "COMPLETED")

    assert found["rejections"] == dict.fromkeys(bad, 1)
    assert found["assignments"]["REMOTE_FAILED"] == len(bad)
    assert found["ledger"][0]["contributions"] == 3
    expected = hand_made.initial[0] - hand_made.rate * 0.01
    np.testing.assert_allclose(api.checkpoint("hostile", task_id, 1)[f"{TRAINABLE}/0"], expected, atol=1e-6)


def test_plaintext_uploads_count_only_where_the_operator_allows_them(run_server, hand_made):
    from fedcompute.tensors.checkpoint import write_checkpoint

    running = run_server(allow_plaintext_uploads=True)
    process = hand_made.process_of()
    task_id = running.api.open_task("plain", process, goal=1)
    leaves = hand_made.update_of(process, small(hand_made))
    running.api.contribute("plain", body=gzip.compress(write_checkpoint(leaves)))
    assert running.api.wait_for("plain", task_id, "COMPLETED")["rejections"] == {}


def test_a_round_uses_batches_of_the_set_size_and_a_smaller_last_one(run_server, hand_made):
    running = run_server(collector_batch_size=2)
    process = hand_made.process_of()
    task_id = running.api.open_task("batches", process, goal=5)
    for scale in range(5):
        running.api.contribute("batches", hand_made.update_of(process, small(hand_made, scale)))
    running.api.wait_for("batches", task_id, "COMPLETED")
    folder = running.settings.data_dir / "blobs" / "aggregated" / "batches" / str(task_id) / "1" / "s" / "0" / "0"
    assert len(list(folder.iterdir())) == 3
    expected = hand_made.initial[0] - hand_made.rate * 2
    np.testing.assert_allclose(running.api.checkpoint("batches", task_id, 1)[f"{TRAINABLE}/0"], expected, atol=1e-6)


def test_a_task_runs_all_its_rounds_each_on_the_model_of_the_last(api, hand_made):
    process = hand_made.process_of()
    task_id = api.open_task("rounds", process, goal=1, rounds=3, room=1)
    for _ in range(3):
        api.contribute("rounds", hand_made.update_of(process, small(hand_made, 1.0)))
    found = api.wait_for("rounds", task_id, "COMPLETED")
    assert [one["status"] for one in found["iterations"]] == ["COMPLETED"] * 3
    expected = hand_made.initial[0] - 3 * hand_made.rate
    np.testing.assert_allclose(api.checkpoint("rounds", task_id, 3)[f"{TRAINABLE}/0"], expected, atol=1e-6)
    assert api.http.get(f"{api.url}/api/v1/tasks/rounds/{task_id}/checkpoint?iteration=4").status_code == 404


def evaluation_info(population, training_task_id, size):
    from fedcompute.protos import task_pb2

    info = task_pb2.TaskInfo(traffic_weight=1)
    info.evaluation_info.training_population_name = population
    info.evaluation_info.training_task_id = training_task_id
    info.evaluation_info.check_point_selector.iteration_selector.size = size
    return info


def test_an_evaluation_measures_a_released_checkpoint_and_changes_no_model(api, hand_made):
    training = hand_made.process_of(dp(goal=1))
    trained = api.open_task("measured", training, goal=1, rounds=2, room=1)
    evaluation = hand_made.evaluation_of(training, ["sparse_categorical_accuracy"])
    task_id = api.open_task(
        "measured-eval", evaluation, goal=1, rounds=2, room=1, info=evaluation_info("measured", trained, 2)
    )
    # Open, but there is nothing to measure yet.
    assert api.task("measured-eval", task_id)["iterations"] == []
    assert api.check_in("measured-eval").status_code == 200
    for _ in range(2):
        api.contribute("measured", hand_made.update_of(training, small(hand_made)))
    api.wait_for("measured", trained, "COMPLETED")

    from fedcompute.tensors.checkpoint import read_checkpoint

    assignment = api.assignment("measured-eval")
    broadcast = read_checkpoint(api.http.get(assignment.init_checkpoint.uri).content)
    # Every second round of two: only round 1 is a candidate.
    state = api.checkpoint("measured", trained, 1)
    assert broadcast.keys() == {"client/0/0/0", "client/0/0/1"}
    np.testing.assert_array_equal(broadcast["client/0/0/0"], state[f"{TRAINABLE}/0"])
    assert assignment.eligibility_task_info.ByteSize() == 0

    leaves = hand_made.update_of(evaluation, [], metrics=(3, 4, 1, 4))
    assert api.upload(api.upload_instruction(assignment), api.seal(leaves)).status_code == 200
    api.contribute("measured-eval", leaves)
    found = api.wait_for("measured-eval", task_id, "COMPLETED")
    values = {(one["iteration_id"], one["name"]): one["value"] for one in found["metrics"]}
    assert values[1, "server/eval/sparse_categorical_accuracy"] == 0.75
    assert [one["evaluated_iteration_id"] for one in found["iterations"]] == [1, 1]
    assert found["ledger"] == []


def update_job(running, task_id):
    """The job of the first round of the population `once`, of one device."""
    root, aggregated = f"once/{task_id}", running.settings.data_dir / "blobs" / "aggregated"
    return UpdateJob(
        blob_url=running.settings.blobs,
        plan_path=f"{root}/0/s/0/server_phase",
        base_path=f"{root}/0/s/0/checkpoint",
        sums=(SumGroup(tuple(str(path.relative_to(aggregated)) for path in aggregated.rglob("gradient")), 1),),
        checkpoint_path=f"{root}/1/s/0/checkpoint",
        client_checkpoint_path=f"{root}/1/d/0/client_checkpoint",
        metrics_path=f"{root}/1/s/0/metrics",
        max_checkpoint_bytes=1 << 20,
        key=IterationKey("once", task_id, 1),
        report_goal=1,
        is_last=True,
        spending=Spending(Standing(0, None), {}),
        noise_key=bytes(32),
    )


@pytest.fixture
def released_once(run_server, hand_made):
    """A server with a released round of one device: (server, task id, what lies in the round's folder)."""
    running = run_server()
    process = hand_made.process_of(dp(goal=1, noise=1.0))
    task_id = running.api.open_task("once", process, goal=1)
    running.api.contribute("once", hand_made.update_of(process, small(hand_made)))
    running.api.wait_for("once", task_id, "COMPLETED")
    folder = running.settings.data_dir / "blobs" / "model" / "once" / str(task_id) / "1"
    return running, task_id, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_repeated_update_job_keeps_the_first_noise(released_once):
    running, task_id, released = released_once
    for path in released:
        if path.name != "checkpoint":
            path.unlink()
    update(update_job(running, task_id))
    assert {path: path.read_bytes() for path in released} == released


def test_of_two_update_jobs_at_once_the_slower_keeps_what_the_other_released(released_once):
    running, task_id, released = released_once
    for path in released:
        path.unlink()
    job, first = update_job(running, task_id), {}

    class Overtaken:
        """Noise that takes so long to draw that another worker does the whole job meanwhile."""

        def gaussian(self, deviation, count):
            if not first:
                first["result"] = update(job)
                first["files"] = {path: path.read_bytes() for path in released}
            return SystemNoise().gaussian(deviation, count)

    result = update(job, Overtaken())
    assert {path: path.read_bytes() for path in released} == first["files"]
    assert result == first["result"]


def test_a_plan_that_does_not_fit_its_checkpoint_fails_the_task_with_a_reason(api, hand_made):
    process = hand_made.process_of()
    task = api.create_task("misfit")
    from fedcompute.tensors.checkpoint import write_checkpoint

    wrong = write_checkpoint({"server/other": np.zeros(3, np.float32)})
    for url, data in (
        (task.init_checkpoint_url[0], wrong),
        (task.server_phase_url[0], hand_made.plan_of(process)),
        (task.client_only_plan_url[0], hand_made.client_plan()),
    ):
        assert api.http.put(url, content=data).status_code == 200
    found = api.wait_for("misfit", task.task_id, "FAILED")
    assert found["failure"]["code"] == "state_mismatch"
    assert (found["task"]["opened"], found["iterations"]) == (None, [])


def test_an_update_that_cannot_be_applied_fails_the_task_with_a_reason(run_server, hand_made):
    running = run_server(job_attempts=2)
    process = hand_made.process_of()
    task_id = running.api.open_task("broken", process, goal=1)
    path = running.settings.data_dir / "blobs" / "model" / "broken" / str(task_id) / "0" / "s" / "0" / "checkpoint"
    path.write_bytes(b"damaged")
    running.api.contribute("broken", hand_made.update_of(process, small(hand_made)))
    found = running.api.wait_for("broken", task_id, "FAILED")
    assert found["failure"]["code"] == "checkpoint_malformed"
    assert found["iterations"][0]["status"] == "APPLYING_FAILED"


def test_assignments_time_out_and_free_their_places(run_server, hand_made):
    running = run_server(local_compute_timeout=0.2, upload_timeout=0.2)
    api = running.api
    task_id = api.open_task("slow", hand_made.process_of(), goal=1, room=2)
    api.assignment("slow")
    api.report(api.assignment("slow"))
    assert api.check_in("slow").status_code == 200
    found = api.wait(
        lambda: (
            (found := api.task("slow", task_id))["assignments"].get("UPLOAD_TIMEOUT")
            and found["assignments"].get("LOCAL_TIMEOUT")
            and found
        )
    )
    assert found["assignments"] == {"LOCAL_TIMEOUT": 1, "UPLOAD_TIMEOUT": 1}
    api.assignment("slow")


def test_an_upload_that_lies_in_the_store_counts_however_late_it_is_found(run_server, hand_made):
    running = run_server()
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("found", process, goal=2, room=2)
    body = api.seal(hand_made.update_of(process, small(hand_made)))
    sessions = [api.assignment("found") for _ in range(2)]
    for one in sessions:
        assert api.report(one).status_code == 200
    running.stop()
    # Both reported an hour ago; one has uploaded, and nobody saw it.
    with running.app.state.context.database.write() as tx:
        hour_ago = now() - timedelta(hours=1)
        assert tx.execute(schema.assignment.update().values(status_time=hour_ago)).rowcount == 2
    folder = running.settings.data_dir / "blobs" / "gradient" / "found" / str(task_id) / "1" / "d"
    path = folder / sessions[0].assignment_id / "gradient"
    path.parent.mkdir(parents=True)
    path.write_bytes(body)

    api = run_server().api
    api.wait(lambda: "UPLOAD_TIMEOUT" in api.task("found", task_id)["assignments"])
    api.contribute("found", body=body)
    found = api.wait_for("found", task_id, "COMPLETED")
    assert found["assignments"] == {"UPLOAD_COMPLETED": 2, "UPLOAD_TIMEOUT": 1}
