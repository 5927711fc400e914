"""Which devices can run a client plan: the TensorFlow ops of a flatbuffer against those that devices have
(spec/task-builder.md 6)."""

import csv
import io
from collections.abc import Mapping
from importlib import resources

import tensorflow as tf
from flatbuffers import flexbuffers  # type: ignore[import-untyped]
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.python.util import _pywrap_kernel_registry

from fedcompute.errors import BuildFailed, Reason

_FLEX = "Flex"
NO_MINIMUM = "0"


def supported_ops(table: str | None = None) -> dict[str, int]:
    """Op name -> first module version that has it, from `version,op` lines; None reads the table shipped with us.

    Raises BuildFailed for a line of another form. The lowest version of an op that is listed twice counts.
    """
    if table is None:
        table = resources.files(__package__).joinpath("supported_ops.csv").read_text(encoding="utf-8")
    versions: dict[str, int] = {}
    for number, row in enumerate(csv.reader(io.StringIO(table)), start=1):
        if not row:
            continue
        if len(row) != 2 or not row[0].strip().isdecimal():
            raise BuildFailed(Reason.BUILD_FAILED, f"line {number} of the table of supported ops is not `version,op`")
        version, op = int(row[0]), row[1].strip()
        versions[op] = min(version, versions.get(op, version))
    return versions


def flex_ops(flatbuffer: bytes) -> dict[str, str]:
    """TensorFlow op name -> kernel class ("" where this TensorFlow has none) of every flex op, sorted by name.

    Raises BuildFailed for a flatbuffer that cannot be read.
    """
    try:
        return dict(sorted(_walk(_read(flatbuffer)).items()))
    except Exception as error:
        # A generated reader raises anything on damaged input, and an unread graph must not pass the check.
        raise BuildFailed(Reason.BUILD_FAILED, f"the TFLite graph cannot be read: {error}") from error


def count_ops(flatbuffer: bytes) -> int:
    """How many operations a readable flatbuffer has, functions included, builtins and flex ops alike."""
    return sum(len(subgraph.operators) for subgraph in _read(flatbuffer).subgraphs)


def _read(flatbuffer: bytes) -> schema.ModelT:
    return schema.ModelT.InitFromPackedBuf(flatbuffer)


def _walk(model: schema.ModelT) -> dict[str, str]:
    found: dict[str, str] = {}
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            code = model.operatorCodes[operator.opcodeIndex].customCode
            if code is None or not code.decode().startswith(_FLEX):
                continue
            name, node = flexbuffers.GetRoot(bytes(operator.customOptions)).AsVector
            found[name.AsStringBytes.decode()] = _kernel_class(node.AsStringBytes)
    return found


def _kernel_class(node: bytes) -> str:
    definition = tf.compat.v1.NodeDef.FromString(node)
    definition.device = "/CPU:0"
    return str(_pywrap_kernel_registry.TryFindKernelClass(definition.SerializeToString()).decode())


def min_client_version(ops: Mapping[str, str], supported: Mapping[str, int]) -> str:
    """The lowest module version that runs all of `ops` (as `flex_ops` gives them), in decimal; "0" without any.

    Raises BuildFailed (OPS_NOT_SUPPORTED) naming the ops that no version has.
    """
    unsupported = {op: kernel for op, kernel in ops.items() if op not in supported}
    if unsupported:
        raise BuildFailed(
            Reason.OPS_NOT_SUPPORTED,
            f"Cannot build the ClientOnlyPlan: Please contact Google to register these ops: {unsupported}",
        )
    return str(max((supported[op] for op in ops), default=int(NO_MINIMUM)))
