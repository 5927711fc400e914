"""Which operations of a client plan may run on a device: known ones that touch nothing outside the run."""

from collections.abc import Sequence

from tensorflow.core.framework import node_def_pb2
from tensorflow.python.util import _pywrap_kernel_registry

from fedcompute.device.plans.builtin_ops import ACTIVATIONS, BUILTINS
from fedcompute.device.plans.flatbuffer import Operator, Subgraph
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.plain_ops import is_known_op, is_plain_op

EXTERNAL_DATASET = "ExternalDataset"
CONTROL_FLOW = frozenset({"IF", "WHILE"})
# Operators whose first input is the name of a file: they get the run's own two files and no other.
FILE_OPS = frozenset({"RestoreV2", "SaveSlices"})
_REMEDY = "build the task again with operations that docs/plan-operations.md lists as run here"
# They handle data sets, iterators, optionals, tensor lists, functions of the plan or a random state, all of this run.
LISTED = frozenset(
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


def check_operators(program: Sequence[Subgraph]) -> None:
    """Raises ArtifactInvalid: OPS_NOT_SUPPORTED that names every operation which is unknown or not allowed here or has
    no kernel, PLAN_UNSUPPORTED for a quantized model.

    Formal guarantees: of a program that passes, only `FILE_OPS` take file names, and the translator binds those to
    the input and output file of the run. Every other operation is listed here or, by TensorFlow's own registry, a
    function of plain tensors: without state, handles, functions, paths or addresses. This is no sandbox: it trusts
    the registry and the kernels.
    """
    offences = (_offence(operator) for graph in program for operator in graph.operators)
    refused = sorted({offence for offence in offences if offence is not None})
    if refused:
        detail = f"operations that do not run here: {', '.join(refused)}"
        raise ArtifactInvalid(Reason.OPS_NOT_SUPPORTED, detail, remedy=_REMEDY)
    quantized = [tensor.name for graph in program for tensor in graph.tensors if tensor.quantized]
    if quantized:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"quantized tensor {quantized[0]}")


def runs_builtin(name: str) -> bool:
    """Whether TFLite's builtin operation of this schema name runs here."""
    return name in BUILTINS or name in CONTROL_FLOW


def runs_flex(name: str) -> bool:
    """Whether the TensorFlow operation runs here, inside a client plan."""
    if name == EXTERNAL_DATASET or name in FILE_OPS:
        return True
    return is_plain_op(name) or (name in LISTED and is_known_op(name))


def _offence(operator: Operator) -> str | None:
    """The operation, with what is wrong where its name does not say it; None if it may run."""
    if operator.node is None:
        if not runs_builtin(operator.name):
            return operator.name
        activation = getattr(operator.options, "fusedActivationFunction", 0)
        return None if activation in ACTIVATIONS else f"{operator.name} with activation {activation}"
    if not runs_flex(operator.node.op):
        return operator.name
    return None if _has_kernel(operator.node) else f"{operator.name} without a kernel for its types"


def _has_kernel(node: node_def_pb2.NodeDef) -> bool:
    # The translator puts another operation in its place.
    if node.op == EXTERNAL_DATASET:
        return True
    placed = node_def_pb2.NodeDef()
    placed.CopyFrom(node)
    placed.device = "/CPU:0"
    return bool(_pywrap_kernel_registry.TryFindKernelClass(placed.SerializeToString()))
