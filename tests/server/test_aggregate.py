import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fedcompute.crypto.envelope import gzip_bytes, open_update, seal_update
from fedcompute.crypto.keys import generate_key_pair
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.server.rounds.aggregate import AggregateJob, AggregateResult, aggregate
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.paths import AGGREGATED, GRADIENT, MODEL
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.tree import LeafSpec

PARAMETERS = 200_000
KINDS = 3


@pytest.fixture
def batch(tmp_path):
    """A blob store with a plan and encrypted uploads, and a job that adds so many of them up."""
    store = open_blob_store(tmp_path.as_uri())
    process = training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", (PARAMETERS,), np.dtype(np.float32))],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=10),
        metrics=[],
    )
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process)
    store.put(MODEL, "plan", plan.SerializeToString())
    state = initial_state(process, [np.zeros(PARAMETERS, np.float32)], ())
    store.put(MODEL, "client", write_checkpoint(client_checkpoint(process, state)))
    key = generate_key_pair(datetime.now(UTC), timedelta(days=1))
    for kind in range(KINDS):
        values = np.random.default_rng(kind).standard_normal(PARAMETERS) * 1e-3
        leaves = {
            leaf.spec.name: np.array(1, np.int32)
            if leaf.role == learning_pb2.UpdateLeaf.COUNT
            else np.resize(values, [dim.size for dim in leaf.spec.shape.dim]).astype(np.float32)
            for leaf in process.updates
        }
        store.put(GRADIENT, str(kind), gzip_bytes(seal_update(write_checkpoint(leaves), key.published)))
    job = AggregateJob(
        blob_url=tmp_path.as_uri(),
        plan_path="plan",
        client_checkpoint_path="client",
        uploads=(),
        output_path="sum",
        max_upload_bytes=1 << 24,
        max_checkpoint_bytes=1 << 24,
        allow_plaintext=False,
        private_keys={key.id: key.private_key},
    )

    def make(count, **changes):
        uploads = tuple((f"session {index}", str(index % KINDS)) for index in range(count))
        return replace(job, uploads=uploads, **changes)

    return make


@pytest.mark.parametrize("unpackers", [1, 2])
def test_memory_does_not_grow_with_the_uploads_of_a_batch(batch, unpackers):
    # Lesson D6.
    aggregate(batch(2))
    peaks = []
    for count in (4, 40):
        tracemalloc.start()
        assert aggregate(batch(count, unpackers=unpackers)) == AggregateResult(count, ())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_threads_that_unpack_ahead_change_neither_the_sum_nor_the_refusals(batch, tmp_path):
    (tmp_path / GRADIENT / "1").write_bytes(b"no upload")
    results, sums = [], []
    for unpackers in (1, 2, 3):
        results.append(aggregate(batch(10, unpackers=unpackers)))
        sums.append((tmp_path / AGGREGATED / "sum").read_bytes())
    assert results[0] == results[1] == results[2]
    assert [one.session_id for one in results[0].rejected] == [f"session {index}" for index in (1, 4, 7)]
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.parametrize("unpackers", [1, 2])
def test_uploads_that_are_refused_leave_no_bit_in_the_sum_of_the_others(batch, tmp_path, unpackers):
    store = open_blob_store(tmp_path.as_uri())
    cut_off = store.get(GRADIENT, "0", 1 << 24)[:-100]
    for place, body in enumerate((cut_off, write_checkpoint({"a": np.ones(3)}), b"\x1f\x8b")):
        store.put(GRADIENT, f"bad-{place}", body)
    clean = batch(KINDS, unpackers=unpackers)
    mixed = [pair for place in range(KINDS) for pair in ((f"bad {place}", f"bad-{place}"), clean.uploads[place])]
    sums = []
    for uploads in (clean.uploads, (*mixed, ("gone", "nothing"))):
        result = aggregate(replace(clean, uploads=uploads))
        sums.append((tmp_path / AGGREGATED / "sum").read_bytes())
    assert result.accepted == KINDS
    assert [one.session_id for one in result.rejected] == ["bad 0", "bad 1", "bad 2", "gone"]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("unpackers", [1, 2])
def test_plaintext_uploads_count_the_same_with_and_without_gzip(batch, tmp_path, unpackers):
    # Those without are read into the same memory one after the other, over each other's leaves.
    store = open_blob_store(tmp_path.as_uri())
    keys = batch(0).private_keys
    plain = [
        open_update(store.get(GRADIENT, str(kind), 1 << 24), keys, allow_plaintext=False, limit=1 << 24)
        for kind in range(KINDS)
    ]
    sums = []
    for bodies in (plain, [plain[0], gzip_bytes(plain[1]), plain[2]], [gzip_bytes(one) for one in plain]):
        for kind, body in enumerate(bodies):
            store.put(GRADIENT, str(kind), body)
        assert aggregate(batch(2 * KINDS, allow_plaintext=True, unpackers=unpackers)).accepted == 2 * KINDS
        sums.append((tmp_path / AGGREGATED / "sum").read_bytes())
    assert sums[0] == sums[1] == sums[2]
