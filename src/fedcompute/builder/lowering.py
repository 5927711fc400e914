"""Rewrites a client graph such that phones have every operation in it (spec/artifacts.md 16.9).

Gradients are the trouble: TFLite has convolutions and poolings but not their gradients. The pass works on the finished
graph and inside its functions, so it makes no difference whether a layer was just written or loaded. Called functions
are expanded on the way, because only then are the shapes known that the forms need.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph
from tensorflow.python.framework.ops import uid
from tensorflow.python.ops.control_flow_util_v2 import create_new_tf_function

from fedcompute.builder.lowered_ops import FORMS
from fedcompute.builder.tflite import prune, references

_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_BRANCHES = frozenset({"Case", "If", "StatelessCase", "StatelessIf"})
_ELEMENT_FUNCTIONS = frozenset({"FilterDataset", "FlatMapDataset", "MapDataset", "ReduceDataset"})


@dataclass(frozen=True)
class Lowered:
    """A graph and how many operations of each name were rewritten in it."""

    graph: tf.compat.v1.GraphDef
    ops: Mapping[str, int]


def lower(graph_def: tf.compat.v1.GraphDef, target: str, ops: Collection[str] = tuple(FORMS)) -> Lowered:
    """The graph with those of `ops` rewritten that FORMS has a form for, pruned to what node `target` needs.

    Node names outside of functions stay. An operation whose attributes or shapes no form fits stays as it is.
    """
    source, result = tf.Graph(), tf.Graph()
    with source.as_default():
        tf.import_graph_def(graph_def, name="")
    with result.as_default():
        tf.import_graph_def(tf.compat.v1.GraphDef(library=graph_def.library, versions=graph_def.versions), name="")
        functions = {function.signature.name: function for function in graph_def.library.function}
        rewriting = _Rewriting(source, functions, FORMS.keys() & set(ops))
        rewriting.body(source, {}, keep_names=True)
    return Lowered(prune(result.as_graph_def(), target), dict(sorted(rewriting.ops.items())))


@dataclass
class _Rewriting:
    """Copies graphs into the current default graph, rewriting as it goes."""

    source: tf.Graph
    functions: Mapping[str, Any]
    wanted: Set[str]
    ops: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.concerned = _concerned(self.functions, self.wanted)

    def body(self, graph: tf.Graph, values: dict[Any, tf.Tensor], *, keep_names: bool = False) -> dict[Any, Any]:
        """Copies the operations of `graph`, where `values` stand for its placeholders.

        Adds to `values` the copy of every tensor, by reference. Returns per operation the ones that a control
        dependency on it means now.
        """
        done: dict[Any, list[Any]] = {}
        for op in graph.get_operations():
            if op.type == "Placeholder" and op.outputs[0].ref() in values:
                done[op.name] = []
                continue
            after = [new for before in op.control_inputs for new in done[before.name]]
            inputs = [values[tensor.ref()] for tensor in op.inputs]
            with tf.control_dependencies(after):
                outputs, effects = self._copy(op, inputs, op.name if keep_names else None)
            values.update((old.ref(), new) for old, new in zip(op.outputs, outputs, strict=True))
            done[op.name] = effects
        return done

    def _copy(
        self, op: tf.Operation, inputs: list[tf.Tensor], name: str | None
    ) -> tuple[Sequence[tf.Tensor], list[Any]]:
        if op.type in _CALLS:
            return self._expanded(op.get_attr("f").name, inputs)
        if op.type in self.wanted:
            with tf.name_scope("lowered/"):
                outputs = FORMS[op.type](op, *inputs)
            if outputs is not None:
                self.ops[op.type] += 1
                return outputs, [output.op for output in outputs]
        if op.type == "Identity" and not op.control_inputs:
            # The converter leaves some of them, where branches begin and end, and phones have no kernel for it.
            return inputs, [inputs[0].op]
        attributes = {key: value for key, value in op.node_def.attr.items() if not key.startswith("_")}
        for key, value in attributes.items():
            attributes[key] = self._with_functions(value, op, inputs)
        graph = tf.compat.v1.get_default_graph()
        copy = graph.create_op(op.type, inputs, dtypes=None, attrs=attributes, name=name)
        return copy.outputs, [copy]

    def _expanded(self, name: str, inputs: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[Any]]:
        graph = self._graph(name)
        values = {old.ref(): new for old, new in zip(graph.inputs, inputs, strict=True)}
        done = self.body(graph, values)
        outputs = [values[tensor.ref()] for tensor in graph.outputs]
        return outputs, [new for op in graph.control_outputs for new in done[op.name]]

    def _graph(self, name: str) -> FuncGraph:
        with self.source.as_default():
            return function_def_to_graph(self.functions[name])

    def _with_functions(self, value: Any, op: tf.Operation, inputs: list[tf.Tensor]) -> Any:
        """An attribute whose functions are replaced by rewritten copies, if it has any that are concerned."""
        kind = value.WhichOneof("value")
        names = [value.func.name] if kind == "func" else [function.name for function in value.list.func]
        if not self.concerned.intersection(names):
            return value
        copies = [self._function(name, op, inputs) if name in self.concerned else name for name in names]
        functions = [attr_value_pb2.NameAttrList(name=copy) for copy in copies]
        if kind == "func":
            return attr_value_pb2.AttrValue(func=functions[0])
        return attr_value_pb2.AttrValue(list=attr_value_pb2.AttrValue.ListValue(func=functions))

    def _function(self, name: str, op: tf.Operation, inputs: list[tf.Tensor]) -> str:
        old = self._graph(name)
        # TensorFlow wants names of functions to be unique in the process.
        new = FuncGraph(f"{name}_lowered_{uid()}")
        with new.as_default():
            arguments = [
                tf.compat.v1.placeholder(tensor.dtype, shape)
                for tensor, shape in zip(old.inputs, _argument_shapes(old.inputs, op, inputs), strict=True)
            ]
            values = {tensor.ref(): argument for tensor, argument in zip(old.inputs, arguments, strict=True)}
            done = self.body(old, values)
            new.inputs.extend(arguments)
            new.outputs.extend(values[tensor.ref()] for tensor in old.outputs)
            new.control_outputs.extend(dict.fromkeys(effect for op in old.control_outputs for effect in done[op.name]))
        return str(create_new_tf_function(new))


def _concerned(functions: Mapping[str, Any], wanted: Set[str]) -> set[str]:
    """The functions that contain an operation of `wanted`, or call one that does."""
    used = {name: set(references(function.node_def)) for name, function in functions.items()}
    found = {name for name, ops in used.items() if ops & wanted}
    while more := {name for name, ops in used.items() if name not in found and ops & found}:
        found |= more
    return found


def _argument_shapes(
    declared: Sequence[tf.Tensor], op: tf.Operation, inputs: Sequence[tf.Tensor]
) -> list[tf.TensorShape]:
    """What is known of a function's arguments: as declared, and as `op`, which runs it on `inputs`, supplies them."""
    supplied: list[tf.TensorShape] = []
    if op.type in _BRANCHES:
        supplied = [tensor.shape for tensor in inputs[1:]]
    elif op.type in _ELEMENT_FUNCTIONS:
        state = _shapes(op)[: len(op.get_attr("Tstate"))] if op.type == "ReduceDataset" else []
        supplied = [*state, *_shapes(inputs[0].op), *(tensor.shape for tensor in inputs[1 + len(state) :])]
    shapes = [tensor.shape for tensor in declared]
    if len(supplied) != len(shapes):
        return shapes
    return [
        shape.merge_with(other) if shape.is_compatible_with(other) else shape
        for shape, other in zip(shapes, supplied, strict=True)
    ]


def _shapes(op: tf.Operation) -> list[tf.TensorShape]:
    """The element shapes that a data set's operation declares."""
    if "output_shapes" not in op.node_def.attr:
        return []
    return [tf.TensorShape(shape) for shape in op.get_attr("output_shapes")]
