"""Which TensorFlow operations are plain computation, as far as TensorFlow's own registry can tell."""

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

_OPAQUE_TYPES = frozenset({tf.resource.as_datatype_enum, tf.variant.as_datatype_enum})
# An input or attribute with such a word in its name leads outside, even where TensorFlow calls the operation
# stateless: EncodeProto reads the file that its `descriptor_source` names.
_OUTSIDE_WORDS = ("address", "dir", "file", "host", "path", "pattern", "prefix", "region", "source", "token", "url")
# They end or instrument the process, run code of another compiler, or speak to other machines.
_OUTSIDE_OPS = ("Abort", "Collective", "Copy", "DTensor", "Debug", "Mlir", "TPU", "Tpu", "Xla")


def is_plain_op(name: str) -> bool:
    """Whether an operation is a function of plain tensors: no state, handle, function, path or address.

    False for a name that this TensorFlow does not know.
    """
    definition = op_def_registry.get(name)
    return definition is not None and _is_plain(definition)


def is_known_op(name: str) -> bool:
    """Whether this TensorFlow knows the operation."""
    return op_def_registry.get(name) is not None


def _is_plain(definition: Any) -> bool:
    arguments = [*definition.input_arg, *definition.output_arg]
    names = [argument.name.lower() for argument in [*definition.input_arg, *definition.attr]]
    return not (
        definition.is_stateful
        or definition.name.startswith(("_", *_OUTSIDE_OPS))
        or any(argument.is_ref or argument.type in _OPAQUE_TYPES for argument in arguments)
        or any("func" in attribute.type for attribute in definition.attr)
        or any(word in name for name in names for word in _OUTSIDE_WORDS)
    )
