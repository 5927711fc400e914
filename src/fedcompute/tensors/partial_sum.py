"""Partial sums of contributions: `fedcompute.v1.PartialSum`, its arithmetic and its bytes.

Lattice leaves are int64 in units of a public step, so their sum does not depend on order or batching; real leaves are
float64 and are merged in stored order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import learning_pb2

VERSION = 1
# An int64 lattice sum of contributions that each stay below 2**31 steps cannot overflow below this many.
MAX_INPUTS = 1 << 31
BYTES_LIMIT = 8 << 30


@dataclass(frozen=True)
class PartialSum:
    """The sum of `num_inputs` contributions to the plan with digest `plan_digest`.

    `lattice`: leaf -> int64 array in steps of `lattice_step` model units; `real`: leaf -> float64 array.
    """

    plan_digest: bytes
    num_inputs: int
    lattice_step: float
    lattice: Mapping[str, NDArray[np.int64]]
    real: Mapping[str, NDArray[np.float64]]


def merge(first: PartialSum, second: PartialSum) -> PartialSum:
    """The sum of both. Raises ArtifactInvalid (PARTIAL_SUM_MISMATCH) unless plan, step, leaves and shapes agree."""
    if (
        (first.plan_digest, first.lattice_step) != (second.plan_digest, second.lattice_step)
        or _layout(first) != _layout(second)
        or first.num_inputs + second.num_inputs > MAX_INPUTS
    ):
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MISMATCH, "the partial sums are not of one plan and one lattice")
    return PartialSum(
        plan_digest=first.plan_digest,
        num_inputs=first.num_inputs + second.num_inputs,
        lattice_step=first.lattice_step,
        lattice={name: value + second.lattice[name] for name, value in first.lattice.items()},
        real={name: value + second.real[name] for name, value in first.real.items()},
    )


def encode(total: PartialSum) -> bytes:
    """Serialized `fedcompute.v1.PartialSum`, deterministic for equal sums."""
    leaves = [
        learning_pb2.PartialSum.Leaf(name=name, shape=value.shape, lattice=value.astype("<i8").tobytes())
        for name, value in total.lattice.items()
    ] + [
        learning_pb2.PartialSum.Leaf(name=name, shape=value.shape, real=value.astype("<f8").tobytes())
        for name, value in total.real.items()
    ]
    return learning_pb2.PartialSum(
        version=VERSION,
        num_inputs=total.num_inputs,
        plan_digest=total.plan_digest,
        lattice_step=total.lattice_step,
        leaves=leaves,
    ).SerializeToString(deterministic=True)


def decode(data: bytes) -> PartialSum:
    """Reads what `encode` wrote. Raises ArtifactInvalid (PARTIAL_SUM_MALFORMED) for anything else."""
    message = learning_pb2.PartialSum()
    try:
        if len(data) > BYTES_LIMIT:
            raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"{len(data)} bytes, over {BYTES_LIMIT}")
        message.ParseFromString(data)
    except DecodeError as cause:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"{len(data)} bytes are no partial sum") from cause
    if message.version != VERSION:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"version {message.version}, not {VERSION}")
    if message.num_inputs > MAX_INPUTS or not (math.isfinite(message.lattice_step) and message.lattice_step >= 0):
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, "the number of inputs or the lattice step is out of range")
    lattice: dict[str, NDArray[np.int64]] = {}
    real: dict[str, NDArray[np.float64]] = {}
    for leaf in message.leaves:
        kind = leaf.WhichOneof("sum")
        payload = leaf.lattice if kind == "lattice" else leaf.real
        shape = tuple(leaf.shape)
        if kind is None or min(shape, default=1) < 0 or math.prod(shape) * 8 != len(payload):
            raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"leaf {leaf.name!r} does not hold shape {shape}")
        if kind == "lattice":
            lattice[leaf.name] = np.frombuffer(payload, "<i8").reshape(shape)
        else:
            real[leaf.name] = np.frombuffer(payload, "<f8").reshape(shape)
    return PartialSum(message.plan_digest, message.num_inputs, message.lattice_step, lattice, real)


def _layout(total: PartialSum) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("lattice", value.shape) for name, value in total.lattice.items()} | {
        name: ("real", value.shape) for name, value in total.real.items()
    }
