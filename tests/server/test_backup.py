"""A backup of a server that runs, and a server that goes on from it."""

import shutil
import threading

import numpy as np

from fedcompute.server.context import now
from fedcompute.storage.backup import back_up, restore
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.database import Database

TRAINABLE = "server/global_model_weights/trainable"


def updates(hand_made, process, count):
    return [
        hand_made.update_of(process, [np.full(leaf.shape, float(scale)) for leaf in hand_made.initial])
        for scale in range(count)
    ]


def restored(folder, data_dir):
    data_dir.mkdir()
    database = Database.open(f"sqlite:///{data_dir}/fedcompute.db")
    manifest = restore(database, open_blob_store(str(data_dir / "blobs")), folder)
    database.close()
    return manifest


def test_a_server_goes_on_from_a_backup_in_the_middle_of_a_round(run_server, hand_made, tmp_path):
    server = run_server()
    process = hand_made.process_of()
    task_id = server.api.open_task("moved", process, goal=3, rounds=2)
    given = updates(hand_made, process, 3)
    for update in given:
        server.api.contribute("moved", update)
    server.api.wait_for("moved", task_id, "COMPLETED", iteration=1)
    server.api.contribute("moved", given[0])
    server.api.wait(lambda: server.api.task("moved", task_id)["assignments"].get("UPLOAD_COMPLETED") == 4)
    context = server.app.state.context
    manifest = back_up(context.database, context.blobs, tmp_path / "backup", now())
    assert manifest.missing == []
    assert len(list((tmp_path / "backup" / "blobs" / "gradient").rglob("gradient"))) == 1
    first = server.api.checkpoint("moved", task_id, 1)
    server.stop()

    restored(tmp_path / "backup", tmp_path / "other")
    shutil.copy(server.settings.data_dir / "secret", tmp_path / "other" / "secret")
    other = run_server(data_dir=tmp_path / "other")
    again = other.api.checkpoint("moved", task_id, 1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for update in given[1:]:
        other.api.contribute("moved", update)
    found = other.api.wait_for("moved", task_id, "COMPLETED")
    assert found["rejections"] == {}
    state = other.api.checkpoint("moved", task_id, 2)
    np.testing.assert_allclose(state[f"{TRAINABLE}/0"], hand_made.initial[0] - 2 * hand_made.rate, atol=1e-6)


def test_backups_beside_a_server_at_work_lack_nothing(run_server, hand_made, tmp_path):
    server = run_server(collector_batch_size=2)
    process = hand_made.process_of()
    task_id = server.api.open_task("busy", process, goal=3, rounds=6)
    given = updates(hand_made, process, 3)
    done = threading.Event()

    def work():
        for number in range(1, 7):
            for update in given:
                server.api.contribute("busy", update)
            server.api.wait_for("busy", task_id, "COMPLETED", iteration=number)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    context = server.app.state.context
    count = 0
    while worker.is_alive() or not count:
        count += 1
        assert back_up(context.database, context.blobs, tmp_path / f"b{count}", now()).missing == []
    assert done.is_set()
    for number in {1, max(1, count // 2), count}:
        restored(tmp_path / f"b{number}", tmp_path / f"r{number}")
