"""Stored artifacts as the server reads them: the server half of a task's plan, and what the devices' half tells it."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from fedcompute.crypto.envelope import GZIP_MAGIC, gunzip
from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.learning.catalogue import aggregator_of
from fedcompute.learning.plans import parse_plan, plan_digest, read_plan
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.server.graph_plans.form import GraphPlan
from fedcompute.server.graph_plans.plan import carries_graphs, kind_of, open_graph_plan


@dataclass(frozen=True)
class ServerPlan:
    """What a server knows of a plan at hand; `digest`, SHA-256 of the plan's bytes, binds partial sums to it.

    `process`: the learning process; of a plan with server graphs (`has_graphs`) what can be said of it as data, its
    kind alone. It makes no claim then and has no noise that a ledger could count, whatever its graphs do.
    """

    process: learning_pb2.LearningProcess
    digest: bytes
    has_graphs: bool = False

    @property
    def fixed_denominator(self) -> bool:
        """Whether a round's mean divides by the report goal however many contribute; graphs may, nothing tells."""
        if self.process.kind != learning_pb2.LearningProcess.TRAINING:
            return False
        return self.has_graphs or aggregator_of(self.process).fixed_denominator

    @property
    def overlaps(self) -> bool:
        """Whether several rounds of the plan may be under way at once; those of graphs may not."""
        return not self.has_graphs and aggregator_of(self.process).overlaps


def read_server_plan(stored: bytes, limit: int) -> ServerPlan:
    """Reads a stored `Plan`, gzip or not, of at most `limit` bytes uncompressed; its graphs are not looked at.

    Raises ArtifactInvalid(PLAN_MALFORMED | PLAN_UNSUPPORTED | CHECKPOINT_TOO_LARGE).
    """
    data = read_stored(stored, limit)
    plan = parse_plan(data)
    if carries_graphs(plan):
        return ServerPlan(learning_pb2.LearningProcess(kind=kind_of(plan)), plan_digest(data), has_graphs=True)
    return ServerPlan(read_plan(data).learning_process, plan_digest(data))


def load_graphs(stored: bytes, limit: int) -> GraphPlan:
    """Loads the server graphs of a stored plan; for worker processes, where TensorFlow is loaded with them.

    Raises ArtifactInvalid as `read_server_plan` and `open_graph_plan`.
    """
    return open_graph_plan(parse_plan(read_stored(stored, limit)))


def read_example_selector(stored: bytes, limit: int) -> plan_pb2.ExampleSelector:
    """Returns the example selector of a stored `ClientOnlyPlan`, gzip or not; empty if the plan names none.

    Raises ArtifactInvalid(PLAN_MALFORMED | CHECKPOINT_TOO_LARGE).
    """
    data = read_stored(stored, limit)
    plan = plan_pb2.ClientOnlyPlan()
    try:
        plan.ParseFromString(data)
    except DecodeError as cause:
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{len(data)} bytes are not a client-only plan") from cause
    return plan.phase.tensorflow_spec.example_selector


def read_stored(stored: bytes, limit: int) -> bytes:
    """Returns an artifact's plain bytes, at most `limit`; raises ArtifactInvalid(CHECKPOINT_TOO_LARGE | _MALFORMED)."""
    if stored[:2] != GZIP_MAGIC:
        return stored
    try:
        return gunzip(stored, limit)
    except UploadRejected as error:
        too_large = error.reason is Reason.UPLOAD_TOO_LARGE
        reason = Reason.CHECKPOINT_TOO_LARGE if too_large else Reason.CHECKPOINT_MALFORMED
        raise ArtifactInvalid(reason, error.detail) from error
