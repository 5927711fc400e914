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

    `lattice`: leaf -> int64 array in steps of `steps[leaf]` model units; `real`: leaf -> float64 array.
    """

    plan_digest: bytes
    num_inputs: int
    steps: Mapping[str, float]
    lattice: Mapping[str, NDArray[np.int64]]
    real: Mapping[str, NDArray[np.float64]]


def merge(first: PartialSum, second: PartialSum) -> PartialSum:
    """The sum of both. Raises ArtifactInvalid (PARTIAL_SUM_MISMATCH) unless plan, steps, leaves and shapes agree."""
    if (
        (first.plan_digest, first.steps) != (second.plan_digest, second.steps)
        or _layout(first) != _layout(second)
        or first.num_inputs + second.num_inputs > MAX_INPUTS
    ):
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MISMATCH, "the partial sums are not of one plan and one lattice")
    return PartialSum(
        plan_digest=first.plan_digest,
        num_inputs=first.num_inputs + second.num_inputs,
        steps=first.steps,
        lattice={name: value + second.lattice[name] for name, value in first.lattice.items()},
        real={name: value + second.real[name] for name, value in first.real.items()},
    )


def encode(total: PartialSum) -> bytes:
    """Serialized `fedcompute.v1.PartialSum`, deterministic for equal sums."""
    leaves = [
        learning_pb2.PartialSum.Leaf(
            name=name, shape=value.shape, lattice=value.astype("<i8").tobytes(), lattice_step=total.steps[name]
        )
        for name, value in total.lattice.items()
    ] + [
        learning_pb2.PartialSum.Leaf(name=name, shape=value.shape, real=value.astype("<f8").tobytes())
        for name, value in total.real.items()
    ]
    return learning_pb2.PartialSum(
        version=VERSION, num_inputs=total.num_inputs, plan_digest=total.plan_digest, leaves=leaves
    ).SerializeToString(deterministic=True)


def decode(data: bytes) -> PartialSum:
    """Reads what `encode` wrote. Raises ArtifactInvalid (PARTIAL_SUM_MALFORMED) for anything else."""
    message = learning_pb2.PartialSum()
    try:
        if len(data) > BYTES_LIMIT:
            raise _malformed(f"{len(data)} bytes, over {BYTES_LIMIT}")
        message.ParseFromString(data)
    except DecodeError as cause:
        raise _malformed(f"{len(data)} bytes are no partial sum") from cause
    if message.version != VERSION:
        raise _malformed(f"version {message.version}, not {VERSION}")
    if message.num_inputs > MAX_INPUTS:
        raise _malformed(f"{message.num_inputs} inputs, over {MAX_INPUTS}")
    steps: dict[str, float] = {}
    lattice: dict[str, NDArray[np.int64]] = {}
    real: dict[str, NDArray[np.float64]] = {}
    for leaf in message.leaves:
        kind = leaf.WhichOneof("sum")
        payload = leaf.lattice if kind == "lattice" else leaf.real
        shape = tuple(leaf.shape)
        if kind is None or min(shape, default=1) < 0 or math.prod(shape) * 8 != len(payload):
            raise _malformed(f"leaf {leaf.name!r} does not hold shape {shape}")
        if kind == "real":
            real[leaf.name] = np.frombuffer(payload, "<f8").reshape(shape)
            continue
        if not (math.isfinite(leaf.lattice_step) and leaf.lattice_step > 0):
            raise _malformed(f"leaf {leaf.name!r} has lattice step {leaf.lattice_step}")
        steps[leaf.name] = leaf.lattice_step
        lattice[leaf.name] = np.frombuffer(payload, "<i8").reshape(shape)
    return PartialSum(message.plan_digest, message.num_inputs, steps, lattice, real)


def _layout(total: PartialSum) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("lattice", value.shape) for name, value in total.lattice.items()} | {
        name: ("real", value.shape) for name, value in total.real.items()
    }


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, detail)
