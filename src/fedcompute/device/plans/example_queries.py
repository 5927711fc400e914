"""Federated analytics: one example of named vectors becomes an update, without TensorFlow (spec/device.md 5.6)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import DTypeLike, NDArray

from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.protos.example_query_result_pb2 import ExampleQueryResult
from fedcompute.tensors.checkpoint import write_checkpoint

_Spec = plan_pb2.ExampleQuerySpec.OutputVectorSpec

# Data type -> the lists of values that it is read from, and the type of the tensor.
_TYPES: Mapping[int, tuple[tuple[str, ...], DTypeLike]] = {
    _Spec.INT32: (("int32_values",), np.int32),
    _Spec.INT64: (("int64_values",), np.int64),
    _Spec.BOOL: (("bool_values",), np.bool_),
    _Spec.FLOAT: (("float_values",), np.float32),
    _Spec.DOUBLE: (("double_values",), np.float64),
    # Phones read BYTES from the list of strings, so workers that serve them fill that one.
    _Spec.BYTES: (("bytes_values", "string_values"), object),
    _Spec.STRING: (("string_values",), object),
}


def answer_queries(
    spec: plan_pb2.ExampleQuerySpec, examples: Sequence[bytes], *, update_bytes_limit: int
) -> tuple[bytes, bytes]:
    """The update of a validated plan's queries, and the one example that they are answered from.

    Every query reads the same example, the first, a serialized ExampleQueryResult. The update is a V1 checkpoint of
    rank-1 tensors: output name -> the vector that it names. Raises DeviceRunFailed: EXAMPLES_FAILED for an example
    that is missing or no such message, or for a vector that is missing or of another type; UPLOAD_TOO_LARGE.
    """
    if not examples:
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, "no example; a query is answered from exactly one")
    example = examples[0]
    result = ExampleQueryResult()
    try:
        result.ParseFromString(example)
    except DecodeError as cause:
        detail = f"an example of {len(example)} bytes that is no ExampleQueryResult"
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, detail) from cause
    tensors: dict[str, NDArray[Any]] = {}
    size = 0
    for number, query in enumerate(spec.example_queries):
        for name, output in query.output_vector_specs.items():
            tensors[name] = _vector(result, number, output)
            # Counted as it grows: many outputs may name the same vector.
            size += _size(tensors[name])
            if size > update_bytes_limit:
                raise _too_large(f"vectors of over {update_bytes_limit} bytes")
    update = write_checkpoint(tensors)
    if len(update) > update_bytes_limit:
        raise _too_large(f"an update of {len(update)} bytes, {update_bytes_limit} are the limit")
    return update, example


def _vector(
    result: ExampleQueryResult, number: int, output: plan_pb2.ExampleQuerySpec.OutputVectorSpec
) -> NDArray[Any]:
    vectors = result.vector_data.vectors
    data_type = _Spec.DataType.Name(output.data_type)
    wanted = f"query {number} wants vector {output.vector_name!r} of {data_type}"
    if output.vector_name not in vectors:
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"{wanted}; it is not among the example's {len(vectors)} vectors")
    values = vectors[output.vector_name]
    fields, dtype = _TYPES[output.data_type]
    found = values.WhichOneof("values")
    if found not in fields:
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"{wanted}; the example has {found or 'no values'}")
    items = list(getattr(values, found).value)
    if dtype is object:
        return np.fromiter((item.encode() if isinstance(item, str) else item for item in items), object, len(items))
    return np.array(items, dtype)


def _size(tensor: NDArray[Any]) -> int:
    return sum(len(item) for item in tensor) if tensor.dtype == object else tensor.nbytes


def _too_large(detail: str) -> DeviceRunFailed:
    return DeviceRunFailed(Reason.UPLOAD_TOO_LARGE, detail)
