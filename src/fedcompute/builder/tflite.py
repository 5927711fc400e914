"""The TFLite form of a client graph (spec/artifacts.md 5)."""

from collections.abc import Callable, Iterable, Sequence

import tensorflow as tf
from tensorflow.lite.python.lite import TFLiteFrozenGraphConverter

from fedcompute.errors import BuildFailed, Reason


def prune(graph_def: tf.compat.v1.GraphDef, target: str) -> tf.compat.v1.GraphDef:
    """The part of a graph that its node `target` needs, functions included."""
    by_name = {node.name: node for node in graph_def.node}
    nodes = _reachable([target], lambda name: [_producer(source) for source in by_name[name].input])
    needed = tf.compat.v1.GraphDef(versions=graph_def.versions)
    needed.node.extend(node for node in graph_def.node if node.name in nodes)

    functions = {function.signature.name: function for function in graph_def.library.function}
    gradients = {gradient.function_name: gradient for gradient in graph_def.library.gradient}

    def used_by(name: str) -> list[str]:
        used = [used for used in references(functions[name].node_def) if used in functions]
        return [*used, gradients[name].gradient_func] if name in gradients else used

    reached = _reachable([name for name in references(needed.node) if name in functions], used_by)
    needed.library.function.extend(f for name, f in functions.items() if name in reached)
    needed.library.gradient.extend(g for name, g in gradients.items() if name in reached)
    return needed


def _reachable(start: Iterable[str], successors: Callable[[str], Iterable[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(successors(name))
    return reached


def _producer(source: str) -> str:
    """The node behind an input such as `a`, `a:1` or `^a`."""
    return source.removeprefix("^").split(":")[0]


def references(nodes: Iterable[tf.compat.v1.NodeDef]) -> list[str]:
    """The names of operations and functions that `nodes` use."""
    found = []
    for node in nodes:
        found.append(node.op)
        for value in node.attr.values():
            found.append(value.func.name)
            found.extend(function.name for function in value.list.func)
    return found


def convert(graph_def: tf.compat.v1.GraphDef, inputs: Sequence[str], target: str) -> bytes:
    """Converts a frozen graph of string scalar `inputs` (node names) that is run for its node `target`.

    The flatbuffer's inputs keep their order and their tensor names (`name:0`); it has no outputs. Raises BuildFailed
    with the converter's words.
    """
    arrays: list[tuple[str, list[int]]] = [(f"{name}:0", []) for name in inputs]
    converter = TFLiteFrozenGraphConverter(graph_def, None, None, arrays, [])
    converter._control_output_arrays = [target]
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    converter.experimental_enable_resource_variables = True
    converter.exclude_conversion_metadata = True
    converter._experimental_preserve_assert_op = True
    converter._experimental_unfold_large_splat_constant = True
    converter._experimental_allow_all_select_tf_ops = True
    try:
        flatbuffer = converter.convert()
    except Exception as error:
        # The converter raises whatever its passes raise; all of it means that this graph has no TFLite form.
        raise BuildFailed(Reason.BUILD_FAILED, f"the client graph has no TFLite form: {error}") from error
    return bytes(flatbuffer)
