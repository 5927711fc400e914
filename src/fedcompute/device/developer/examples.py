"""Serialized examples from plain values: what training and analytics plans read (spec/device.md 5.1, 7.6)."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedcompute.protos import example_query_result_pb2, tensorflow_pb2

FeatureValue = Any
"""A feature: int, bool, float, str or bytes, or a sequence or NumPy array of one of them."""

_VECTOR_FIELDS = {
    "int32": "int32_values",
    "int64": "int64_values",
    "bool": "bool_values",
    "float32": "float_values",
    "float64": "double_values",
}
_KINDS = {
    bool: "bool_values",
    int: "int64_values",
    float: "float_values",
    str: "string_values",
    bytes: "bytes_values",
}


def training_example(features: Mapping[str, FeatureValue]) -> bytes:
    """A serialized `tf.train.Example`: integers and booleans as int64, floats as float32, text and bytes as bytes.

    Arrays are flattened in row-major order; the plan knows their shapes. Raises TypeError naming the feature for
    values of another kind.
    """
    example = tensorflow_pb2.Example()
    for name, value in features.items():
        _fill(example.features.feature[name], name, value)
    return example.SerializeToString(deterministic=True)


def _fill(feature: tensorflow_pb2.Feature, name: str, value: FeatureValue) -> None:
    items = list(_flat(value))
    texts = [item.encode() if isinstance(item, str) else item for item in items if isinstance(item, (bytes, str))]
    numbers = [item for item in items if isinstance(item, (int, float))]
    if texts and len(texts) == len(items):
        feature.bytes_list.value.extend(texts)
    elif len(numbers) == len(items) and any(isinstance(number, float) for number in numbers):
        feature.float_list.value.extend(numbers)
    elif len(numbers) == len(items):
        feature.int64_list.value.extend(int(number) for number in numbers)
    else:
        raise TypeError(f"feature {name!r} is neither numbers nor text but {type(value).__name__}")


def _flat(value: FeatureValue) -> Iterator[object]:
    if hasattr(value, "tolist"):
        # An array or a scalar of NumPy, which workers may use and this module need not load.
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def example_query_result(vectors: Mapping[str, FeatureValue]) -> bytes:
    """A serialized `ExampleQueryResult`, what an analytics plan reads: named vectors, flattened in row-major order.

    Lists of truth values, integers, floats, text and bytes become BOOL, INT64, FLOAT, STRING and BYTES; of a NumPy
    array the type counts, so that INT32 and DOUBLE can be had. Raises TypeError naming the vector for values of
    another kind, of different kinds or for none at all, whose kind nobody knows.
    """
    result = example_query_result_pb2.ExampleQueryResult()
    for name, value in vectors.items():
        items = list(_flat(value))
        field = _VECTOR_FIELDS.get(str(getattr(value, "dtype", ""))) or _field_of(items)
        if field is None:
            raise TypeError(f"vector {name!r} is no list of numbers or text of one kind but {type(value).__name__}")
        getattr(result.vector_data.vectors[name], field).value.extend(items)
    return result.SerializeToString(deterministic=True)


def _field_of(items: list[object]) -> str | None:
    kinds = {type(item) for item in items}
    if kinds == {int, float}:
        kinds = {float}
    return _KINDS.get(kinds.pop()) if len(kinds) == 1 else None
