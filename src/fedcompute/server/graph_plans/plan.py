"""Plans with server graphs: told apart by what they hold, opened, and used to add up a batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.server.graph_plans.form import Accumulator, GraphPlan
from fedcompute.server.graph_plans.leaves import check_size, check_update
from fedcompute.server.graph_plans.session import GraphRefused
from fedcompute.server.graph_plans.v1 import open_one_graph
from fedcompute.server.graph_plans.v2 import open_two_graphs
from fedcompute.tensors.tree import Tensors

_EVALUATION_METRICS = "server/eval/"


def carries_graphs(plan: plan_pb2.Plan) -> bool:
    """Whether the server half of a plan with a phase is graphs: it has a server phase and no learning process."""
    phase = plan.phase[0]
    has_phase = phase.HasField("server_phase_v2") or phase.HasField("server_phase")
    return has_phase and not plan.HasField("learning_process")


def kind_of(plan: plan_pb2.Plan) -> learning_pb2.LearningProcess.Kind:
    """EVALUATION if all metrics of a plan with graphs are of an evaluation (spec/artifacts.md 3.3), else TRAINING."""
    phase = plan.phase[0]
    if phase.HasField("server_phase_v2"):
        names = [one.name for one in phase.server_phase_v2.tensorflow_spec_result.output_tensor_specs]
    else:
        names = [one.stat_name for one in phase.server_phase.metrics]
    evaluates = bool(names) and all(name.startswith(_EVALUATION_METRICS) for name in names)
    return learning_pb2.LearningProcess.EVALUATION if evaluates else learning_pb2.LearningProcess.TRAINING


def open_graph_plan(plan: plan_pb2.Plan) -> GraphPlan:
    """Loads the graphs of a plan; of one that carries both forms, the second (spec/artifacts.md 1).

    Raises ArtifactInvalid: PLAN_MALFORMED, CHECKPOINT_TOO_LARGE for an update with a leaf of more than 500 MiB, or
    PLAN_UNSUPPORTED for what cannot run here, also where TensorFlow is not installed.
    """
    opened: GraphPlan
    opened = open_two_graphs(plan) if plan.phase[0].HasField("server_phase_v2") else open_one_graph(plan)
    for name, leaf in opened.update_leaves.items():
        check_size(name, math.prod(leaf.shape) * leaf.dtype.itemsize)
    return opened


def try_out(plan: GraphPlan) -> None:
    """Adds up one update of zeros: a plan that cannot is found out before devices work for it.

    Raises ArtifactInvalid (PLAN_UNSUPPORTED).
    """
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in plan.update_leaves.items()}
    try:
        with plan.accumulator() as total:
            total.add(zeros)
            total.partial()
    except GraphRefused as refused:
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"an update of zeros: {refused.detail}") from refused


def update_bytes_limit(plan: GraphPlan) -> int:
    """An upper bound, in bytes, on the checkpoint file of an honest update: no upload may inflate beyond it."""
    # Ten bytes is the longest varint; names, shapes and framing stay far below 4 KiB per leaf.
    return 65_536 + sum(4_096 + 10 * math.prod(leaf.shape) for leaf in plan.update_leaves.values())


@dataclass(frozen=True)
class BatchSum:
    """A batch's partial sum, how many updates are in it, and why others are not, by session."""

    partial: bytes
    num_inputs: int
    refused: dict[str, UploadRejected]


def add_up(plan: GraphPlan, session_ids: Sequence[str], fetch: Callable[[str], Tensors]) -> BatchSum:
    """Adds the updates of sessions, in order and one at a time; each is judged alone.

    `fetch` reads an update and raises UploadRejected for one that cannot be read. Raises OperationFailed if a graph
    fails for another reason than the values of an update.
    """
    refused: dict[str, UploadRejected] = {}
    while True:
        with plan.accumulator() as total:
            spoiled = False
            for session_id in session_ids:
                if session_id in refused:
                    continue
                try:
                    _add(plan, total, fetch(session_id))
                except UploadRejected as error:
                    refused[session_id] = error
                except GraphRefused as error:
                    refused[session_id] = UploadRejected(Reason.GRAPH_FAILED, error.detail)
                    # Some of its leaves may be in the sum already: begin again without it.
                    spoiled = True
                    break
            if not spoiled:
                kept = {one: refused[one] for one in session_ids if one in refused}
                return BatchSum(total.partial(), len(session_ids) - len(kept), kept)


def _add(plan: GraphPlan, total: Accumulator, update: Tensors) -> None:
    # A function of its own, so that no name holds an update while the next one is fetched.
    check_update(update, plan.update_leaves)
    total.add(update)
