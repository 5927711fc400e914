import struct
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import tensorflow_pb2 as tf
from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint, write_checkpoint
from fedcompute.tensors.table import read_table, write_table
from fedcompute.tensors.wire import chunk

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/reference-keras/output"

SMALL = {
    "update/0": np.array(7, np.int32),
    "update/1/loss/0": np.array(-0.5, np.float32),
    "update/2/0": np.arange(6, dtype=np.float32).reshape(2, 3),
    "update/2/1": np.array([[-(2**62), 5]], np.int64),
    "update/3": np.array([b"", b"\0a"], dtype=object),
    "update/4": np.zeros((0, 3), np.float16),
    "update/5": np.array([True, False]),
}


def malformed(data, limits=None) -> ArtifactInvalid:
    with pytest.raises(ArtifactInvalid) as caught:
        read_checkpoint(data, limits or CheckpointLimits())
    assert caught.value.reason is Reason.CHECKPOINT_MALFORMED
    return caught.value


def too_large(data, **limits) -> ArtifactInvalid:
    with pytest.raises(ArtifactInvalid) as caught:
        read_checkpoint(data, CheckpointLimits(**limits))
    assert caught.value.reason is Reason.CHECKPOINT_TOO_LARGE
    return caught.value


def entries_of(data):
    found = read_table(memoryview(data), max_entries=100, max_key_bytes=100)
    return [(key, bytes(value)) for key, value in found]


def sealed(entries):
    return write_table([(key, [value]) for key, value in entries])


def with_meta(data, change):
    """The file with its list of tensors changed by `change(message)`, checksums made to hold."""
    (key, value), *rest = entries_of(data)
    message = tf.SavedTensorSlices.FromString(value)
    change(message.meta)
    return sealed([(key, message.SerializeToString()), *rest])


def with_data(data, change):
    """The file with its first tensor's data changed by `change(message)`, checksums made to hold."""
    meta, (key, value), *rest = entries_of(data)
    message = tf.SavedTensorSlices.FromString(value)
    change(message.data)
    return sealed([meta, (key, message.SerializeToString()), *rest])


def masked(contents):
    crc = google_crc32c.value(contents)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def with_first_block(data, contents, kind=b"\0"):
    """The file with the bytes of its only data block replaced by as many others, and their checksum."""
    return contents + kind + masked(contents + kind) + data[len(contents) + 5 :]


def first_block(data):
    end = data.index(masked(b"\0\0\0\0\1\0\0\0\0")) - 9
    return data[: end - 5]


def float_checkpoint():
    return write_checkpoint({"a": np.array([1.5, 2.5], np.float32)})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_written_is_read(data, trees, assert_same):
    tensors = data.draw(trees)
    assert_same(read_checkpoint(write_checkpoint(tensors)), tensors)


def test_the_file_does_not_depend_on_the_order_of_the_leaves():
    assert write_checkpoint(dict(reversed(SMALL.items()))) == write_checkpoint(SMALL)


def test_leaves_come_back_sorted_by_name():
    assert list(read_checkpoint(write_checkpoint(dict(reversed(SMALL.items()))))) == sorted(SMALL)


def test_a_checkpoint_without_leaves_is_read_as_such():
    assert read_checkpoint(write_checkpoint({})) == {}


def test_array_layout_does_not_show_in_the_file():
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = write_checkpoint({"a": plain})
    assert write_checkpoint({"a": np.asfortranarray(plain)}) == expected
    assert write_checkpoint({"a": plain.astype(">f4")}) == expected
    assert write_checkpoint({"a": np.repeat(plain, 2, axis=1)[:, ::2]}) == expected


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.bool_, np.float16])
def test_extreme_values_of_varint_types_survive(dtype, assert_same):
    bounds = [0, 1]
    if dtype is not np.bool_:
        info = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
        bounds = [info.min, info.max]
    tensors = {"a": np.array([*bounds, 0, 1], dtype), "b": np.array(bounds[1], dtype)}
    assert_same(read_checkpoint(write_checkpoint(tensors)), tensors)


def test_long_integer_leaves_survive_the_steps_of_the_vectorised_code(assert_same):
    random = np.random.default_rng(1)
    tensors = {"a": random.integers(-(2**63), 2**63, 150_001) >> random.integers(0, 63, 150_001)}
    assert_same(read_checkpoint(write_checkpoint(tensors)), tensors)


def test_leaves_of_many_blocks_survive(assert_same):
    random = np.random.default_rng(2)
    sizes = [1, 70_000, 3, 200_000, 130_000, 10, 65_536, 0, 131_072]
    tensors = {f"w/{i}": random.normal(size=size).astype(np.float32) for i, size in enumerate(sizes)}
    tensors |= {f"small/{i}": np.array(i, np.int64) for i in range(1000)}
    data = write_checkpoint(tensors)
    assert_same(read_checkpoint(data), tensors)
    assert write_checkpoint(read_checkpoint(data)) == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_read(kind, assert_same):
    assert_same(read_checkpoint(memoryview(kind(write_checkpoint(SMALL)))), SMALL)


def test_arrays_are_read_only_and_aligned():
    for shift in range(4):
        name = "a" * (1 + shift)
        leaf = read_checkpoint(write_checkpoint({name: np.ones(1000, np.float32)}))[name]
        assert not leaf.flags.writeable
        assert leaf.flags.aligned


@pytest.mark.parametrize("file", ["initial_state.server.ckp", "eval_initial_state.server.ckp"])
def test_a_checkpoint_of_the_reference_is_read_and_rewritten_to_the_same_bytes(file):
    if not (FIXTURES / file).exists():
        pytest.skip("the reference's artifacts are not beside this clone")
    data = (FIXTURES / file).read_bytes()
    tensors = read_checkpoint(data)
    assert tensors["server/global_model_weights/trainable/0"].shape == (784, 256)
    assert tensors["server/global_model_weights/trainable/0"].dtype == np.float32
    assert tensors["server/aggregator/dp_event/class_name"].shape == ()
    assert write_checkpoint(tensors) == data


def test_a_file_cut_off_anywhere_is_refused():
    data = write_checkpoint(SMALL)
    for end in range(len(data)):
        malformed(data[:end])


def test_a_file_with_bytes_in_front_or_behind_is_refused():
    data = write_checkpoint(SMALL)
    malformed(data + b"\0")
    malformed(b"\0" + data)


def test_a_file_with_any_changed_byte_is_refused():
    data = write_checkpoint(SMALL)
    random = np.random.default_rng(3)
    for at in range(len(data)):
        for flip in {1, 0x80, int(random.integers(1, 256))}:
            malformed(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])


def random_damage(random, content):
    content = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, len(content) + 1))
        match random.integers(0, 4):
            case 0:
                content[at : at + 1] = random.bytes(1)
            case 1:
                content[at:at] = random.bytes(int(random.integers(1, 4)))
            case 2:
                del content[at : at + int(random.integers(1, 4))]
            case _:
                content[at : at + 1] = bytes([random.choice([0, 1, 0x7F, 0x80, 0xFF])])
    return bytes(content)


def assert_refused_or_sound(data):
    try:
        tensors = read_checkpoint(data, CheckpointLimits(max_elements=10**6))
    except ArtifactInvalid as error:
        assert error.reason in (Reason.CHECKPOINT_MALFORMED, Reason.CHECKPOINT_TOO_LARGE)
    else:
        assert list(read_checkpoint(write_checkpoint(tensors))) == list(tensors)


def test_damaged_messages_behind_valid_checksums_are_refused_or_sound():
    entries = entries_of(write_checkpoint(SMALL))
    random = np.random.default_rng(4)
    for _ in range(6000):
        changed = list(entries)
        at = int(random.integers(0, len(changed)))
        changed[at] = (changed[at][0], random_damage(random, changed[at][1]))
        assert_refused_or_sound(sealed(changed))


def test_damaged_blocks_behind_valid_checksums_are_refused_or_sound():
    data = write_checkpoint(SMALL)
    block = first_block(data)
    random = np.random.default_rng(5)
    for _ in range(6000):
        changed = random_damage(random, block)[: len(block)].ljust(len(block), b"\0")
        assert_refused_or_sound(with_first_block(data, changed))


def test_random_bytes_before_the_magic_are_refused():
    random = np.random.default_rng(6)
    for _ in range(2000):
        malformed(random.bytes(int(random.integers(0, 100))) + bytes.fromhex("57fb808b247547db"))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    malformed(data)


def test_a_compressed_block_is_refused_by_name():
    data = float_checkpoint()
    assert "compressed" in malformed(with_first_block(data, first_block(data), kind=b"\1")).detail


def test_a_tensor_in_parts_is_refused_by_name():
    def split(meta):
        meta.tensor[0].slice.add().extent.add(start=1, length=1)

    def part(meta):
        meta.tensor[0].slice[0].extent[0].length = 1

    assert "in parts" in malformed(with_meta(float_checkpoint(), split)).detail
    assert "in parts" in malformed(with_meta(float_checkpoint(), part)).detail


@pytest.mark.parametrize("dims", [[1 << 40], [1 << 20, 1 << 20], [1 << 62, 0], [1 << 33, 1 << 33, 0]])
def test_a_huge_shape_without_data_is_refused_without_allocating(dims):
    def grow(meta):
        del meta.tensor[0].shape.dim[:], meta.tensor[0].slice[0].extent[:]
        for size in dims:
            meta.tensor[0].shape.dim.add(size=size)
            meta.tensor[0].slice[0].extent.add()

    data = with_meta(float_checkpoint(), grow)
    tracemalloc.start()
    too_large(data)
    with pytest.raises(ArtifactInvalid):
        read_checkpoint(data, CheckpointLimits(max_elements=1 << 40))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("data_type", [t for t in tf.DataType.values() if t != tf.DT_INVALID])
def test_a_huge_leaf_without_data_is_refused_whatever_its_type(data_type):
    def claim(meta):
        meta.tensor[0].type = data_type
        meta.tensor[0].shape.dim[0].size = 1 << 40

    data = with_data(with_meta(float_checkpoint(), claim), lambda saved: saved.data.Clear())
    tracemalloc.start()
    malformed(data, CheckpointLimits(max_elements=1 << 40))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_keys_that_grow_by_sharing_stop_at_the_name_limit():
    contents = b"".join(
        b"%c%c\0" % (0, 1) + b"a" if i == 0 else bytes([i & 0x7F | 0x80, i >> 7, 1, 0]) + b"a" for i in range(9000)
    )
    contents += struct.pack("<2I", 0, 1)
    empty = b"\0\0\0\0\1\0\0\0\0"
    size = len(contents)
    handle = b"\0" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
    index = b"\0\1" + bytes([len(handle)]) + b"b" + handle + empty[:-1]
    body = contents + b"\0" + masked(contents + b"\0") + empty + masked(empty)
    start = len(body)

    def varint(value):
        return bytes([value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14])

    footer = varint(start - 13) + b"\x08" + varint(start) + bytes([len(index)])
    data = body + index + b"\0" + masked(index + b"\0") + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    assert "a key exceeds" in too_large(data).detail


@pytest.mark.parametrize(
    "limits", [{"max_bytes": 100}, {"max_tensors": 6}, {"max_elements": 13}, {"max_name_bytes": 14}, {"max_rank": 1}]
)
def test_each_limit_is_kept(limits):
    data = write_checkpoint(SMALL)
    exact = {"max_bytes": len(data), "max_tensors": 7, "max_elements": 14, "max_name_bytes": 15, "max_rank": 2}
    assert len(read_checkpoint(data, CheckpointLimits(**exact))) == 7
    too_large(data, **(exact | limits))


def test_data_that_does_not_fit_the_shape_is_refused():
    malformed(with_data(float_checkpoint(), lambda saved: saved.data.float_val.append(3)))
    malformed(with_data(float_checkpoint(), lambda saved: saved.data.ClearField("float_val")))
    integers = write_checkpoint({"a": np.array([1, 2], np.int8)})
    malformed(with_data(integers, lambda saved: saved.data.int_val.append(3)))
    malformed(with_data(integers, lambda saved: saved.data.int_val.pop()))
    strings = write_checkpoint({"a": np.array([b"1", b"2"], object)})
    malformed(with_data(strings, lambda saved: saved.data.string_val.append(b"")))
    malformed(with_data(strings, lambda saved: saved.data.string_val.pop()))


def test_data_of_another_type_is_refused():
    malformed(with_data(float_checkpoint(), lambda saved: saved.data.double_val.append(3)))
    malformed(with_meta(float_checkpoint(), lambda meta: setattr(meta.tensor[0], "type", tf.DT_DOUBLE)))


def test_integers_out_of_their_types_range_are_refused():
    for dtype, wrong in [(np.int8, 128), (np.uint8, -1), (np.bool_, 2), (np.float16, 1 << 16), (np.int16, -32769)]:
        field = "half_val" if dtype is np.float16 else "int_val"

        def change(saved, wrong=wrong, field=field):
            getattr(saved.data, field)[0] = wrong

        data = write_checkpoint({"a": np.ones(1, dtype)})
        if dtype is np.bool_:
            meta, (key, value) = entries_of(data)
            malformed(sealed([meta, (key, value[:-1] + b"\2")]))
        else:
            malformed(with_data(data, change))


@pytest.mark.parametrize("varint", [b"\x80" * 10 + b"\1", b"\xff" * 9 + b"\2", b"\x80" * 70_000 + b"\1", b"\x80"])
def test_an_overlong_integer_is_refused(varint):
    meta, (key, _) = entries_of(write_checkpoint({"a": np.ones(1, np.int64)}))
    value = chunk(2, chunk(1, b"a") + chunk(2, chunk(1, b"")) + chunk(3, chunk(10, varint)))
    malformed(sealed([meta, (key, value)]))


def test_lists_and_data_that_disagree_are_refused():
    meta, first, second, *_ = entries_of(write_checkpoint(SMALL))
    malformed(sealed([meta, first, second]))
    malformed(sealed([first, second]))
    malformed(sealed([]))
    malformed(with_meta(float_checkpoint(), lambda listing: listing.tensor.pop()))
    malformed(with_meta(float_checkpoint(), lambda listing: listing.tensor.append(listing.tensor[0])))
    malformed(with_meta(float_checkpoint(), lambda listing: setattr(listing.tensor[0], "name", "b")))
    malformed(with_data(float_checkpoint(), lambda saved: setattr(saved, "name", "b")))
    malformed(with_data(float_checkpoint(), lambda saved: saved.slice.extent.pop()))


def test_a_format_version_of_the_future_is_refused():
    malformed(with_meta(float_checkpoint(), lambda meta: setattr(meta.versions, "min_consumer", 2)))
    malformed(with_meta(float_checkpoint(), lambda meta: meta.ClearField("versions")))


def test_a_name_that_is_not_utf_8_is_refused():
    (key, value), *rest = entries_of(float_checkpoint())
    malformed(sealed([(key, value.replace(b"\x0a\x01a", b"\x0a\x01\xff", 1)), *rest]))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, "S3", "U3", "datetime64[s]"])
def test_a_type_that_the_format_lacks_is_not_written(dtype):
    with pytest.raises(ArtifactInvalid, match="'a' has the type"):
        write_checkpoint({"a": np.zeros(2, dtype)})


@pytest.mark.parametrize("element", ["text", 1, None, bytearray(b"x")])
def test_a_string_leaf_of_other_objects_is_not_written(element):
    with pytest.raises(ArtifactInvalid, match="'a' holds objects"):
        write_checkpoint({"a": np.array([element], dtype=object)})


def test_a_name_that_is_not_text_is_not_written():
    with pytest.raises(ArtifactInvalid, match="not Unicode text"):
        write_checkpoint({"\udcff": np.zeros(1)})


def test_a_leaf_beyond_two_gibibytes_is_refused_before_it_is_copied():
    with pytest.raises(ArtifactInvalid) as caught:
        write_checkpoint({"a": np.broadcast_to(np.float32(0), (1 << 29,))})
    assert caught.value.reason is Reason.CHECKPOINT_TOO_LARGE


def test_limits_that_no_array_can_have_are_an_error():
    with pytest.raises(ValueError, match="max_rank"):
        CheckpointLimits(max_rank=33)
    with pytest.raises(ValueError, match="max_elements"):
        CheckpointLimits(max_elements=1 << 41)
