"""Which operations of a client plan may run on a device: known ones that touch nothing outside the run."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from fedcompute.device.builtin_ops import BUILTINS
from fedcompute.device.flatbuffer import Operator, Subgraph
from fedcompute.errors import ArtifactInvalid, Reason

EXTERNAL_DATASET = "ExternalDataset"
CONTROL_FLOW = frozenset({"IF", "WHILE"})
# Operators whose first input is the name of a file: they get the run's own two files and no other.
FILE_OPS = frozenset({"RestoreV2", "SaveSlices"})
# They handle data sets, iterators, optionals, tensor lists, functions of the plan or a random state, all of this run.
_LISTED = frozenset(
    {
        "AnonymousIteratorV3",
        "Assert",
        "BatchDatasetV2",
        "ConcatenateDataset",
        "FilterDataset",
        "IteratorGetNext",
        "IteratorGetNextAsOptional",
        "MakeIterator",
        "MapDataset",
        "Multinomial",
        "OptionalFromValue",
        "OptionalGetValue",
        "OptionalHasValue",
        "OptionalNone",
        "PaddedBatchDatasetV2",
        "PrefetchDataset",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "ReduceDataset",
        "RepeatDataset",
        "ShuffleDataset",
        "SkipDataset",
        "TakeDataset",
        "TensorListFromTensor",
        "TensorListGather",
        "TensorListGetItem",
        "TensorListLength",
        "TensorListPopBack",
        "TensorListPushBack",
        "TensorListReserve",
        "TensorListSetItem",
        "TensorListStack",
        "TruncatedNormal",
        "_TensorToHashBucketFast",
    }
)
_OPAQUE_TYPES = frozenset({tf.resource.as_datatype_enum, tf.variant.as_datatype_enum})
# An input or attribute with such a word in its name leads outside, even where TensorFlow calls the operation stateless.
_OUTSIDE_WORDS = ("address", "dir", "file", "host", "path", "pattern", "prefix", "region", "token", "url")


def check_operators(program: Sequence[Subgraph]) -> None:
    """Raises ArtifactInvalid (PLAN_UNSUPPORTED) that names every operation which is unknown or not allowed here.

    Formal guarantees: of a program that passes, only `FILE_OPS` take file names, and the translator binds those to
    the input and output file of the run. Every other operation is listed here or, by TensorFlow's own registry, a
    function of plain tensors: without state, handles, functions, paths or addresses. This is no sandbox: it trusts
    the registry and the kernels.
    """
    refused = sorted({operator.name for graph in program for operator in graph.operators if not _allowed(operator)})
    if refused:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"operations that do not run here: {', '.join(refused)}")
    quantized = [tensor.name for graph in program for tensor in graph.tensors if tensor.quantized]
    if quantized:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"quantized tensor {quantized[0]}")


def _allowed(operator: Operator) -> bool:
    if operator.node is None:
        return operator.name in BUILTINS or operator.name in CONTROL_FLOW
    name = operator.node.op
    if name == EXTERNAL_DATASET or name in FILE_OPS:
        return True
    definition = op_def_registry.get(name)
    return definition is not None and (name in _LISTED or _is_plain(definition))


def _is_plain(definition: Any) -> bool:
    """Whether an operation is a function of plain tensors, as far as its registry entry can tell."""
    arguments = [*definition.input_arg, *definition.output_arg]
    names = [argument.name.lower() for argument in [*definition.input_arg, *definition.attr]]
    return not (
        definition.is_stateful
        or definition.name.startswith("_")
        or any(argument.is_ref or argument.type in _OPAQUE_TYPES for argument in arguments)
        or any("func" in attribute.type for attribute in definition.attr)
        or any(word in name for name in names for word in _OUTSIDE_WORDS)
    )
