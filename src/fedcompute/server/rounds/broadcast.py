"""The job that makes client checkpoints with a plan's graphs, which only worker processes load (spec/server.md 6.5)."""

from dataclasses import dataclass

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.server.graph_plans.plan import try_out
from fedcompute.server.rounds.plans import load_graphs, read_stored
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.paths import MODEL


@dataclass(frozen=True)
class BroadcastJob:
    """Where a plan with server graphs lies, and the server checkpoint to tell devices of; None: only check the plan.

    `training_iteration_id`: whose checkpoint an evaluation looks at, 0 for training.
    """

    blob_url: str
    plan_path: str
    checkpoint_path: str | None
    max_checkpoint_bytes: int
    training_iteration_id: int = 0


@dataclass(frozen=True)
class Broadcast:
    """The client checkpoint as stored, gzip; empty if the job only checked its plan."""

    client_checkpoint: bytes
    training_iteration_id: int


def broadcast(job: BroadcastJob) -> Broadcast:
    """Loads the graphs, tries them out, and makes the client checkpoint; stores nothing.

    Raises ArtifactInvalid for a plan that cannot run here and for a checkpoint that is not of its state.
    """
    blobs, limit = open_blob_store(job.blob_url), job.max_checkpoint_bytes
    graphs = load_graphs(blobs.get(MODEL, job.plan_path, limit=limit), limit)
    if job.checkpoint_path is None:
        try_out(graphs)
        return Broadcast(b"", 0)
    if job.training_iteration_id == 0:
        try_out(graphs)
    state = read_stored(blobs.get(MODEL, job.checkpoint_path, limit=limit), limit)
    return Broadcast(gzip_bytes(graphs.client_checkpoint(state)), job.training_iteration_id)
