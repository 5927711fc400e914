"""The traced functions of a functional model, and the type messages that describe their inputs and outputs."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos.computation_types_pb2 import StructType, TensorType, Type

_MAX_TYPE_BYTES = 1 << 20
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Signature:
    """The three concrete functions of spec/artifacts.md 12, each returning a flat list, and their result types.

    `training`, `inference`: (model_weights, x, training) -> outputs; `loss`: (output, label, sample_weight=None) ->
    [scalar]. None of them captures anything, so each runs inside any other graph.
    """

    training: Any
    inference: Any
    loss: Any
    output_type: Type
    loss_type: Type


def trace(
    predict_on_batch: Callable[..., Any],
    loss: Callable[..., Any],
    weights: tuple[Sequence[Any], Sequence[Any]],
    x_spec: Any,
    y_spec: Any,
) -> Signature:
    """Traces the functions for weights of fixed shapes and batches of `x_spec` and `y_spec`.

    Raises ArtifactInvalid(MODEL_UNSUPPORTED) if a function fails on these types, keeps state of its own (a variable or
    table that is no weight), returns neither a tensor nor a tuple of tensors, or a loss that is no float scalar.
    """
    weight_specs = tuple(tuple(tf.TensorSpec(w.shape, w.dtype) for w in group) for group in weights)
    types: dict[str, Type] = {}

    def flat_predict(model_weights: Any, x: Any, training: bool) -> list[Any]:
        output = predict_on_batch(model_weights, x, training)
        for part in flatten(output):
            if not isinstance(part, tf.Tensor):
                raise _unsupported(
                    f"the model's output is a {type(part).__name__}, neither a tensor nor a tuple of them"
                )
        types["output"] = type_of(output)
        return flatten(output)

    def flat_loss(output: Any, label: Any, sample_weight: None = None) -> list[Any]:
        value = loss(output, label)
        types["loss"] = type_of(value)
        return [value]

    with tf.Graph().as_default():
        training = _concrete("the model", flat_predict, weight_specs, x_spec, True)
        output_type = types["output"]
        inference = _concrete("the model", flat_predict, weight_specs, x_spec, False)
        if types["output"] != output_type:
            raise _unsupported("the model's output has another type in training than in inference")
        traced_loss = _concrete("the loss", flat_loss, spec_of(output_type), y_spec, None)
    if types["loss"].tensor.dims or not tf.as_dtype(types["loss"].tensor.dtype).is_floating:
        raise _unsupported(f"the loss is no float scalar but {traced_loss.outputs[0].dtype.name} of rank 1 or more")
    return Signature(training, inference, traced_loss, output_type, types["loss"])


def type_of(value: Any) -> Type:
    """The type message of a tensor, a TensorSpec, a tuple of them or an OrderedDict of them (spec/artifacts.md 12)."""
    if isinstance(value, dict):
        elements = [StructType.Element(name=name, value=type_of(part)) for name, part in value.items()]
        return Type(struct=StructType(element=elements))
    if isinstance(value, (tuple, list)):
        return Type(struct=StructType(element=[StructType.Element(value=type_of(part)) for part in value]))
    if not isinstance(value, (tf.Tensor, tf.TensorSpec)):
        raise _unsupported(f"{type(value).__name__} has no type specification")
    dtype = value.dtype.as_datatype_enum
    if value.shape.rank is None:
        return Type(tensor=TensorType(dtype=dtype, unknown_rank=True))
    dims = [-1 if size is None else size for size in value.shape]
    return Type(tensor=TensorType(dtype=dtype, dims=dims))


def spec_of(message: Type, depth: int = 0) -> Any:
    """The reverse of `type_of`: a TensorSpec, a tuple of them, or an OrderedDict where the elements carry names.

    Raises ArtifactInvalid(SAVED_MODEL_INVALID) for any other type and for structures more than 8 deep.
    """
    kind = message.WhichOneof("type")
    if kind == "tensor" and message.tensor.dtype and min(message.tensor.dims, default=0) >= -1:
        shape = None if message.tensor.unknown_rank else [None if size < 0 else size for size in message.tensor.dims]
        return tf.TensorSpec(shape, tf.as_dtype(message.tensor.dtype))
    if kind == "struct" and depth < _MAX_DEPTH:
        elements = message.struct.element
        names = {element.name for element in elements}
        if not any(names):
            return tuple(spec_of(element.value, depth + 1) for element in elements)
        if all(names) and len(names) == len(elements):
            return OrderedDict((element.name, spec_of(element.value, depth + 1)) for element in elements)
    raise ArtifactInvalid(Reason.SAVED_MODEL_INVALID, f"a type specification of kind {kind} cannot be used")


def parse_type(data: bytes) -> Type:
    """Parses a serialized type message of at most 1 MiB; raises ArtifactInvalid(SAVED_MODEL_INVALID)."""
    if len(data) > _MAX_TYPE_BYTES:
        raise ArtifactInvalid(Reason.SAVED_MODEL_INVALID, f"a type specification of {len(data)} bytes")
    try:
        return Type.FromString(data)
    except DecodeError as error:
        raise ArtifactInvalid(Reason.SAVED_MODEL_INVALID, "a type specification cannot be parsed") from error


def flatten(output: Any) -> list[Any]:
    """The tensors of an output, in order."""
    return list(output) if isinstance(output, (tuple, list)) else [output]


def pack(flat: Sequence[Any], output_type: Type) -> Any:
    """Gives a flat result its type again: a single tensor, or a tuple."""
    return tuple(flat) if output_type.WhichOneof("type") == "struct" else flat[0]


def _concrete(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        concrete = tf.function(function, autograph=False).get_concrete_function(*arguments)
    except ArtifactInvalid:
        raise
    # Model code is the user's and may raise anything.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise _unsupported(f"{what} fails on the input specification: {type(error).__name__}: {reason[0]}") from error
    if concrete.captured_inputs:
        raise _unsupported(f"{what} reads {len(concrete.captured_inputs)} variables or tables that are no weights")
    return concrete


def _unsupported(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.MODEL_UNSUPPORTED, detail)
