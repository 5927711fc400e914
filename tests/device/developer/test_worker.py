"""The worker API: hooks and the example helper."""

import numpy as np
import pytest

from fedcompute.device.developer.examples import example_query_result, training_example
from fedcompute.device.developer.worker import (
    IsolatedWorker,
    TrainingExampleInput,
    TrainingExampleOutput,
    TrainingExampleRecord,
)
from fedcompute.protos import example_query_result_pb2, tensorflow_pb2

REQUEST = TrainingExampleInput("population", "1")


def test_a_worker_without_hooks_has_no_examples():
    assert IsolatedWorker().on_training_examples(REQUEST) == TrainingExampleOutput()


@pytest.mark.parametrize("hook", ["on_training_example", "on_training_examples"])
def test_either_name_of_the_hook_may_be_overridden(hook):
    output = TrainingExampleOutput([TrainingExampleRecord(b"x")])
    worker = type("Mine", (IsolatedWorker,), {hook: lambda self, request: output})()
    assert worker.on_training_examples(REQUEST) is output


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, "int64_list", [3]),
        (True, "int64_list", [1]),
        (0.5, "float_list", [0.5]),
        ("carrier", "bytes_list", [b"carrier"]),
        (b"\xff", "bytes_list", [b"\xff"]),
        ([1, 2], "int64_list", [1, 2]),
        ([1, 2.5], "float_list", [1.0, 2.5]),
        (["a", b"b"], "bytes_list", [b"a", b"b"]),
        (np.array([[1.0, 2.0], [3.0, 4.0]]), "float_list", [1.0, 2.0, 3.0, 4.0]),
        (np.array([1, 2], np.uint8), "int64_list", [1, 2]),
        (np.array(["a", "b"]), "bytes_list", [b"a", b"b"]),
        (np.array([], np.int64), "int64_list", []),
    ],
)
def test_features_take_the_kind_of_their_values(value, kind, expected):
    feature = tensorflow_pb2.Example.FromString(training_example({"f": value})).features.feature["f"]
    assert feature.WhichOneof("kind") == kind or not expected
    assert list(getattr(feature, kind).value) == expected


@pytest.mark.parametrize("value", [None, object(), {"a": 1}, [b"a", 1], 1j])
def test_a_feature_of_another_kind_is_named(value):
    with pytest.raises(TypeError, match="'odd'"):
        training_example({"odd": value})


def test_tensorflow_reads_the_examples():
    import tensorflow as tf

    data = training_example({"x": np.arange(4.0), "y": 7, "name": "é"})
    parsed = tf.io.parse_single_example(
        data,
        {
            "x": tf.io.FixedLenFeature([2, 2], tf.float32),
            "y": tf.io.FixedLenFeature([], tf.int64),
            "name": tf.io.FixedLenFeature([], tf.string),
        },
    )
    np.testing.assert_array_equal(parsed["x"], [[0, 1], [2, 3]])
    assert int(parsed["y"]) == 7
    assert parsed["name"].numpy() == "é".encode()


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ([1, 2], "int64_values", [1, 2]),
        ([True], "bool_values", [True]),
        ([1, 2.5], "float_values", [1.0, 2.5]),
        (["a"], "string_values", ["a"]),
        ([b"\xff"], "bytes_values", [b"\xff"]),
        (np.array([[1], [2]], np.int32), "int32_values", [1, 2]),
        (np.array([0.1]), "double_values", [0.1]),
        (np.array([0.5], np.float32), "float_values", [0.5]),
        (np.array([], np.int64), "int64_values", []),
    ],
)
def test_vectors_take_the_kind_of_their_values(value, kind, expected):
    result = example_query_result_pb2.ExampleQueryResult.FromString(example_query_result({"v": value}))
    vector = result.vector_data.vectors["v"]
    assert list(getattr(vector, kind).value) == expected
    assert vector.WhichOneof("values") == kind or not expected


@pytest.mark.parametrize("value", [[], None, ["a", b"b"], [1, "a"], [True, 1]])
def test_a_vector_of_another_kind_is_named(value):
    with pytest.raises(TypeError, match="'odd'"):
        example_query_result({"odd": value})
