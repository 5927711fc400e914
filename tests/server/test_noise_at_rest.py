"""Noise that outlives a round, as a server keeps it: sealed in the store, in no answer, and worthless elsewhere."""

import gzip
import sqlite3

import numpy as np
import pytest

from fedcompute.crypto.sealing import place, sealer_of
from fedcompute.learning.noise_state import SEALED, open_noise
from fedcompute.protos import learning_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

OWN = "server/fedcompute/"
TREE = learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=0.5, report_goal=1, zeroing_norm=100.0)
BANDED = learning_pb2.BandedMatrixFactorization(
    clip_norm=1.0, noise_multiplier=0.5, report_goal=1, coefficients=[1.0, 0.5]
)


def update_for(process):
    made = {}
    for leaf in process.updates:
        shape = tuple(dim.size for dim in leaf.spec.shape.dim)
        dtype = np.int32 if leaf.role == learning_pb2.UpdateLeaf.ZEROED else np.float32
        made[leaf.spec.name] = np.full(shape, 0 if dtype is np.int32 else 0.01, dtype)
    return made


def stored_checkpoint(settings, population, task_id, iteration):
    path = settings.data_dir / "blobs" / "model" / population / str(task_id) / str(iteration) / "s/0/checkpoint"
    data = path.read_bytes()
    return path, read_checkpoint(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def noise_key(settings):
    sealer = sealer_of((settings.data_dir / "secret").read_bytes())
    query = "SELECT value, sealed_with FROM server_secret WHERE name = 'noise_state'"
    with sqlite3.connect(settings.data_dir / "fedcompute.db") as database:
        value, sealed_with = database.execute(query).fetchone()
    return sealer.open(place("server_secret", "noise_state"), bytes(value), sealed_with)


@pytest.mark.parametrize("aggregator", [TREE, BANDED])
def test_noise_rests_sealed_reaches_no_operator_and_serves_the_next_round(run_server, hand_made, aggregator):
    running = run_server()
    process = hand_made.process_of(aggregator)
    task_id = running.api.open_task("trees", process, goal=1, rounds=3)
    for iteration in (1, 2, 3):
        running.api.contribute("trees", update_for(process))
        found = running.api.wait_for("trees", task_id, "COMPLETED", iteration=iteration)
    path, stored = stored_checkpoint(running.settings, "trees", task_id, 2)
    assert [name for name in stored if name.startswith(OWN)] == [SEALED]
    assert not any(v.any() for k, v in stored.items() if "/level_buffer/" in k or "previous_tree_noise" in k)
    public = running.api.checkpoint("trees", task_id, 2)
    assert public.keys() == stored.keys() - {SEALED}
    place = str(path.relative_to(running.settings.data_dir / "blobs" / "model"))
    opened = open_noise(stored, noise_key(running.settings), place, 1 << 20)
    assert any(value.any() for name, value in opened.items() if name.startswith(OWN))
    models = [entry for entry in found["ledger"] if entry.get("released", "model") == "model"]
    assert [entry["event"]["step"] for entry in models] == [1, 2, 3]


def test_noise_under_the_key_of_another_server_ends_the_task_and_says_what_to_restore(run_server, hand_made):
    running = run_server()
    process = hand_made.process_of(TREE)
    task_id = running.api.open_task("trees", process, goal=1, rounds=2)
    running.api.contribute("trees", update_for(process))
    running.api.wait_for("trees", task_id, "COMPLETED", iteration=1)
    path, stored = stored_checkpoint(running.settings, "trees", task_id, 1)
    sealed = stored[SEALED].item()
    stored[SEALED] = np.array(sealed[:-1] + bytes([sealed[-1] ^ 1]), object)
    path.write_bytes(gzip.compress(write_checkpoint(stored)))
    running.api.contribute("trees", update_for(process))
    found = running.api.wait_for("trees", task_id, "FAILED")
    assert "secret_unreadable" in str(found)
    assert "restore the database and the blobs" in str(found)


FIXED = learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=0.5, report_goal=1)


@pytest.mark.parametrize("aggregator", [FIXED, TREE, BANDED])
def test_noise_drawn_while_devices_train_is_what_the_round_releases(run_server, hand_made, aggregator):
    running = run_server()
    process = hand_made.process_of(aggregator)
    task_id = running.api.open_task("ahead", process, goal=1, rounds=1)
    prepared = running.app.state.context.prepared
    running.api.wait(lambda: any(prepared.values()))
    (preparation,) = prepared.values()
    update = update_for(process)
    running.api.contribute("ahead", update)
    running.api.wait_for("ahead", task_id, "COMPLETED")
    released = running.api.checkpoint("ahead", task_id, 1)
    for index, (initial, draw) in enumerate(zip(hand_made.initial, preparation.draws, strict=False)):
        delta = next(value for name, value in update.items() if name == f"update/1/{index}")
        # A clip norm of 1 has steps of 2**-30. In its first round a tree releases its first leaf, a band its z.
        noised = delta + draw.values.reshape(delta.shape) * 2.0**-30
        weights = released[f"server/global_model_weights/trainable/{index}"]
        np.testing.assert_allclose(weights, initial - hand_made.rate * noised, atol=2e-6)
    assert "values" not in repr(preparation)
    running.api.wait(lambda: not prepared)
