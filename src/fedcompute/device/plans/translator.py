"""A TFLite client graph as a TensorFlow graph: the flatbuffer that phones run, on any TensorFlow (spec 16.5)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, node_def_pb2
from tensorflow.python.framework import op_def_registry

from fedcompute.device.plans import data_sets
from fedcompute.device.plans.builtin_ops import ACTIVATIONS, BUILTINS, Call
from fedcompute.device.plans.data_sets import DataSet
from fedcompute.device.plans.flatbuffer import Operator, Subgraph, read_flatbuffer
from fedcompute.device.plans.op_rules import CONTROL_FLOW, EXTERNAL_DATASET, FILE_OPS, check_operators
from fedcompute.errors import ArtifactInvalid, FedComputeError, Reason

_SEEDS = ("seed", "seed2")
# A large model has some thousand; subgraphs that call each other could make any number.
_MAX_OPERATIONS = 100_000


@dataclass(frozen=True)
class TranslatedGraph:
    """A client graph, ready for a session.

    `inputs`: the program's name of an input (of a plan: with `:0`) -> placeholder. `examples`: placeholder of a string
    vector, one serialized example per element. `target`: runs every side effect. `outputs`: declared output tensors.
    `example_limit`: how many examples a run takes at most, None for all.
    """

    graph: Any
    inputs: Mapping[str, Any]
    examples: Any
    target: Any
    outputs: tuple[Any, ...]
    example_limit: int | None


def translate(flatbuffer: bytes) -> TranslatedGraph:
    """Rebuilds a TFLite flatbuffer as a TensorFlow graph.

    Examples enter as a tensor and never as a file, so no training data reaches the disk.
    Raises ArtifactInvalid: PLAN_MALFORMED if the bytes are no such program, OPS_NOT_SUPPORTED naming the operations
    that do not run here, PLAN_UNSUPPORTED for other parts that do not; all before anything of the plan has run.
    """
    program = read_flatbuffer(flatbuffer)
    if not program:
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, "a flatbuffer without subgraphs")
    check_operators(program)
    main = program[0]
    graph = tf.Graph()
    try:
        with graph.as_default():
            examples = tf.compat.v1.placeholder(tf.string, [None], "examples")
            inputs = [_placeholder(main, index) for index in main.inputs]
            translation = _Translation(program, examples)
            outputs, effects = translation.subgraph(0, inputs)
            target = tf.group(*effects, *outputs)
        example_limit = _example_limit(main)
    except FedComputeError:
        raise
    except Exception as error:  # shape inference and op construction refuse in many ways; the plan is at fault in all
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"the graph does not build: {_first_line(error)}") from error
    graph.finalize()
    return TranslatedGraph(
        graph=graph,
        inputs={main.tensors[index].name: tensor for index, tensor in zip(main.inputs, inputs, strict=True)},
        examples=examples,
        target=target,
        outputs=tuple(outputs),
        example_limit=example_limit,
    )


class _Translation:
    """Builds subgraphs of one program into the current default graph."""

    def __init__(self, program: Sequence[Subgraph], examples: Any) -> None:
        self.program = program
        self.examples = examples
        self.depth = 0
        self.built = 0
        self.seeded = any(_is_seeded(operator) for graph in program for operator in graph.operators)

    def subgraph(self, number: int, arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Adds subgraph `number`, applied to `arguments`: its outputs, and the operations with side effects."""
        graph = self._graph_at(number)
        if len(arguments) != len(graph.inputs):
            raise ArtifactInvalid(
                Reason.PLAN_MALFORMED, f"{len(arguments)} arguments for {len(graph.inputs)} inputs of {graph.name}"
            )
        # A subgraph that calls itself would otherwise build for ever.
        if self.depth > len(self.program):
            raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"subgraph {graph.name} calls itself")
        self.depth += 1
        values: dict[int, Any] = dict(zip(graph.inputs, arguments, strict=True))
        effects: list[Any] = []
        self.built += len(graph.operators)
        if self.built > _MAX_OPERATIONS:
            raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"a graph of more than {_MAX_OPERATIONS} operations")
        for operator in graph.operators:
            ordered = operator.name in CONTROL_FLOW or _is_stateful(operator)
            # TFLite executes in list order; between operations with effects the order is part of the meaning.
            with tf.control_dependencies(effects[-1:] if ordered else []):
                inputs = [self._value(graph, values, index) for index in operator.inputs]
                results, operation = self._operator(graph, operator, inputs)
            if len(results) != len(operator.outputs):
                raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{operator.name} has {len(results)} outputs")
            values.update(zip(operator.outputs, results, strict=True))
            if ordered:
                effects.append(operation if operation is not None else results[0].op)
        self.depth -= 1
        return [_tensor(self._value(graph, values, index)) for index in graph.outputs], effects

    def _graph_at(self, number: int) -> Subgraph:
        if not 0 <= number < len(self.program):
            raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"no subgraph {number}")
        return self.program[number]

    def _value(self, graph: Subgraph, values: dict[int, Any], index: int) -> Any:
        if index == -1:
            return None
        if index not in values:
            # Not kept in `values`: a constant made inside a branch belongs to that branch's graph.
            tensor = graph.tensors[index]
            return tf.constant(tensor.constant(), tensor.dtype)
        return values[index]

    def _operator(self, graph: Subgraph, operator: Operator, inputs: list[Any]) -> tuple[list[Any], Any]:
        """The operation's outputs, and the operation itself where there may be none."""
        if operator.node is not None and (data := self._data_set(graph, operator, inputs)) is not None:
            return data, None
        inputs = [_tensor(value) for value in inputs]
        if operator.name == "IF":
            return self._if(operator, inputs), None
        if operator.name == "WHILE":
            return self._while(operator, inputs), None
        if operator.node is not None:
            operation = self._flex(graph, operator, inputs)
            return list(operation.outputs), operation
        declared = tuple(graph.tensors[index] for index in operator.outputs)
        results = BUILTINS[operator.name](Call(inputs, operator.options, declared))
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        activation = ACTIVATIONS[getattr(operator.options, "fusedActivationFunction", 0)]
        return [activation(result) for result in results], None

    def _data_set(self, graph: Subgraph, operator: Operator, inputs: list[Any]) -> list[Any] | None:
        """The outputs of an operation on a data set over the examples, None for any other operation."""
        node = operator.node
        assert node is not None
        if node.op == EXTERNAL_DATASET:
            return [data_sets.source(self.examples)]
        if not inputs or not isinstance(data := inputs[0], DataSet):
            return None

        def handle() -> Any:
            return self._flex(graph, operator, [_tensor(value) for value in inputs]).outputs[0]

        match node.op:
            case "TakeDataset":
                return [data_sets.take(data, inputs[1], handle)]
            case "BatchDatasetV2":
                batches = data_sets.batch(data, self.examples, inputs[1], inputs[2], handle)
                return None if batches is None else [batches]
            # A session keeps what its random operations have drawn, and a run must not depend on the one before.
            case "MapDataset" | "ReduceDataset" if not self.seeded:
                return self._applied(graph, operator, data, inputs[1:], handle)
        return None

    def _applied(
        self, graph: Subgraph, operator: Operator, data: DataSet, inputs: list[Any], handle: Callable[[], Any]
    ) -> list[Any]:
        """A data set's function as a part of this graph: a further data set, or the final state of a reduction.

        `inputs`: the state of a reduction, then what the function captures.
        """
        node = operator.node
        assert node is not None
        count = len(node.attr["Tstate"].list.type) if node.op == "ReduceDataset" else 0
        start, captured = inputs[:count], inputs[count:]
        shapes = _element_shapes(graph, operator.inputs[0])
        number = self._number(operator, node.attr["f"].func.name, count + len(shapes) + len(captured))

        def function(state: list[Any], element: list[Any]) -> list[Any]:
            return self._branch(number, [*state, *data_sets.shaped(element, shapes), *captured])

        if node.op == "MapDataset":
            return [data_sets.mapped(data, lambda element: function([], element), handle)]
        return data_sets.reduced(data, start, function, _shapes(node)[:count])

    def _number(self, operator: Operator, name: str, arguments: int) -> int:
        """The number of the subgraph called `name`, which takes so many arguments."""
        numbers = [number for number, candidate in enumerate(self.program) if candidate.name == name]
        if not numbers:
            raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{operator.name} names a function that the plan lacks")
        wanted = len(self.program[numbers[0]].inputs)
        if arguments != wanted:
            raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{operator.name}: {name} takes {wanted} values")
        return numbers[0]

    def _branch(self, number: int, arguments: Sequence[Any]) -> list[Any]:
        outputs, effects = self.subgraph(number, arguments)
        if not effects:
            return outputs
        with tf.control_dependencies(effects):
            return [tf.identity(output) for output in outputs]

    def _if(self, operator: Operator, inputs: list[Any]) -> list[Any]:
        options = operator.options
        return list(
            tf.cond(
                tf.reshape(inputs[0], []),
                lambda: self._branch(options.thenSubgraphIndex, inputs[1:]),
                lambda: self._branch(options.elseSubgraphIndex, inputs[1:]),
            )
        )

    def _while(self, operator: Operator, inputs: list[Any]) -> list[Any]:
        options = operator.options
        opaque = (tf.variant, tf.resource)
        # A loop variable may change its shape from turn to turn; handles keep theirs.
        shapes = [value.shape if value.dtype in opaque else tf.TensorShape(None) for value in inputs]
        return list(
            tf.while_loop(
                lambda *state: tf.reshape(self._branch(options.condSubgraphIndex, state)[0], []),
                lambda *state: self._branch(options.bodySubgraphIndex, state),
                inputs,
                shape_invariants=shapes,
                parallel_iterations=1,
            )
        )

    def _flex(self, graph: Subgraph, operator: Operator, inputs: list[Any]) -> Any:
        node = operator.node
        assert node is not None
        if node.op in FILE_OPS and (graph is not self.program[0] or operator.inputs[0] not in graph.inputs):
            raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"{node.op} of a file that is not the run's own")
        known = {attribute.name for attribute in op_def_registry.get(node.op).attr}
        # A newer converter writes attributes that this TensorFlow does not know yet.
        attributes = {name: value for name, value in node.attr.items() if name in known}
        for name, value in attributes.items():
            if value.HasField("func"):
                function = self._function(graph, operator, value.func.name, inputs)
                attributes[name] = attr_value_pb2.AttrValue(func=attr_value_pb2.NameAttrList(name=function))
        return tf.compat.v1.get_default_graph().create_op(node.op, inputs, dtypes=None, attrs=attributes)

    def _function(self, graph: Subgraph, operator: Operator, name: str, inputs: list[Any]) -> bytes:
        """Traces the subgraph called `name` as a function on the elements of the data set in `inputs[0]`."""
        node = operator.node
        assert node is not None
        state = len(node.attr["Tstate"].list.type) if node.op == "ReduceDataset" else 0
        shapes = [
            *(_shapes(node)[:state]),
            *_element_shapes(graph, operator.inputs[0]),
            *(value.shape for value in inputs[1 + state :]),
        ]
        target = self._number(operator, name, len(shapes))
        specs = [
            tf.TensorSpec(shape, self.program[target].tensors[index].dtype)
            for shape, index in zip(shapes, self.program[target].inputs, strict=True)
        ]

        def body(*arguments: Any) -> list[Any]:
            return self._branch(target, arguments)

        function = tf.function(body, autograph=False).get_concrete_function(*specs)
        function.add_to_graph(tf.compat.v1.get_default_graph())
        name_bytes = function.name
        return name_bytes if isinstance(name_bytes, bytes) else str(name_bytes).encode()


def _placeholder(main: Subgraph, index: int) -> Any:
    tensor = main.tensors[index]
    # Paths and tokens are scalars; of other inputs the converter freezes unknown dimensions to 1.
    return tf.compat.v1.placeholder(tensor.dtype, [] if tensor.dtype == tf.string else None)


def _tensor(value: Any) -> Any:
    """The value as a tensor, for operations that know no other data sets than TensorFlow's."""
    return value.handle() if isinstance(value, DataSet) else value


def _is_stateful(operator: Operator) -> bool:
    # The registry may not know ExternalDataset, and reading the examples changes nothing.
    if operator.node is None or operator.node.op == EXTERNAL_DATASET:
        return False
    definition = op_def_registry.get(operator.node.op)
    return operator.node.op in FILE_OPS or (definition is not None and definition.is_stateful)


def _is_seeded(operator: Operator) -> bool:
    """Whether an operation draws random numbers that are the same whenever it starts anew."""
    if operator.node is None:
        return any(getattr(operator.options, name, 0) for name in _SEEDS)
    return _is_stateful(operator) and any(operator.node.attr[name].i for name in _SEEDS if name in operator.node.attr)


def _shapes(node: node_def_pb2.NodeDef) -> list[Any]:
    return [tf.TensorShape(shape) for shape in node.attr["output_shapes"].list.shape]


def _element_shapes(graph: Subgraph, dataset: int) -> list[Any]:
    """Shapes of one element of the data set in tensor `dataset`, as its producer declares them."""
    for operator in graph.operators:
        if dataset in operator.outputs and operator.node is not None:
            return [tf.TensorShape([])] if operator.node.op == EXTERNAL_DATASET else _shapes(operator.node)
    raise ArtifactInvalid(Reason.PLAN_MALFORMED, "a function over a data set of unknown elements")


def _example_limit(main: Subgraph) -> int | None:
    """The most examples that a run draws: batch size times batches taken, where the graph says so by constants."""
    batch = 1
    limit: int | None = None
    for operator in main.operators:
        if operator.node is None or operator.node.op not in ("BatchDatasetV2", "TakeDataset"):
            continue
        values = main.tensors[operator.inputs[1]]
        if not values.data:
            return None
        count = int(np.ravel(values.constant())[0])
        if operator.node.op == "BatchDatasetV2":
            batch *= count
        elif count >= 0:
            limit = min(count * batch, limit) if limit is not None else count * batch
    return limit


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
