"""The second form of a server plan: a graph before the round, sums without TensorFlow, a graph after it.

Source: spec/artifacts.md 7.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.server.graph_plans.form import Accumulator, Applied
from fedcompute.server.graph_plans.leaves import check_size, first_values, metric_leaf, with_metrics
from fedcompute.server.graph_plans.session import GraphRefused, ServerGraph, load_graph, node_of, session
from fedcompute.server.graph_plans.sums import RunningSums, SumSpec, read_sums
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec


@dataclass(frozen=True)
class _Step:
    """One of the two graphs: `inputs` and `outputs` are its file tensors, in the order of the router's fields."""

    graph: ServerGraph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    targets: tuple[str, ...]
    fetch: tuple[str, ...]

    def run(self, given: Sequence[bytes]) -> tuple[list[bytes], list[float]]:
        """Runs the graph once on files; returns the files that it writes, and its metrics.

        Raises as `GraphSession.run`, and GRAPH_FAILED for a file that is not written.
        """
        with session(self.graph) as opened, contextlib.ExitStack() as stack:
            paths = [stack.enter_context(opened.file(data)) for data in given]
            written = [stack.enter_context(opened.file()) for _ in self.outputs]
            values = opened.run(
                self.targets, self.fetch, dict(zip(self.inputs + self.outputs, paths + written, strict=True))
            )
            for name, path in zip(self.outputs, written, strict=True):
                if not path.is_file():
                    raise OperationFailed(Reason.GRAPH_FAILED, f"nothing was written to {name!r}")
            return [path.read_bytes() for path in written], list(first_values(self.fetch, values).values())


@dataclass(frozen=True)
class TwoGraphs:
    """A plan with a `ServerPhaseV2`: see `GraphPlan` for its methods."""

    prepare: _Step | None
    result: _Step | None
    sums: tuple[SumSpec, ...]

    @property
    def update_leaves(self) -> Mapping[str, LeafSpec]:
        return {one.source.name: one.source for one in self.sums}

    def client_checkpoint(self, server_checkpoint: bytes) -> bytes:
        return self._prepare(server_checkpoint)[0]

    @contextlib.contextmanager
    def accumulator(self) -> Iterator[Accumulator]:
        yield RunningSums(self.sums)

    def apply(self, server_checkpoint: bytes, partials: Iterable[bytes], num_inputs: int) -> Applied:
        total = RunningSums(self.sums)
        for partial in partials:
            total.merge(partial)
        if total.num_inputs != num_inputs:
            raise ArtifactInvalid(
                Reason.PARTIAL_SUM_MISMATCH, f"the partial sums hold {total.num_inputs} updates, not {num_inputs}"
            )
        aggregate = write_checkpoint(total.report())
        if self.result is None:
            return Applied(aggregate, {})
        _, intermediate_state = self._prepare(server_checkpoint)
        (saved,), values = self.result.run([intermediate_state, aggregate])
        metrics = dict(zip(self._metric_names, values, strict=True))
        return Applied(with_metrics(saved, metrics), metrics)

    def metrics_of(self, server_checkpoint: bytes) -> dict[str, float]:
        leaves = read_checkpoint(server_checkpoint)
        return first_values(self._metric_names, [leaves[metric_leaf(name)] for name in self._metric_names])

    @property
    def _metric_names(self) -> list[str]:
        return [] if self.result is None else [node_of(name) for name in self.result.fetch]

    def _prepare(self, server_checkpoint: bytes) -> tuple[bytes, bytes]:
        """The client checkpoint and the state that the second graph starts from; both empty without a first graph."""
        for name, leaf in read_checkpoint(server_checkpoint).items():
            check_size(name, leaf.nbytes)
        if self.prepare is None:
            return b"", b""
        try:
            (client, state), _ = self.prepare.run([server_checkpoint])
        except GraphRefused as refused:
            raise ArtifactInvalid(Reason.STATE_MISMATCH, refused.detail) from refused
        return client, state


def open_two_graphs(plan: plan_pb2.Plan) -> TwoGraphs:
    """Loads a plan's graphs and checks that they, their specs and their routers fit (spec/server.md annex B).

    Raises ArtifactInvalid (PLAN_MALFORMED | PLAN_UNSUPPORTED).
    """
    phase = plan.phase[0].server_phase_v2
    prepare, result = phase.prepare_router, phase.result_router
    return TwoGraphs(
        _step(
            "prepare",
            plan.server_graph_prepare_bytes.value,
            phase.tensorflow_spec_prepare if phase.HasField("tensorflow_spec_prepare") else None,
            (prepare.prepare_server_state_input_filepath_tensor_name,),
            (
                prepare.prepare_output_filepath_tensor_name,
                prepare.prepare_intermediate_state_output_filepath_tensor_name,
            ),
            routed=phase.HasField("prepare_router"),
        ),
        _step(
            "result",
            plan.server_graph_result_bytes.value,
            phase.tensorflow_spec_result if phase.HasField("tensorflow_spec_result") else None,
            (
                result.result_intermediate_state_input_filepath_tensor_name,
                result.result_aggregate_result_input_filepath_tensor_name,
            ),
            (result.result_server_state_output_filepath_tensor_name,),
            routed=phase.HasField("result_router"),
        ),
        read_sums(phase.aggregations),
    )


def _step(
    what: str,
    definition: bytes,
    spec: plan_pb2.TensorflowSpec | None,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    *,
    routed: bool,
) -> _Step | None:
    if len({bool(definition), spec is not None, routed}) != 1:
        raise _malformed(f"of the {what} graph, its spec and its router one is missing")
    if spec is None:
        return None
    if sorted(one.name for one in spec.input_tensor_specs) != sorted(inputs + outputs):
        raise _malformed(f"the inputs of the {what} graph are not the files of its router")
    if spec.constant_inputs or not spec.target_node_names or (what == "prepare" and spec.output_tensor_specs):
        raise _malformed(f"the {what} graph has constant inputs, no target, or outputs that it should not have")
    graph = load_graph(definition, inputs + outputs)
    fetch = tuple(one.name for one in spec.output_tensor_specs)
    for name in (*spec.target_node_names, *fetch):
        if not graph.has(name):
            raise _malformed(f"{name!r} is not in the {what} graph")
    return _Step(graph, inputs, outputs, tuple(spec.target_node_names), fetch)


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.PLAN_MALFORMED, detail)
