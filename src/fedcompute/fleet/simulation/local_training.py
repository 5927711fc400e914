"""Local training of many clients in one call: what their devices would send, without devices.

One traced function trains a run of clients, one after the other: on a CPU a client's weights then stay in the cache,
which is worth more than vectors over clients. XLA compiles all of it where it has fast kernels for the model and every
client has whole batches only: it needs the shapes of all.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.framework import kernels

from fedcompute.builder.client_graph import ClientSettings, client_update
from fedcompute.fleet.simulation.client_data import ClientData
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2
from fedcompute.tensors.tree import Tensors

Update = dict[str, NDArray[Any]]
Clients = Sequence[int] | NDArray[np.int64]

# XLA's code for them and their gradients is many times slower on a CPU than TensorFlow's own kernels.
_SLOW_COMPILED = ("Conv", "DepthwiseConv", "MaxPool", "AvgPool", "FusedBatchNorm")
_COMPILED_DEVICE = "XLA_CPU_JIT"
# XLA knows them in another form.
_STRUCTURE = frozenset({"While", "StatelessWhile", "If", "StatelessIf", "PartitionedCall", "StatefulPartitionedCall"})


@dataclass(frozen=True)
class _Slices:
    """A client's batches: consecutive examples from `start` on, `count` of them; the last may be smaller."""

    columns: Any  # (x, y)
    start: tf.Tensor
    count: tf.Tensor
    batch_size: int
    only_whole: bool

    def reduce(self, initial_state: Any, reduce_func: Any) -> Any:
        whole = self.count // self.batch_size

        def step(index: tf.Tensor, state: Any) -> Any:
            batch = _cut(self.columns, self.start + index * self.batch_size, self.batch_size)
            return index + 1, reduce_func(state, batch)

        first = (tf.constant(0, tf.int64), initial_state)
        _, state = tf.while_loop(lambda index, _: index < whole, step, first, parallel_iterations=1)
        if self.only_whole:
            return state
        left = self.count - whole * self.batch_size
        rest = self.start + whole * self.batch_size
        return tf.cond(left > 0, lambda: reduce_func(state, _cut(self.columns, rest, left)), lambda: state)


def pin_threads(threads: int) -> None:
    """Lets TensorFlow run `threads` clients at a time, each on one thread; if it has run already, nothing changes."""
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


class LocalTraining:
    """The updates of a process's clients. Safe to call from many threads once `prepare` has been."""

    def __init__(
        self,
        process: learning_pb2.LearningProcess,
        model: FunctionalModel,
        settings: ClientSettings,
        data: ClientData,
        *,
        width: int,
        compiled: bool | None = None,
    ) -> None:
        """`width`: clients in one call, at most. `compiled`: whether XLA compiles the training.

        With `compiled` every client must have whole batches only; None leaves the choice to data and model.
        """
        self._width = width
        self._process, self._model, self._settings = process, model, settings
        self._starts, self._counts = data.starts[:-1], data.counts
        if settings.max_batches > 0:
            self._counts = np.minimum(self._counts, settings.max_batches * settings.batch_size)
        self._most = int(self._counts.max(initial=0))
        with tf.device("CPU"):
            self._columns = tf.nest.map_structure(tf.constant, (data.x, data.y))
        self._compiled = compiled
        self._run: Any = None

    @property
    def compiled(self) -> bool:
        """Whether XLA compiles the training."""
        if self._compiled is None:
            whole = not (self._counts % self._settings.batch_size).any()
            self._compiled = whole and _is_fast_compiled(self._one_client())
        return self._compiled

    def prepare(self) -> None:
        """Traces what `updates` runs; not for several threads at once."""
        if self._run is None:
            numbers = tf.TensorSpec([None], tf.int64)
            run = self._run_compiled() if self.compiled else self._run_clients
            self._run = tf.function(run, autograph=False).get_concrete_function(
                _received_specs(self._process), numbers, numbers
            )

    def updates(self, told: Tensors, clients: Clients) -> list[Update]:
        """The updates of at most `width` clients that received `told`: client leaf -> array, for every broadcast leaf.

        Memory: as many updates as there are clients, twice. Equal to what devices make of the same examples but for
        rounding.
        """
        self.prepare()
        chosen = np.asarray(clients, np.int64)
        received = [tf.constant(told[leaf.client_name]) for leaf in self._process.broadcasts]
        # Compiled code has one shape; a client without examples costs nothing.
        nobody = self._width - len(chosen) if self.compiled else 0
        starts, counts = (np.pad(one[chosen], (0, nobody)) for one in (self._starts, self._counts))
        found = self._run(received, tf.constant(starts), tf.constant(counts))
        stacked = {name: tensor.numpy() for name, tensor in found.items()}
        return [{name: leaf[index] for name, leaf in stacked.items()} for index in range(len(chosen))]

    def _run_clients(self, received: list[tf.Tensor], starts: tf.Tensor, counts: tf.Tensor) -> Any:
        def one(place: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
            return self._update(received, _Slices(self._columns, *place, self._settings.batch_size, only_whole=False))

        return tf.map_fn(one, (starts, counts), fn_output_signature=_update_specs(self._process), parallel_iterations=1)

    def _run_compiled(self) -> Any:
        def clients(received: list[tf.Tensor], columns: Any, counts: tf.Tensor) -> Any:
            def one(own: tuple[Any, tf.Tensor]) -> dict[str, tf.Tensor]:
                start = tf.constant(0, tf.int64)
                return self._update(received, _Slices(*own[:1], start, own[1], self._settings.batch_size, True))

            return tf.map_fn(one, (columns, counts), fn_output_signature=_update_specs(self._process))

        compiled = tf.function(clients, jit_compile=True, autograph=False)

        def run(received: list[tf.Tensor], starts: tf.Tensor, counts: tf.Tensor) -> Any:
            # A compiled function copies its arguments: it gets these clients' examples, not those of all.
            last = tf.shape(self._columns[1], tf.int64)[0] - 1
            places = tf.minimum(starts[:, tf.newaxis] + tf.range(self._most, dtype=tf.int64), last)
            columns = tf.nest.map_structure(lambda column: tf.gather(column, places), self._columns)
            return compiled(received, columns, counts)

        return run

    def _one_client(self) -> Any:
        """The training of one client, traced as XLA would get it."""

        def run(received: list[tf.Tensor], count: tf.Tensor) -> Any:
            start = tf.constant(0, tf.int64)
            return self._update(received, _Slices(self._columns, start, count, self._settings.batch_size, True))

        function = tf.function(run, autograph=False)
        return function.get_concrete_function(_received_specs(self._process), tf.TensorSpec([], tf.int64))

    def _update(self, received: list[tf.Tensor], batches: _Slices) -> dict[str, tf.Tensor]:
        told = {leaf.client_name: value for leaf, value in zip(self._process.broadcasts, received, strict=True)}
        return client_update(self._process, self._model, self._settings, told, batches)


def _cut(columns: Any, start: tf.Tensor, size: Any) -> Any:
    """The examples from `start` on, `size` of them, of every column."""

    def cut(column: tf.Tensor) -> tf.Tensor:
        inner = [int(extent) for extent in column.shape[1:]]
        begin = tf.concat([[start], tf.zeros([len(inner)], tf.int64)], 0)
        found = tf.slice(column, begin, tf.stack([tf.cast(size, tf.int64), *inner]))
        found.set_shape([size if isinstance(size, int) else None, *inner])
        return found

    return tf.nest.map_structure(cut, columns)


def _update_specs(process: learning_pb2.LearningProcess) -> dict[str, tf.TensorSpec]:
    return {leaf.spec.name: _spec(leaf.spec) for leaf in process.updates}


def _received_specs(process: learning_pb2.LearningProcess) -> list[tf.TensorSpec]:
    weights = {spec.name: _spec(spec) for spec in (*process.trainable, *process.non_trainable)}
    scalar = tf.TensorSpec([], tf.float32)
    return [weights.get(leaf.state_name, scalar) for leaf in process.broadcasts]


def _spec(spec: Any) -> tf.TensorSpec:
    return tf.TensorSpec([dim.size for dim in spec.shape.dim], tf.as_dtype(spec.dtype))


def _is_fast_compiled(traced: Any) -> bool:
    definition = traced.graph.as_graph_def()
    functions = definition.library.function
    nodes = [*definition.node, *(node for function in functions for node in function.node_def)]
    operations = {node.op for node in nodes} - {function.signature.name for function in functions} - _STRUCTURE
    return not any(one.startswith(_SLOW_COMPILED) for one in operations) and all(map(_is_compilable, operations))


def _is_compilable(operation: str) -> bool:
    registered = kernels.get_registered_kernels_for_op(operation).kernel
    return operation == "Placeholder" or any(kernel.device_type == _COMPILED_DEVICE for kernel in registered)
