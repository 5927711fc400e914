"""What a SavedModel may contain, judged from its bytes before TensorFlow loads or runs anything of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf import saved_model_pb2

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.plain_ops import is_plain_op

MAX_GRAPH_BYTES = 256 << 20
_FILE = "saved_model.pb"
_MAIN = "the main graph"
_INTERFACE = "api_implements"
_REMEDY = "save a model of layers and plain TensorFlow operations; it may touch no file, network or Python code"

# Control flow and calls: what they run is a function of the same library, and every one of those is judged.
_CALLS = {"PartitionedCall", "StatefulPartitionedCall", "If", "StatelessIf", "While", "StatelessWhile", "Case",
          "StatelessCase"}  # fmt: skip
# Stateful by the registry, harmless in what they touch: random numbers, lists of tensors, the model's own variables.
_MODEL_OPS = _CALLS | {
    "Assert", "EmptyTensorList", "Multinomial", "ParameterizedTruncatedNormal", "RandomGamma", "RandomPoissonV2",
    "RandomShuffle", "RandomStandardNormal", "RandomUniform", "RandomUniformInt", "ReadVariableOp",
    "StatelessRandomGetAlg", "TensorListConcatV2", "TensorListElementShape", "TensorListFromTensor", "TensorListGather",
    "TensorListGetItem", "TensorListLength", "TensorListPopBack", "TensorListPushBack", "TensorListReserve",
    "TensorListResize", "TensorListSetItem", "TensorListStack", "TruncatedNormal", "VarHandleOp",
}  # fmt: skip
# What every SavedModel carries to save and restore its variables. Python's loader runs none of it.
_SAVER_OPS = _MODEL_OPS | {
    "AssignVariableOp", "DisableCopyOnRead", "MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename",
    "StaticRegexFullMatch",
}  # fmt: skip
_OBJECT_KINDS = {"user_object", "function", "bare_concrete_function", "variable", "constant", "captured_tensor"}


def check_saved_model(directory: Path) -> None:
    """Raises ArtifactInvalid (SAVED_MODEL_INVALID) for a SavedModel that could do more than compute.

    Formal guarantees: of a model that passes, every function that TensorFlow's loader can reach holds operations of
    plain tensors by TensorFlow's own registry, calls of such functions, random numbers, tensor lists and reads of its
    own variables. Operations on files stand only in functions that the saver alone calls. It is no sandbox: it trusts
    the registry, the parser and the kernels of what it lets pass; the process around it has limits.
    Source: spec/artifacts.md 12.
    """
    meta = _read(directory)
    functions = {function.signature.name: function for function in meta.graph_def.library.function}
    if len(functions) != len(meta.graph_def.library.function):
        raise _unsafe("it has two functions of one name")
    _check_objects(meta)
    saver_nodes = _saver_nodes(meta)
    savers = _reachable(_called(saver_nodes), functions)
    others = [node for node in meta.graph_def.node if not any(node is one for one in saver_nodes)]
    library = meta.graph_def.library
    roots = {*meta.object_graph_def.concrete_functions, *_called(others)}
    roots |= {name for pair in library.gradient for name in (pair.function_name, pair.gradient_func)}
    roots |= {gradient.gradient_func for gradient in library.registered_gradients}
    # TensorFlow may put one implementation of an interface in the place of another.
    roots |= {name for name, function in functions.items() if _INTERFACE in function.attr}
    # A function of the saver that anything else reaches must be as plain as the rest.
    savers -= _reachable(roots, functions)
    # Old savers stand in the main graph, which is never run: TensorFlow reads constants from it and nothing else.
    _check_nodes(_MAIN, meta.graph_def.node, _SAVER_OPS)
    for name, function in functions.items():
        _check_nodes(f"function {name[:100]}", function.node_def, _SAVER_OPS if name in savers else _MODEL_OPS)


def _read(directory: Path) -> Any:
    """The one MetaGraphDef of a SavedModel directory, with an object graph."""
    path = directory / _FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_GRAPH_BYTES + 1)
    except OSError as error:
        raise _invalid(f"{directory.name} is no SavedModel: {_FILE} cannot be read") from error
    if len(data) > MAX_GRAPH_BYTES:
        raise _invalid(f"{_FILE} has more than {MAX_GRAPH_BYTES} bytes")
    try:
        model = saved_model_pb2.SavedModel.FromString(data)
    # The parser's error type differs between protobuf's implementations.
    except Exception as error:
        raise _invalid(f"{_FILE} is damaged: {type(error).__name__}") from error
    # Without an object graph, or with two graphs, TensorFlow would run the main graph's own restore and initializers.
    if len(model.meta_graphs) != 1 or not model.meta_graphs[0].object_graph_def.nodes:
        raise _invalid(f"{_FILE} holds no single graph with objects, as TensorFlow 2 saves them")
    return model.meta_graphs[0]


def _check_objects(meta: Any) -> None:
    for node in meta.object_graph_def.nodes:
        kind = node.WhichOneof("kind")
        # Tables, assets and classes with loaders of their own act when they are loaded; functional models have none.
        if kind is not None and kind not in _OBJECT_KINDS:
            raise _unsafe(f"it holds an object of kind {kind}")
        if node.saveable_objects:
            raise _unsafe("it holds an object with functions that restore it")
        if node.registered_name or node.registered_saver:
            name = node.registered_name or node.registered_saver
            raise _unsafe(f"it holds an object of the registered class {name[:100]}")


def _saver_nodes(meta: Any) -> list[Any]:
    saver = meta.saver_def
    names = {name.split(":")[0] for name in (saver.save_tensor_name, saver.restore_op_name) if name}
    return [node for node in meta.graph_def.node if node.name in names]


def _called(nodes: Iterable[Any]) -> set[str]:
    """Names of the functions that nodes mention in any attribute, `list(func)` included."""
    names: set[str] = set()
    for node in nodes:
        # An operation may be a function's name itself.
        names.add(node.op)
        for value in node.attr.values():
            names.update(function.name for function in [value.func, *value.list.func] if function.name)
    return names


def _reachable(roots: Iterable[str], functions: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    waiting = [name for name in roots if name in functions]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [callee for callee in _called(functions[name].node_def) if callee in functions]
    return found


def _check_nodes(place: str, nodes: Iterable[Any], allowed: set[str]) -> None:
    for operation in sorted({node.op for node in nodes}):
        if operation not in allowed and not is_plain_op(operation):
            raise _unsafe(f"{place} has the operation {operation[:100]}")


def _unsafe(detail: str) -> ArtifactInvalid:
    text = f"the saved model may do more than compute: {detail}"
    return ArtifactInvalid(Reason.SAVED_MODEL_INVALID, text, remedy=_REMEDY)


def _invalid(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.SAVED_MODEL_INVALID, detail)
