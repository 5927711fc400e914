"""The first form of a server plan: one graph that adds up, updates and writes checkpoints (spec/artifacts.md 6)."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.protos import plan_pb2, tensorflow_pb2
from fedcompute.server.graph_plans.form import Accumulator, Applied
from fedcompute.server.graph_plans.leaves import check_leaves, first_values, metric_leaf, with_metrics
from fedcompute.server.graph_plans.session import (
    UNKNOWN,
    GraphSession,
    ServerGraph,
    load_graph,
    restored_leaves,
    session,
)
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec, Tensors

_OPERATIONS = (
    "phase_init_op",
    "aggregate_into_accumulators_op",
    "intermediate_aggregate_into_accumulators_op",
    "apply_aggregrated_updates_op",
)
_CHECKPOINTS = ("write_client_init", "read_update", "write_intermediate_update", "read_intermediate_update")


@dataclass(frozen=True)
class OneGraph:
    """A plan with a `ServerPhase`: see `GraphPlan` for its methods."""

    graph: ServerGraph
    phase: plan_pb2.ServerPhase
    savepoint: plan_pb2.CheckpointOp
    update_leaves: Mapping[str, LeafSpec]
    partial_leaves: Mapping[str, LeafSpec]
    state_leaves: Mapping[str, LeafSpec]

    def client_checkpoint(self, server_checkpoint: bytes) -> bytes:
        with session(self.graph) as opened:
            self._restore_state(opened, server_checkpoint)
            return _save(opened, self.phase.write_client_init)

    @contextlib.contextmanager
    def accumulator(self) -> Iterator[Accumulator]:
        with session(self.graph) as opened:
            opened.run([self.phase.phase_init_op])
            yield _Accumulator(opened, self.phase)

    def apply(self, server_checkpoint: bytes, partials: Iterable[bytes], num_inputs: int) -> Applied:
        # The form's partial sums do not say how many updates they hold.
        with session(self.graph) as opened:
            self._restore_state(opened, server_checkpoint)
            opened.run([self.phase.phase_init_op])
            for partial in partials:
                self._check_partial(partial)
                _restore(opened, self.phase.read_intermediate_update, partial)
                opened.run([self.phase.intermediate_aggregate_into_accumulators_op])
            opened.run([self.phase.apply_aggregrated_updates_op])
            saved = _save(opened, self.savepoint)
            values = opened.run(fetch=[metric.variable_name for metric in self.phase.metrics])
        metrics = first_values([metric.stat_name for metric in self.phase.metrics], values)
        return Applied(with_metrics(saved, metrics), metrics)

    def metrics_of(self, server_checkpoint: bytes) -> dict[str, float]:
        leaves = read_checkpoint(server_checkpoint)
        names = [metric.stat_name for metric in self.phase.metrics]
        return first_values(names, [leaves[metric_leaf(name)] for name in names])

    def _restore_state(self, opened: GraphSession, server_checkpoint: bytes) -> None:
        check_leaves(read_checkpoint(server_checkpoint), self.state_leaves, Reason.STATE_MISMATCH)
        _restore(opened, self.savepoint, server_checkpoint)

    def _check_partial(self, partial: bytes) -> None:
        try:
            leaves = read_checkpoint(partial)
        except ArtifactInvalid as damaged:
            raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, damaged.detail) from damaged
        check_leaves(leaves, self.partial_leaves, Reason.PARTIAL_SUM_MISMATCH)


@dataclass(frozen=True)
class _Accumulator:
    opened: GraphSession
    phase: plan_pb2.ServerPhase

    def add(self, update: Tensors) -> None:
        # Written anew, so that TensorFlow's reader never sees what a device wrote.
        _restore(self.opened, self.phase.read_update, write_checkpoint(update))
        self.opened.run([self.phase.aggregate_into_accumulators_op])

    def partial(self) -> bytes:
        return _save(self.opened, self.phase.write_intermediate_update)


def open_one_graph(plan: plan_pb2.Plan) -> OneGraph:
    """Loads a plan's server graph and checks that it has what a server needs.

    A leaf of an update whose size the graph leaves open has no elements: the sums that such a leaf starts from have
    none, and an element-wise sum takes no other size. Raises ArtifactInvalid (PLAN_MALFORMED | PLAN_UNSUPPORTED).
    """
    phase, savepoint = plan.phase[0].server_phase, plan.server_savepoint
    checkpoints = {"server_savepoint": savepoint, **{name: getattr(phase, name) for name in _CHECKPOINTS}}
    for name, operation in checkpoints.items():
        if operation.saver_def.version != tensorflow_pb2.SaverDef.V1 or operation.side_channel_tensors:
            raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"{name} has no saver of checkpoints of version 1")
    files = [one.saver_def.filename_tensor_name for one in (*checkpoints.values(), phase.write_accumulators)]
    graph = load_graph(plan.server_graph_bytes.value, tuple(dict.fromkeys(name for name in files if name)))
    required = {name: getattr(phase, name) for name in _OPERATIONS}
    for name, operation in checkpoints.items():
        saver = operation.saver_def
        required[f"{name}'s file"] = saver.filename_tensor_name
        required[f"{name}'s node"] = saver.save_tensor_name if name.startswith("write") else saver.restore_op_name
    required["server_savepoint's save node"] = savepoint.saver_def.save_tensor_name
    for what, name in required.items():
        if not name or not graph.has(name):
            raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{what}, {name!r}, is not in the server graph")

    def leaves(operation: plan_pb2.CheckpointOp) -> dict[str, LeafSpec]:
        return restored_leaves(graph, operation.saver_def.restore_op_name)

    return OneGraph(
        graph,
        phase,
        savepoint,
        {name: _empty_where_open(leaf) for name, leaf in leaves(phase.read_update).items()},
        {name: _empty_where_open(leaf) for name, leaf in leaves(phase.read_intermediate_update).items()},
        leaves(savepoint),
    )


def _empty_where_open(leaf: LeafSpec) -> LeafSpec:
    return LeafSpec(leaf.name, tuple(0 if size == UNKNOWN else size for size in leaf.shape), leaf.dtype)


def _restore(opened: GraphSession, operation: plan_pb2.CheckpointOp, data: bytes) -> None:
    """The restore procedure of spec/artifacts.md 2.6."""
    saver = operation.saver_def
    with opened.file(data) as path:
        files = {saver.filename_tensor_name: path}
        opened.run([operation.before_restore_op], files=files)
        opened.run([saver.restore_op_name], files=files)
    opened.run([operation.after_restore_op])


def _save(opened: GraphSession, operation: plan_pb2.CheckpointOp) -> bytes:
    saver = operation.saver_def
    opened.run([operation.before_save_op])
    with opened.file() as path:
        opened.run([saver.save_tensor_name], files={saver.filename_tensor_name: path})
        if not path.is_file():
            raise OperationFailed(Reason.GRAPH_FAILED, f"{saver.save_tensor_name!r} wrote no file")
        data = path.read_bytes()
    opened.run([operation.after_save_op])
    return data
