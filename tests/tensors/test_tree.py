from collections import namedtuple

import numpy as np
import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import tensorflow_pb2
from fedcompute.tensors.tree import (
    DTYPES,
    LeafSpec,
    flatten,
    spec_from_proto,
    spec_to_proto,
    subtree,
    to_data_type,
    to_dtype,
)

ONE = np.float32(1)


def test_a_tree_is_named_by_fields_and_indices_depth_first():
    state = {
        "global_model_weights": {"trainable": (ONE, ONE), "non_trainable": ()},
        "distributor": {},
        "finalizer": {"learning_rate": ONE, "accumulator": [ONE]},
    }
    assert list(flatten("server", state)) == [
        "server/global_model_weights/trainable/0",
        "server/global_model_weights/trainable/1",
        "server/finalizer/learning_rate",
        "server/finalizer/accumulator/0",
    ]


def test_a_single_leaf_is_named_by_its_prefix():
    assert list(flatten("update", ONE)) == ["update"]


def test_a_named_tuple_gives_its_field_names():
    weights = namedtuple("weights", "trainable non_trainable")
    assert list(flatten("m", weights([ONE], [ONE]))) == ["m/trainable/0", "m/non_trainable/0"]


def test_bytes_become_a_scalar_string_leaf():
    leaf = flatten("s", {"name": b"a\0"})["s/name"]
    assert leaf.dtype == object
    assert leaf.shape == ()
    assert leaf.item() == b"a\0"


@pytest.mark.parametrize("leaf", [1.0, None, "text"])
def test_a_leaf_without_definite_dtype_is_a_type_error_that_names_it(leaf):
    with pytest.raises(TypeError, match="'client/0/rate'"):
        flatten("client", ({"rate": leaf},))


def test_two_leaves_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="'m/a/b'"):
        flatten("m", {"a": {"b": ONE}, "a/b": ONE})


def test_a_subtree_has_relative_names_in_numeric_order():
    leaves = {f"server/w/{i}": np.float32(i) for i in range(12)}
    tensors = {name: np.asarray(leaves[name]) for name in sorted(leaves)} | {"server/wide": np.asarray(ONE)}
    assert list(subtree(tensors, "server/w")) == [str(i) for i in range(12)]
    assert [float(leaf) for leaf in subtree(tensors, "server/w").values()] == list(range(12))


def test_a_subtree_of_a_leaf_is_that_leaf_and_of_nothing_is_empty():
    assert list(subtree({"client/1": np.asarray(ONE)}, "client/1")) == [""]
    assert subtree({"client/1": np.asarray(ONE)}, "client/2") == {}


def test_every_dtype_and_its_code_are_inverse():
    for dtype, code in DTYPES.items():
        assert to_dtype(to_data_type(dtype)) == dtype
        assert to_data_type(to_dtype(code)) == code


def test_big_endian_arrays_have_the_code_of_their_type():
    assert to_data_type(np.dtype(">f4")) == tensorflow_pb2.DT_FLOAT


@pytest.mark.parametrize("dtype", ["S3", "U3", "datetime64[s]", "f4,f4"])
def test_an_array_type_that_no_tensor_has_is_refused(dtype):
    with pytest.raises(ArtifactInvalid) as caught:
        to_data_type(np.dtype(dtype))
    assert caught.value.reason is Reason.WRONG_LEAF_TYPE


@pytest.mark.parametrize("code", [tensorflow_pb2.DT_INVALID, tensorflow_pb2.DT_BFLOAT16, 20, 99])
def test_a_tensor_type_that_no_array_has_is_refused(code):
    with pytest.raises(ArtifactInvalid) as caught:
        to_dtype(code)
    assert caught.value.reason is Reason.WRONG_LEAF_TYPE


@pytest.mark.parametrize("shape", [(), (3,), (0, 2)])
@pytest.mark.parametrize("dtype", [np.float32, object])
def test_a_spec_survives_its_message(shape, dtype):
    spec = LeafSpec("update/0", shape, np.dtype(dtype))
    message = tensorflow_pb2.TensorSpecProto.FromString(spec_to_proto(spec).SerializeToString())
    assert spec_from_proto(message) == spec


def test_a_spec_of_unknown_shape_is_refused():
    unknown_dim = spec_to_proto(LeafSpec("x", (-1, 784), np.dtype(np.float32)))
    unknown_rank = tensorflow_pb2.TensorSpecProto(name="x", dtype=1)
    unknown_rank.shape.unknown_rank = True
    for message in (unknown_dim, unknown_rank):
        with pytest.raises(ArtifactInvalid) as caught:
            spec_from_proto(message)
        assert caught.value.reason is Reason.WRONG_LEAF_SHAPE
