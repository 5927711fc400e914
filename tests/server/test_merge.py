"""Groups of a round's sums that are merged before its update."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fedcompute.crypto.aggregates import seal_aggregate
from fedcompute.crypto.keys import generate_key_pair
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.server.rounds.merge import GROUP, groups_of
from fedcompute.server.rounds.sums import MergeJob, SumGroup, merge_all, merge_group
from fedcompute.storage.batches import BatchRow, list_batches
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.keys import BatchKey, IterationKey
from fedcompute.storage.paths import AGGREGATED, aggregates_prefix
from fedcompute.storage.schema import BatchStatus
from fedcompute.tensors.partial_sum import PartialSum, encode

TRAINABLE = "server/global_model_weights/trainable"
KEY = IterationKey("p", 1, 1)
LIMIT = 1 << 20


@pytest.fixture
def store(tmp_path):
    """Nine sums of floats and lattice steps, in a store; its URL and their groups of four, four and one."""
    url, random = tmp_path.as_uri(), np.random.default_rng(5)
    blobs = open_blob_store(url)
    for number in range(9):
        lattice = {"a": random.integers(-(1 << 40), 1 << 40, (3, 2))}
        total = PartialSum(b"plan", number + 1, {"a": 0.5}, lattice, {"b": random.normal(size=200) * 10.0**number})
        blobs.put(AGGREGATED, f"sums/{number}", seal_aggregate(encode(total), None))
    parts = [range(4), range(4, 8), range(8, 9)]
    groups = [SumGroup(tuple(f"sums/{i}" for i in part), sum(i + 1 for i in part)) for part in parts]
    return url, [*(replace(one, merged=f"merged/{i}/x") for i, one in enumerate(groups[:2])), groups[2]]


def whole(url, groups):
    return encode(merge_all(open_blob_store(url), groups, {}, None, LIMIT))


def test_a_round_has_the_same_sum_to_the_last_bit_whoever_merged_which_group_and_when(store):
    url, groups = store
    unmerged = whole(url, groups)
    # In one row their floats differ, as their order of merging does.
    assert whole(url, [SumGroup(sum((one.sums for one in groups), ()), 45)]) != unmerged
    for group in (groups[1], groups[0]):
        assert merge_group(MergeJob(url, group, LIMIT)) == group.contributions
        assert whole(url, groups) == unmerged
    blobs = open_blob_store(url)
    for group in groups[:2]:
        for path in group.sums:
            blobs.delete(AGGREGATED, path)
        # A second engine finds it done.
        assert merge_group(MergeJob(url, group, LIMIT)) == group.contributions
    assert whole(url, groups) == unmerged


def test_sums_that_are_not_those_that_were_recorded_are_not_merged(store):
    url, groups = store
    with pytest.raises(ArtifactInvalid) as refused:
        merge_group(MergeJob(url, replace(groups[0], contributions=11), LIMIT))
    assert refused.value.reason is Reason.PARTIAL_SUM_MISMATCH
    assert open_blob_store(url).list(AGGREGATED, "merged") == []


def test_sums_of_groups_are_encrypted_as_those_of_batches_are(store):
    url, groups = store
    unmerged = whole(url, groups)
    key = generate_key_pair(datetime.now(UTC), timedelta(days=1))
    keys = {key.id: key.private_key}
    job = MergeJob(url, groups[0], LIMIT, keys, seal_sum=True, seal_to=key.published)
    merge_group(job)
    blobs = open_blob_store(url)
    with pytest.raises(ArtifactInvalid):
        merge_all(blobs, groups, {}, None, LIMIT)
    assert encode(merge_all(blobs, groups, keys, None, LIMIT)) == unmerged


def batches(statuses):
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    return [BatchRow(BatchKey(KEY, f"b{i}"), one, 5, 4, 0, moment, moment) for i, one in enumerate(statuses)]


def test_only_groups_in_which_nothing_can_change_are_merged():
    done, failed, running = BatchStatus.UPLOAD_COMPLETED, BatchStatus.FAILED, BatchStatus.PUBLISH_COMPLETED
    statuses = [done] * (GROUP - 1) + [failed] + [done] * (GROUP - 1) + [running] + [done] * 3
    groups = groups_of(KEY.task, 1, batches(statuses))
    assert [len(one.sums) for one in groups] == [GROUP - 1, GROUP - 1, 3]
    assert [one.merged is not None for one in groups] == [True, False, False]
    assert [one.contributions for one in groups] == [4 * (GROUP - 1), 4 * (GROUP - 1), 12]
    statuses[2 * GROUP - 1] = done
    assert [one.merged is not None for one in groups_of(KEY.task, 1, batches(statuses))] == [True, True, False]


@pytest.fixture
def merged(run_server, hand_made):
    """A server with a round in which one contribution is missing and a whole group is merged: (server, folders)."""
    server = run_server(collector_batch_size=1)
    process = hand_made.process_of()

    def contribute(number):
        deltas = [np.full(leaf.shape, float(number)) for leaf in hand_made.initial]
        server.api.contribute("large", hand_made.update_of(process, deltas))

    task_id = server.api.open_task("large", process, goal=GROUP + 2, room=GROUP + 2)
    with ThreadPoolExecutor(4) as devices:
        list(devices.map(contribute, range(GROUP)))
    task = IterationKey("large", task_id, 1).task
    folder = server.settings.data_dir / "blobs" / AGGREGATED
    singles, groups = (folder / aggregates_prefix(task, 1, level) for level in (0, 1))
    server.api.wait(lambda: len(list(singles.rglob("gradient"))) == GROUP)
    # As often as an engine looks.
    time.sleep(1.1)
    contribute(GROUP)
    server.api.wait(lambda: groups.exists() and [one for one in groups.rglob("*") if one.is_file()])
    return server, task_id, singles, groups, lambda: contribute(GROUP + 1)


def mean_is_right(server, task_id, hand_made):
    server.api.wait_for("large", task_id, "COMPLETED")
    state = server.api.checkpoint("large", task_id, 1)
    expected = hand_made.initial[0] - (GROUP + 1) / 2 * hand_made.rate
    np.testing.assert_allclose(state[f"{TRAINABLE}/0"], expected, rtol=1e-6)


def test_a_large_round_is_merged_while_it_collects_and_its_update_reads_the_groups(merged, hand_made):
    server, task_id, singles, groups, contribute = merged
    (group,) = [one for one in groups.rglob("*") if one.is_file()]
    with server.app.state.context.database.read() as tx:
        first = list_batches(tx, IterationKey("large", task_id, 1))[:GROUP]
    for batch in first:
        (singles / batch.key.batch_id / "gradient").unlink()
    assert group.parent.name == first[0].key.batch_id
    contribute()
    mean_is_right(server, task_id, hand_made)


def test_when_sums_are_made_anew_none_of_a_group_stays(merged, hand_made):
    server, task_id, singles, groups, contribute = merged
    with server.app.state.context.database.read() as tx:
        last = list_batches(tx, IterationKey("large", task_id, 1))[-1]
    path = singles / last.key.batch_id / "gradient"
    path.write_bytes(path.read_bytes()[:-9])
    before = {one for one in groups.rglob("*") if one.is_file()}
    contribute()
    mean_is_right(server, task_id, hand_made)
    assert not before & set(groups.rglob("*"))
