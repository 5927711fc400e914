"""Partial sums of contributions: `fedcompute.v1.PartialSum`, its arithmetic and its bytes.

Lattice leaves are int64 in units of a public step, so their sum does not depend on order or batching; real leaves are
float64 and are merged in stored order.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import learning_pb2
from fedcompute.tensors.wire import chunk, chunk_header, integer, varint

VERSION = 1
# An int64 lattice sum of contributions that each stay below 2**31 steps cannot overflow below this many.
MAX_INPUTS = 1 << 31
BYTES_LIMIT = 8 << 30

_FIXED_64 = 1  # wire type
_VERSION_FIELD, _NUM_INPUTS, _PLAN_DIGEST, _LEAVES = (
    learning_pb2.PartialSum.DESCRIPTOR.fields_by_name[name].number
    for name in ("version", "num_inputs", "plan_digest", "leaves")
)
_NAME, _SHAPE, _LATTICE, _REAL, _STEP = (
    learning_pb2.PartialSum.Leaf.DESCRIPTOR.fields_by_name[name].number
    for name in ("name", "shape", "lattice", "real", "lattice_step")
)


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
    # By hand, since protobuf copies every value three times; byte for byte what it would make.
    pieces: list[bytes | memoryview] = [integer(_VERSION_FIELD, VERSION)]
    if total.num_inputs:
        pieces.append(integer(_NUM_INPUTS, total.num_inputs))
    if total.plan_digest:
        pieces.append(chunk(_PLAN_DIGEST, total.plan_digest))
    for name, lattice in total.lattice.items():
        pieces += _leaf(name, lattice.astype("<i8", copy=False), _LATTICE, total.steps[name])
    for name, real in total.real.items():
        pieces += _leaf(name, real.astype("<f8", copy=False), _REAL, 0.0)
    return b"".join(pieces)


def _leaf(name: str, values: NDArray[Any], number: int, step: float) -> list[bytes | memoryview]:
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    head = chunk(_NAME, name.encode()) if name else b""
    if values.shape:
        head += chunk(_SHAPE, b"".join(varint(size) for size in values.shape))
    head += chunk_header(number, len(content))
    tail = struct.pack("<Bd", _STEP << 3 | _FIXED_64, step) if step else b""
    return [chunk_header(_LEAVES, len(head) + len(content) + len(tail)) + head, content, tail]


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
