"""Stored artifacts as the server reads them: the server half of a task's plan, and what the devices' half tells it."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from fedcompute.crypto.envelope import GZIP_MAGIC, gunzip
from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.learning.plans import plan_digest, read_plan
from fedcompute.protos import learning_pb2, plan_pb2


@dataclass(frozen=True)
class ServerPlan:
    """The learning process of a plan, and the SHA-256 of the plan's bytes, which binds partial sums to it."""

    process: learning_pb2.LearningProcess
    digest: bytes


def read_server_plan(stored: bytes, limit: int) -> ServerPlan:
    """Reads a stored `Plan`, gzip or not, of at most `limit` bytes uncompressed.

    Raises ArtifactInvalid(PLAN_MALFORMED | PLAN_UNSUPPORTED | CHECKPOINT_TOO_LARGE).
    """
    data = read_stored(stored, limit)
    return ServerPlan(read_plan(data).learning_process, plan_digest(data))


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
