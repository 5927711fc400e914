"""What is old is removed from a server's real stores, beside its rounds; `tests/storage` has the rules one by one."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest

from fedcompute.server.context import now
from fedcompute.server.retention import LEASE, Retention, RetentionThread
from fedcompute.server.rounds.leases import Leases
from fedcompute.server.rounds.update import update
from fedcompute.storage import schema
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.releases import ledger_entries
from fedcompute.storage.summaries import unsettled_attempts


@pytest.fixture
def start(run_server, hand_made):
    """A server whose own retention sleeps, and the retention that the test calls."""

    def run(executor=None, **settings):
        server = run_server(executor, **{"retention_period": 0.0, **settings})
        context = server.app.state.context
        return server, Retention(context.database, context.blobs, context.settings)

    return run


def stored(server, bucket, population):
    root = server.settings.data_dir / "blobs" / bucket / population
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def later(**age):
    return now() + timedelta(**age)


def summed_up(server, retention, population, task_id):
    """Waits until the engine has summed up every round: before that nothing is forgotten."""

    def over():
        with retention.database.read() as tx:
            return not unsettled_attempts(tx, [TaskKey(population, task_id)])

    server.api.wait(over)


def give(server, hand_made, process, population, count=3):
    for _ in range(count):
        deltas = [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]
        server.api.contribute(population, hand_made.update_of(process, deltas))


def test_updates_and_sums_go_a_day_after_the_release_and_the_next_round_goes_on(start, hand_made):
    server, retention = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("kept", process, goal=3, rounds=2)
    give(server, hand_made, process, "kept")
    server.api.wait_for("kept", task_id, "COMPLETED", iteration=1)
    before = stored(server, "model", "kept")

    assert not retention.look(later(hours=23))
    assert len(stored(server, "gradient", "kept")) == 3
    removed = retention.look(later(hours=25))
    assert (removed.rounds, removed.objects, removed.finished) == ([f"kept/{task_id}/1"], 4, True)
    assert stored(server, "gradient", "kept") == stored(server, "aggregated", "kept") == []
    assert not (server.settings.data_dir / "blobs" / "gradient" / "kept" / str(task_id) / "1").exists()
    assert stored(server, "model", "kept") == before
    assert not retention.look(later(days=300))

    give(server, hand_made, process, "kept")
    server.api.wait_for("kept", task_id, "COMPLETED", iteration=2)


def test_nothing_of_a_round_under_way_is_removed_however_old_it_is(start, hand_made, make_gate):
    gate = make_gate(update)
    server, retention = start(gate)
    process = hand_made.process_of()
    task_id = server.api.open_task("slow", process, goal=3, rounds=2)
    give(server, hand_made, process, "slow")
    assert gate.reached.wait(30)
    held = [stored(server, bucket, "slow") for bucket in ("gradient", "aggregated", "model")]
    assert not retention.look(later(days=9999))
    assert [stored(server, bucket, "slow") for bucket in ("gradient", "aggregated", "model")] == held
    gate.opened.set()
    server.api.wait_for("slow", task_id, "COMPLETED", iteration=1)


def test_a_paused_task_keeps_its_uploads_and_its_round_completes_when_it_goes_on(start, hand_made):
    server, retention = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("paused", process, goal=3)
    give(server, hand_made, process, "paused", count=2)
    url = f"{server.api.url}/taskmanagement/v1/population/paused/tasks/{task_id}"
    assert server.api.http.post(f"{url}:pause").status_code == 200
    assert not retention.look(later(days=9999))
    assert len(stored(server, "gradient", "paused")) == 2
    assert server.api.http.post(f"{url}:resume").status_code == 200
    give(server, hand_made, process, "paused", count=1)
    assert server.api.wait_for("paused", task_id, "COMPLETED")["rejections"] == {}


def test_a_result_that_was_never_released_is_removed_with_its_canceled_round(start, hand_made, make_gate):
    gate = make_gate(update)
    server, retention = start(gate)
    process = hand_made.process_of()
    task_id = server.api.open_task("dropped", process, goal=3)
    artifacts = stored(server, "model", "dropped")
    give(server, hand_made, process, "dropped")
    assert gate.reached.wait(30)
    assert f"{task_id}/1/s/0/checkpoint" in stored(server, "model", "dropped")
    url = f"{server.api.url}/taskmanagement/v1/population/dropped/tasks/{task_id}"
    assert server.api.http.post(f"{url}:cancel").status_code == 200
    gate.opened.set()
    assert retention.look(later(days=2)).rounds == [f"dropped/{task_id}/1"]
    assert stored(server, "model", "dropped") == artifacts
    assert stored(server, "gradient", "dropped") == stored(server, "aggregated", "dropped") == []


def test_a_remover_that_is_killed_at_any_step_is_finished_by_the_next(start, hand_made):
    server, retention = start(keep_newest_checkpoints=1)
    process = hand_made.process_of()
    task_id = server.api.open_task("killed", process, goal=1, rounds=4)
    for number in range(1, 5):
        give(server, hand_made, process, "killed", count=1)
        server.api.wait_for("killed", task_id, "COMPLETED", iteration=number)
    summed_up(server, retention, "killed", task_id)

    looks = 0
    while not retention.look(later(days=400), proceed=lambda: False).finished:
        looks += 1
    assert looks > 12
    assert stored(server, "gradient", "killed") == stored(server, "aggregated", "killed") == []
    left = [name for name in stored(server, "model", "killed") if name.endswith("checkpoint")]
    newest = [f"{task_id}/{number}/{name}" for number in (0, 4) for name in ("d/0/client_checkpoint", "s/0/checkpoint")]
    assert left == newest
    answer = server.api.http.get(f"{server.api.url}/api/v1/tasks/killed/{task_id}/checkpoint?iteration=2")
    assert answer.status_code == 404
    found = server.api.task("killed", task_id)
    assert [one["status"] for one in found["iterations"]] == ["COMPLETED"] * 4
    # What became of the devices is still told; who they were is not.
    assert found["assignments"] == {"UPLOAD_COMPLETED": 4}
    assert retention.due(later(days=400)).rows == 0
    assert {one["iteration_id"] for one in found["metrics"]} == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_removers_at_once_remove_everything_once(start, hand_made, request, kind):
    url = {"database_url": request.getfixturevalue("postgresql_url")} if kind == "postgresql" else {}
    server, retention = start(keep_newest_checkpoints=1, **url)
    process = hand_made.process_of()
    task_id = server.api.open_task("twice", process, goal=2, rounds=4)
    for number in range(1, 5):
        give(server, hand_made, process, "twice", count=2)
        server.api.wait_for("twice", task_id, "COMPLETED", iteration=number)
    summed_up(server, retention, "twice", task_id)
    with ThreadPoolExecutor(2) as pool:
        looks = [pool.submit(retention.look, later(days=400)) for _ in range(2)]
        removed = [one.result(60) for one in looks]
    assert all(one.finished for one in removed)
    assert stored(server, "gradient", "twice") == stored(server, "aggregated", "twice") == []
    found = server.api.task("twice", task_id)
    assert (found["task"]["status"], found["assignments"]) == ("COMPLETED", {"UPLOAD_COMPLETED": 8})
    assert sum(one.rows for one in removed) >= 8
    assert not retention.look(later(days=400))


def test_ledger_and_budget_outlive_everything(start, hand_made):
    from fedcompute.protos import learning_pb2

    server, retention = start(keep_newest_checkpoints=1)
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=0.5, report_goal=1))
    budget = {"epsilon": 1e6, "delta": 1e-6, "assumption": "NO_AMPLIFICATION"}
    assert server.api.http.put(f"{server.api.url}/api/v1/populations/ledger/budget", json=budget).status_code == 200
    task_id = server.api.open_task("ledger", process, goal=1, rounds=2)
    for number in (1, 2):
        give(server, hand_made, process, "ledger", count=1)
        server.api.wait_for("ledger", task_id, "COMPLETED", iteration=number)
    summed_up(server, retention, "ledger", task_id)
    with retention.database.read() as tx:
        entries = ledger_entries(tx, "ledger")
    assert len(entries) == 4
    assert retention.look(later(days=9999)).rows
    with retention.database.read() as tx:
        assert ledger_entries(tx, "ledger") == entries
        assert budget_of(tx, "ledger").epsilon == 1e6


def test_what_a_look_would_remove_is_told_without_removing_it(start, hand_made):
    server, retention = start()
    process = hand_made.process_of()
    task_id = server.api.open_task("told", process, goal=3)
    give(server, hand_made, process, "told")
    server.api.wait_for("told", task_id, "COMPLETED")
    summed_up(server, retention, "told", task_id)
    due = retention.due(later(days=400))
    assert (due.rounds, due.objects, due.tasks, due.rows) == ([f"told/{task_id}/1"], 4, [f"told/{task_id}"], 3)
    assert len(stored(server, "gradient", "told")) == 3


def test_the_server_looks_by_itself_and_of_two_engines_one_does(start, hand_made):
    server, retention = start(retention_period=0.05)
    process = hand_made.process_of()
    task_id = server.api.open_task("auto", process, goal=3)
    give(server, hand_made, process, "auto")
    server.api.wait_for("auto", task_id, "COMPLETED")
    other = Leases(retention.database, 60.0)
    server.api.wait(lambda: other.take(LEASE))
    with retention.database.write() as tx:
        tx.execute(schema.iteration.update().values(status_time=now() - timedelta(days=2)))
    mine = RetentionThread(retention)
    mine.start()
    assert len(stored(server, "gradient", "auto")) == 3
    other.give_all()
    server.api.wait(lambda: not stored(server, "gradient", "auto"))
    mine.stop()
