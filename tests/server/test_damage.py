"""Damage between the steps of a round: storage that fails for a while, and stored objects that are no longer whole."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.server.rounds import jobs


class Held:
    """An executor whose jobs wait for the test, so that damage falls between two steps; the jobs are the real ones."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(2)
        self.gates = {"aggregate": threading.Event(), "update": threading.Event()}
        self.reached = {name: threading.Event() for name in self.gates}
        self.runs = Counter()

    def submit(self, job, argument):
        return self._pool.submit(self._run, job, argument)

    def _run(self, job, argument):
        self.reached[job.__name__].set()
        assert self.gates[job.__name__].wait(20)
        self.runs[job.__name__] += 1
        return job(argument)

    def warm_up(self):
        pass

    def close(self):
        for gate in self.gates.values():
            gate.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def round_of_three(run_server, hand_made):
    """Three uploads of a round whose jobs are held: server, executor, task id, updates, population."""

    def start(population="damage"):
        executor = Held()
        server = run_server(executor=executor, collector_batch_size=2)
        process = hand_made.process_of()
        task_id = server.api.open_task(population, process, goal=3, room=6)
        sessions = [
            server.api.contribute(
                population, hand_made.update_of(process, [np.full(w.shape, 2.0**i) for w in hand_made.initial])
            ).assignment_id
            for i in range(3)
        ]
        assert executor.reached["aggregate"].wait(10)
        return server, executor, task_id, sessions

    return start


def release(executor, *names):
    for name in names:
        executor.gates[name].set()


def weights(server, hand_made, task_id, population="damage"):
    found = server.api.wait_for(population, task_id, "COMPLETED", iteration=1)
    state = server.api.checkpoint(population, task_id, 1)["server/global_model_weights/trainable/0"]
    return found, (hand_made.initial[0] - state) / hand_made.rate


def stored(server, bucket, name):
    found = [path for path in (server.settings.data_dir / "blobs" / bucket).rglob(name) if path.is_file()]
    assert found
    return sorted(found)


@pytest.mark.parametrize("step", ["aggregate", "update"])
def test_a_round_waits_for_storage_that_fails_and_completes_when_it_is_back(
    round_of_three, hand_made, step, monkeypatch
):
    monkeypatch.setattr(jobs, "_LONGEST_WAIT", 0.1)
    server, executor, task_id, _ = round_of_three()
    blobs = server.settings.data_dir / "blobs"
    obstacle = {"aggregate": blobs / "aggregated", "update": blobs / "model" / "damage" / str(task_id) / "1"}[step]
    if step == "update":
        release(executor, "aggregate")
        assert executor.reached["update"].wait(10)
    # Where a folder must be made there is a file, which stops root too.
    obstacle.write_text("in the way")
    release(executor, "aggregate", "update")
    # More often than other errors are tried.
    server.api.wait(lambda: executor.runs[step] > 6)
    found = server.api.task("damage", task_id)
    assert (found["task"]["status"], found["iterations"][0]["status"]) == (
        "OPEN", {"aggregate": "AGGREGATING", "update": "APPLYING"}[step],
    )  # fmt: skip
    obstacle.unlink()
    found, mean = weights(server, hand_made, task_id)
    assert found["iterations"][0]["assignments"] == {"UPLOAD_COMPLETED": 3}
    np.testing.assert_allclose(mean, np.full_like(mean, 7 / 3), atol=1e-5)


@pytest.mark.parametrize("how", ["truncated", "gone"])
def test_a_damaged_upload_costs_its_device_only(round_of_three, hand_made, how):
    server, executor, task_id, sessions = round_of_three()
    path = next(path for path in stored(server, "gradient", "gradient") if sessions[0] in str(path))
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    release(executor, "aggregate", "update")
    process = hand_made.process_of()
    server.api.contribute("damage", hand_made.update_of(process, [np.full(w.shape, 8.0) for w in hand_made.initial]))
    found, mean = weights(server, hand_made, task_id)
    assignments = found["iterations"][0]["assignments"]
    # The device came again if the round was closed just between its check-in and its report.
    assignments.pop("CANCELED", None)
    assert assignments == {"UPLOAD_COMPLETED": 3, "REMOTE_FAILED": 1}
    assert set(found["rejections"]) <= {"upload_truncated", "decryption_failed", "upload_missing"}
    np.testing.assert_allclose(mean, np.full_like(mean, (2 + 4 + 8) / 3), atol=1e-5)


@pytest.mark.parametrize("how", ["truncated", "gone", "of another plan", "of other uploads"])
def test_a_damaged_partial_sum_is_added_up_again(round_of_three, hand_made, how):
    server, executor, task_id, _ = round_of_three()
    release(executor, "aggregate")
    assert executor.reached["update"].wait(10)
    path, other = stored(server, "aggregated", "gradient")
    match how:
        case "of other uploads":
            path.write_bytes(other.read_bytes())
        case "gone":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        case _:
            path.write_bytes(b"garbage")
    release(executor, "update")
    found, mean = weights(server, hand_made, task_id)
    first, second = found["iterations"]
    assert (first["status"], first["assignments"]) == ("APPLYING_FAILED", {})
    assert (second["status"], second["assignments"]) == ("COMPLETED", {"UPLOAD_COMPLETED": 3})
    # Sums of other groups of the same devices would tell them apart.
    held = stored(server, "aggregated", "gradient")
    assert len(held) == 2
    assert not {path, other} & set(held)
    np.testing.assert_allclose(mean, np.full_like(mean, 7 / 3), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "step", "code"),
    [("server_phase", "aggregate", "checkpoint_malformed"), ("checkpoint", "update", "checkpoint_malformed")],
)
def test_a_damaged_plan_or_model_fails_the_task_with_the_reason(round_of_three, name, step, code):
    server, executor, task_id, _ = round_of_three()
    if step == "update":
        release(executor, "aggregate")
        assert executor.reached["update"].wait(10)
    for path in stored(server, "model", name):
        path.write_bytes(path.read_bytes()[:-9])
    release(executor, "aggregate", "update")
    found = server.api.wait_for("damage", task_id, "FAILED")
    assert found["failure"]["code"] == code
