"""Reading a plan's server half."""

import hashlib
import math

from google.protobuf.message import DecodeError

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.catalogue import AGGREGATORS
from fedcompute.learning.metrics import LOSS, METRICS
from fedcompute.learning.optimizers import OPTIMIZERS
from fedcompute.learning.specification import VERSION
from fedcompute.privacy.banded import are_usable
from fedcompute.protos import learning_pb2, plan_pb2

PLAN_BYTES_LIMIT = 512 << 20


def parse_plan(data: bytes) -> plan_pb2.Plan:
    """Parses a server plan with its one phase, whatever its server half is; raises ArtifactInvalid (PLAN_MALFORMED)."""
    plan = plan_pb2.Plan()
    try:
        if len(data) > PLAN_BYTES_LIMIT:
            raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{len(data)} bytes, over {PLAN_BYTES_LIMIT}")
        plan.ParseFromString(data)
    except DecodeError as cause:
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, f"{len(data)} bytes are no plan") from cause
    if not plan.phase:
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, "the plan has no phase")
    return plan


def read_plan(data: bytes) -> plan_pb2.Plan:
    """Parses a server plan whose server half is data.

    Raises ArtifactInvalid: PLAN_MALFORMED for bytes that are none, PLAN_UNSUPPORTED for a plan that carries no
    learning process of this version.
    """
    plan = parse_plan(data)
    process = plan.learning_process
    if process.version != VERSION:
        raise ArtifactInvalid(
            Reason.PLAN_UNSUPPORTED, f"the plan carries learning process version {process.version}, not {VERSION}"
        )
    known = {"server_optimizer": OPTIMIZERS, "aggregator": AGGREGATORS}
    for member, table in known.items():
        if process.WhichOneof(member) not in table:
            raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"the learning process has no known {member}")
    for metric in process.metrics:
        known_metric = METRICS.get(metric.name, LOSS if metric.name == LOSS.name else None)
        if known_metric is None or len(known_metric.state) != len(metric.update_names):
            raise ArtifactInvalid(
                Reason.PLAN_UNSUPPORTED,
                f"metric {metric.name!r} with {len(metric.update_names)} state leaves is unknown",
            )
    _check_bounds(process)
    if process.kind not in (learning_pb2.LearningProcess.TRAINING, learning_pb2.LearningProcess.EVALUATION):
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"unknown kind of learning process: {process.kind}")
    return plan


def _check_bounds(process: learning_pb2.LearningProcess) -> None:
    """Refuses matrices and bounds with which a round could not be computed."""
    if process.HasField("banded_mf") and not are_usable(process.banded_mf.coefficients):
        bands = len(process.banded_mf.coefficients)
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"no usable matrix of {bands} bands")
    bound = process.metric_noise
    if process.HasField("metric_noise") and not (
        0 < bound.clip_norm < math.inf and 0 <= bound.noise_multiplier < 2**19
    ):
        raise ArtifactInvalid(
            Reason.PLAN_UNSUPPORTED,
            f"metric noise with clip norm {bound.clip_norm:g} and noise multiplier {bound.noise_multiplier:g}",
        )


def plan_digest(data: bytes) -> bytes:
    """SHA-256 of the serialized plan, which binds partial sums to it."""
    return hashlib.sha256(data).digest()
