"""A TFLite flatbuffer as plain data: subgraphs, tensors, operators (spec/artifacts.md 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.lite.python import schema_py_generated as schema

from fedcompute.errors import ArtifactInvalid, Reason

_IDENTIFIER = b"TFL3"
_BUILTIN_NAMES = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_DTYPES = {
    getattr(schema.TensorType, name): dtype
    for name, dtype in (
        ("FLOAT32", tf.float32),
        ("FLOAT16", tf.float16),
        ("BFLOAT16", tf.bfloat16),
        ("FLOAT64", tf.float64),
        ("INT8", tf.int8),
        ("INT16", tf.int16),
        ("INT32", tf.int32),
        ("INT64", tf.int64),
        ("UINT8", tf.uint8),
        ("UINT16", tf.uint16),
        ("UINT32", tf.uint32),
        ("UINT64", tf.uint64),
        ("BOOL", tf.bool),
        ("STRING", tf.string),
        ("COMPLEX64", tf.complex64),
        ("COMPLEX128", tf.complex128),
        ("RESOURCE", tf.resource),
        ("VARIANT", tf.variant),
    )
    if hasattr(schema.TensorType, name)
}
_FLEX_VECTOR = 10
_FLEX_STRING_VECTOR = 15


@dataclass(frozen=True)
class FlatTensor:
    """One tensor of a subgraph. `data` is its constant buffer, empty for a computed tensor."""

    name: str
    dtype: Any  # tf.DType
    shape: tuple[int, ...]
    data: bytes
    quantized: bool

    def constant(self) -> np.ndarray:
        """The buffer as an array of `shape`; an empty buffer is a constant without elements (spec 16.5)."""
        if self.dtype == tf.string:
            strings = _strings(self.data) if self.data else []
            return np.array(strings, dtype=object).reshape(self.shape)
        if not self.data:
            return np.zeros(self.shape if 0 in self.shape else (0,), self.dtype.as_numpy_dtype)
        return np.frombuffer(self.data, self.dtype.as_numpy_dtype).reshape(self.shape)


@dataclass(frozen=True)
class Operator:
    """One operation: a builtin by its schema name, or `Flex<Op>` with the node it stands for."""

    name: str
    inputs: tuple[int, ...]  # tensor indices; -1 is an absent optional input
    outputs: tuple[int, ...]
    options: Any  # the schema's options object, None where the op has none
    node: node_def_pb2.NodeDef | None


@dataclass(frozen=True)
class Subgraph:
    """A function of the program; number 0 is the whole computation."""

    name: str
    tensors: tuple[FlatTensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: tuple[Operator, ...]


def read_flatbuffer(data: bytes) -> tuple[Subgraph, ...]:
    """Reads a TFLite model. Raises ArtifactInvalid(PLAN_MALFORMED) for anything else."""
    if data[4:8] != _IDENTIFIER:
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{len(data)} bytes that are no TFLite flatbuffer")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        return tuple(_subgraph(model, graph) for graph in model.subgraphs)
    except ArtifactInvalid:
        raise
    except Exception as error:  # the generated reader answers damage with whatever its arithmetic runs into
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"damaged TFLite flatbuffer: {type(error).__name__}") from error


def _subgraph(model: Any, graph: Any) -> Subgraph:
    tensors = tuple(_tensor(model, tensor) for tensor in graph.tensors)
    operators = tuple(_operator(model, operator) for operator in _items(graph.operators))
    subgraph = Subgraph(_text(graph.name), tensors, _indices(graph.inputs), _indices(graph.outputs), operators)
    used = [*subgraph.inputs, *subgraph.outputs]
    for operator in operators:
        used += [*operator.inputs, *operator.outputs]
    if any(not -1 <= index < len(tensors) for index in used):
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"subgraph {subgraph.name} names a tensor that it does not have")
    return subgraph


def _tensor(model: Any, tensor: Any) -> FlatTensor:
    if tensor.type not in _DTYPES:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"tensor {_text(tensor.name)} has type code {tensor.type}")
    data = model.buffers[tensor.buffer].data
    return FlatTensor(
        name=_text(tensor.name),
        dtype=_DTYPES[tensor.type],
        shape=_indices(tensor.shape),
        data=b"" if data is None else bytes(bytearray(data)),
        quantized=tensor.quantization is not None and len(_items(tensor.quantization.scale)) > 0,
    )


def _operator(model: Any, operator: Any) -> Operator:
    code = model.operatorCodes[operator.opcodeIndex]
    # Old writers fill only the deprecated one-byte field, new ones both or only the wide one.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    node = None
    if number == schema.BuiltinOperator.CUSTOM:
        name = _text(code.customCode)
        if name.startswith("Flex"):
            node = _flex_node(bytes(bytearray(_items(operator.customOptions))))
            if f"Flex{node.op}" != name:
                raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"operator {name} holds a node of op {node.op}")
    else:
        name = _BUILTIN_NAMES.get(number, f"builtin {number}")
    return Operator(name, _indices(operator.inputs), _indices(operator.outputs), operator.builtinOptions, node)


def _flex_node(options: bytes) -> node_def_pb2.NodeDef:
    """The NodeDef in a FlexBuffers vector [op name, serialized NodeDef].

    The FlexBuffers package hands strings out as text, and a NodeDef is none, hence this reader.
    """

    def number(offset: int, width: int) -> int:
        return int.from_bytes(options[offset : offset + width], "little")

    root_width = options[-1]
    root_type = options[-2] >> 2
    if root_type not in (_FLEX_VECTOR, _FLEX_STRING_VECTOR):
        raise ValueError("no vector")
    width = 1 << (options[-2] & 3)
    slot = len(options) - 2 - root_width
    vector = slot - number(slot, root_width)
    count = number(vector - width, width)
    if count != 2:
        raise ValueError("no pair")
    element = vector + width
    text = element - number(element, width)
    # The type byte of an element carries the width of the length that precedes its bytes.
    length_width = 1 << (options[vector + count * width + 1] & 3) if root_type == _FLEX_VECTOR else 1
    length = number(text - length_width, length_width)
    return node_def_pb2.NodeDef.FromString(options[text : text + length])


def _strings(data: bytes) -> list[bytes]:
    """TFLite's string buffer: int32 count, int32 offsets[count + 1], bytes."""
    count = int(np.frombuffer(data, "<i4", 1)[0])
    offsets = np.frombuffer(data, "<i4", count + 1, 4)
    return [data[offsets[i] : offsets[i + 1]] for i in range(count)]


def _items(vector: Any) -> Sequence[Any]:
    return [] if vector is None else vector


def _indices(vector: Any) -> tuple[int, ...]:
    return tuple(int(item) for item in _items(vector))


def _text(value: bytes | str | None) -> str:
    if value is None:
        return ""
    return value.decode() if isinstance(value, bytes) else value
