"""The checkpoint format against the program that defines it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcompute.errors import ArtifactInvalid
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import DTYPES, to_data_type, to_dtype

tensorflow = pytest.importorskip("tensorflow")

BASE_TYPES = {"qint8": tensorflow.int8, "quint8": tensorflow.uint8, "qint32": tensorflow.int32}


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow") / "checkpoint"


def save(file, tensors, slices=None):
    """The bytes that SaveSlices writes."""
    tensorflow.raw_ops.SaveSlices(
        filename=str(file),
        tensor_names=[name.encode() for name in tensors],
        shapes_and_slices=slices or [""] * len(tensors),
        data=[tensorflow.convert_to_tensor(value) for value in tensors.values()],
    )
    return file.read_bytes()


def restore(file, data, types):
    file.write_bytes(data)
    return tensorflow.raw_ops.RestoreV2(
        prefix=str(file),
        tensor_names=[name.encode() for name in types],
        shape_and_slices=[""] * len(types),
        dtypes=list(types.values()),
    )


def tensorflow_type(array):
    return tensorflow.string if array.dtype == object else tensorflow.as_dtype(array.dtype)


def as_array(tensor):
    return np.array(tensor.numpy(), dtype=object) if tensor.dtype == tensorflow.string else tensor.numpy()


def equal_bits(actual, expected):
    if expected.dtype == object:
        return actual.shape == expected.shape and actual.tolist() == expected.tolist()
    return (actual.shape, actual.dtype, actual.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_files_of_tensorflow_are_read_and_ours_are_the_same_bytes(data, trees, file, assert_same):
    tensors = data.draw(trees.filter(bool))
    written = save(file, tensors)
    assert_same(read_checkpoint(written), tensors)
    assert write_checkpoint(tensors) == written


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_files_of_ours_restore_in_tensorflow(data, trees, file):
    tensors = data.draw(trees.filter(bool))
    types = {name: tensorflow_type(value) for name, value in tensors.items()}
    restored = restore(file, write_checkpoint(tensors), types)
    for value, tensor in zip(tensors.values(), restored, strict=True):
        assert equal_bits(as_array(tensor), value)


def test_a_file_of_many_blocks_is_the_same_bytes_and_restores(file, assert_same):
    random = np.random.default_rng(0)
    sizes = [1, 70_000, 3, 200_000, 130_000, 10, 65_536, 0, 131_072, 65_500, 5, 131_000]
    tensors = {f"w/{i}": random.normal(size=size).astype(np.float32) for i, size in enumerate(sizes)}
    tensors |= {f"small/{i}": np.array(-i, np.int64) for i in range(1000)}
    tensors |= {f"text/{i}": np.array([random.bytes(int(n)) for n in (0, 9000)], object) for i in range(40)}
    written = save(file, tensors)
    assert write_checkpoint(tensors) == written
    assert_same(read_checkpoint(written), tensors)
    types = {name: tensorflow_type(value) for name, value in tensors.items()}
    for value, tensor in zip(tensors.values(), restore(file, written, types), strict=True):
        assert equal_bits(as_array(tensor), value)


def test_leaves_around_the_block_sizes_give_the_same_bytes(file):
    for size in (256 << 10, 512 << 10):
        for slack in range(-140, 20, 4):
            tensors = {"a": np.zeros(1, np.float32), "b": np.zeros((size + slack) // 4, np.float32)}
            tensors |= {"c": np.ones(3, np.float32), "d\0": np.ones(3, np.float32)}
            assert write_checkpoint(tensors) == save(file, tensors)


@pytest.mark.parametrize("name", BASE_TYPES)
def test_quantized_tensors_keep_their_type(name, file):
    values = tensorflow.constant([1, 2, 100], BASE_TYPES[name])
    quantized = tensorflow.bitcast(values, getattr(tensorflow, name))
    written = save(file, {"a": quantized})
    leaf = read_checkpoint(written)["a"]
    assert leaf.dtype == quantized.dtype.as_numpy_dtype
    assert leaf[name].tolist() == [1, 2, 100]
    assert write_checkpoint({"a": leaf}) == written
    (restored,) = restore(file, written, {"a": quantized.dtype})
    assert tensorflow.bitcast(restored, BASE_TYPES[name]).numpy().tolist() == [1, 2, 100]


def test_a_type_is_written_exactly_if_tensorflow_writes_it(file):
    for dtype in DTYPES:
        if dtype.hasobject or dtype.names:
            continue
        array = np.zeros(2, dtype)
        try:
            written = save(file, {"a": array})
        except (tensorflow.errors.UnimplementedError, tensorflow.errors.InvalidArgumentError):
            written = None
        if written is None:
            with pytest.raises(ArtifactInvalid):
                write_checkpoint({"a": array})
        else:
            assert write_checkpoint({"a": array}) == written


def test_dtype_codes_are_those_of_tensorflow():
    for dtype, code in DTYPES.items():
        assert tensorflow.as_dtype(int(code)).as_numpy_dtype == dtype
        assert to_data_type(dtype) == tensorflow.as_dtype(int(code)).as_datatype_enum
        assert to_dtype(code) == dtype


def test_a_part_of_a_tensor_is_refused(file):
    with pytest.raises(ArtifactInvalid, match="in parts"):
        read_checkpoint(save(file, {"a": np.zeros((2, 3), np.float32)}, slices=["4 3 0,2:-"]))
    with pytest.raises(ArtifactInvalid, match="in parts"):
        read_checkpoint(save(file, {"a": np.zeros((2, 3), np.float32)}, slices=["2 3 0,2:0,3"]))
