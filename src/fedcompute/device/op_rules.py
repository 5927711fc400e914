"""Which operations of a client plan may run on a device: known ones that touch nothing outside the run."""

from collections.abc import Sequence

from fedcompute.device.builtin_ops import BUILTINS
from fedcompute.device.flatbuffer import Operator, Subgraph
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.plain_ops import is_known_op, is_plain_op

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
    return is_plain_op(name) or (name in _LISTED and is_known_op(name))
