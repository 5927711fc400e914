"""Which operations a plan's server graph may hold: computation and its own variables, and files that we name."""

from collections.abc import Collection
from typing import Any

from fedcompute.errors import ArtifactInvalid, Reason

FILE_OPS = frozenset({"RestoreV2", "SaveSlices"})
# Beside functions of plain tensors: variables, lists and arrays of the session, control flow, functions of the graph,
# random numbers and the time.
_LISTED = frozenset(
    {
        "Assert",
        "AssignAddVariableOp",
        "AssignSubVariableOp",
        "AssignVariableOp",
        "Case",
        "DestroyResourceOp",
        "If",
        "Multinomial",
        "PartitionedCall",
        "RandomGamma",
        "RandomPoissonV2",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "ReadVariableOp",
        "StatefulPartitionedCall",
        "StatelessCase",
        "StatelessIf",
        "StatelessWhile",
        "Timestamp",
        "TruncatedNormal",
        "VarHandleOp",
        "VarIsInitializedOp",
        "VariableShape",
        "While",
    }
)
_LISTED_FAMILIES = (
    "ResourceApply",
    "ResourceGather",
    "ResourceScatter",
    "ResourceStridedSlice",
    "TensorArray",
    "TensorList",
)
_PASSED_ON = ("Identity", "PlaceholderWithDefault")


def check_operations(definition: Any, file_nodes: Collection[str]) -> None:
    """Raises ArtifactInvalid (PLAN_UNSUPPORTED) naming what a GraphDef may not hold; nothing of it has run by then.

    `file_nodes`: the nodes through which the plan is told its files.

    Formal guarantees: of a graph that passes, only `FILE_OPS` take file names, none of them within a function, and
    each takes its name from one of `file_nodes`. Every other operation is listed here or, by TensorFlow's own
    registry, a function of plain tensors: without state, handles, functions, paths or addresses. This is no sandbox:
    it trusts the registry and the kernels.
    """
    functions = {one.signature.name for one in definition.library.function}
    bodies = [node for one in definition.library.function for node in one.node_def]
    refused = {node.op for node in definition.node if not _allowed(node.op, functions)}
    refused |= {node.op for node in bodies if node.op in FILE_OPS or not _allowed(node.op, functions)}
    if refused:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"operations that do not run here: {', '.join(sorted(refused))}")
    nodes = {node.name: node for node in definition.node}
    for node in definition.node:
        if node.op in FILE_OPS and _file_of(node, nodes, file_nodes) is None:
            raise ArtifactInvalid(
                Reason.PLAN_UNSUPPORTED, f"{node.op} {node.name!r} names a file that the plan does not give it"
            )


def _file_of(node: Any, nodes: dict[str, Any], file_nodes: Collection[str]) -> str | None:
    for _ in nodes:
        source, _, output = node.input[0].partition(":") if node.input else ("", "", "")
        if source in file_nodes:
            return source if output in ("", "0") else None
        if source not in nodes or nodes[source].op not in _PASSED_ON:
            return None
        node = nodes[source]
    return None


def _allowed(name: str, functions: Collection[str]) -> bool:
    # Loads TensorFlow, whose registry it asks.
    from fedcompute.models.plain_ops import is_known_op, is_plain_op

    listed = name in _LISTED or name in FILE_OPS or name.startswith(_LISTED_FAMILIES)
    if not is_known_op(name):
        return name in functions
    return listed or is_plain_op(name)
