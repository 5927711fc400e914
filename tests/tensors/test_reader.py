import tracemalloc

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint, write_checkpoint
from fedcompute.tensors.reader import CheckpointReader
from fedcompute.tensors.table import CHECKSUM_BYTES, data_blocks

LIMITS = CheckpointLimits(max_elements=10**6)


def update(seed, size=70_000):
    random = np.random.default_rng(seed)
    return {
        "update/0": np.array(1, np.int32),
        "update/1/loss/0": np.array(random.normal(), np.float32),
        "update/2/0": random.normal(size=(size // 7, 7)).astype(np.float32),
        "update/2/1": random.normal(size=3).astype(np.float64),
        "update/3": np.array([b"ab", b"c"], object),
        "update/4": np.zeros((0, 3), np.float32),
        "update/5": np.array([bool(seed % 2), True]),
        "update/6": random.integers(0, 100, 5),
    }


def outcome(read, data):
    """What reading gives: the leaves' bytes, or the reason for none."""
    try:
        leaves = read(data)
    except ArtifactInvalid as error:
        return error.reason
    return {name: (leaf.dtype, leaf.shape, leaf.tolist()) for name, leaf in leaves.items()}


def resealed(data):
    """The file with checksums that hold, whatever was changed in a block."""
    data = bytearray(data)
    for offset, size in data_blocks(memoryview(bytes(data))):
        end = offset + size + 1
        crc = google_crc32c.value(bytes(data[offset:end]))
        data[end : end + CHECKSUM_BYTES] = ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(data)


def test_files_that_differ_in_values_alone_are_read_as_by_the_plain_reader(assert_same):
    reader = CheckpointReader(CheckpointLimits())
    for seed in range(4):
        data = write_checkpoint(update(seed))
        assert_same(reader.read(data), read_checkpoint(data))
        assert_same(reader.read(memoryview(bytearray(data))), update(seed))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_files_of_any_layout_are_read_one_after_the_other(data, trees, assert_same):
    reader = CheckpointReader(CheckpointLimits())
    for tensors in data.draw(st.lists(trees, min_size=1, max_size=4)):
        written = write_checkpoint(tensors)
        assert_same(reader.read(written), tensors)
        assert_same(reader.read(written), tensors)


@pytest.mark.parametrize("reseal", [False, True])
def test_a_changed_byte_has_the_outcome_that_it_has_for_the_plain_reader(reseal):
    data = write_checkpoint(update(1, size=14))
    random = np.random.default_rng(3)
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ int(random.integers(1, 256))]) + data[at + 1 :]
        if reseal:
            try:
                damaged = resealed(damaged)
            except ArtifactInvalid:
                continue
        reader = CheckpointReader(LIMITS)
        reader.read(data)
        assert outcome(reader.read, damaged) == outcome(lambda bad: read_checkpoint(bad, LIMITS), damaged), at


def test_a_damaged_value_of_a_known_layout_fails_its_checksum():
    data = bytearray(write_checkpoint(update(1)))
    reader = CheckpointReader(CheckpointLimits())
    reader.read(bytes(data))
    data[len(data) // 2] ^= 1
    with pytest.raises(ArtifactInvalid, match="checksum") as caught:
        reader.read(bytes(data))
    assert caught.value.reason is Reason.CHECKPOINT_MALFORMED


def test_leaves_are_read_only_views_of_the_file_wherever_they_lie_in_it():
    data = write_checkpoint({"a" * length: np.ones(1000, np.float32) for length in range(1, 5)})
    reader = CheckpointReader(CheckpointLimits())
    for _ in range(2):
        for leaf in reader.read(data).values():
            assert np.shares_memory(leaf, np.frombuffer(data, np.uint8))
            assert not leaf.flags.writeable


def test_a_file_that_is_mostly_frame_is_read_and_not_kept(assert_same):
    tensors = {f"{index:05}": np.array(index, np.int64) for index in range(5000)}
    data = write_checkpoint(tensors)
    CheckpointReader(CheckpointLimits()).read(data)
    reader = CheckpointReader(CheckpointLimits())
    tracemalloc.start()
    reader.read(data)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 * len(data)
    assert_same(reader.read(data), tensors)
