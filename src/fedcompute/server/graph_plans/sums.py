"""The sums of plans of the second form, as the reference's aggregation core makes them (spec/artifacts.md 7, 11.3).

A sum starts from zeros of its leaf's own dtype. Updates are added in it one after the other, first to last, and partial
sums likewise: float32 sums are rounded to float32 at every step, integers wrap around.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import aggregation_pb2, plan_pb2, tensorflow_pb2
from fedcompute.tensors.tree import LeafSpec, Tensors, spec_from_proto

FEDERATED_SUM = "federated_sum"
_SUMMED_TYPES = frozenset(
    {
        tensorflow_pb2.DT_FLOAT,
        tensorflow_pb2.DT_DOUBLE,
        tensorflow_pb2.DT_INT32,
        tensorflow_pb2.DT_INT64,
        tensorflow_pb2.DT_UINT64,
    }
)


@dataclass(frozen=True)
class SumSpec:
    """One leaf of an update, and the leaf of the aggregate that holds its sum."""

    source: LeafSpec
    output_name: str


def read_sums(aggregations: Sequence[plan_pb2.ServerAggregationConfig]) -> tuple[SumSpec, ...]:
    """The sums that a plan asks for, in its order.

    Raises ArtifactInvalid (PLAN_UNSUPPORTED) for anything but sums of one leaf each.
    """
    found: list[SumSpec] = []
    for one in aggregations:
        if one.intrinsic_uri != FEDERATED_SUM or one.inner_aggregations:
            raise _unsupported(f"aggregation {one.intrinsic_uri!r}")
        if [arg.WhichOneof("arg") for arg in one.intrinsic_args] != ["input_tensor"] or len(one.output_tensors) != 1:
            raise _unsupported("a sum of anything but one leaf of the update into one of the aggregate")
        source, output = one.intrinsic_args[0].input_tensor, one.output_tensors[0]
        if source.dtype not in _SUMMED_TYPES:
            raise _unsupported(f"a sum of tensor type {source.dtype}")
        spec, result = spec_from_proto(source), spec_from_proto(output)
        if (spec.shape, spec.dtype) != (result.shape, result.dtype):
            raise _unsupported(f"a sum of {spec.name!r} into a leaf of another shape or type, {result.name!r},")
        found.append(SumSpec(spec, result.name))
    names = [[one.source.name for one in found], [one.output_name for one in found]]
    if not found or any(len(set(some)) < len(found) for some in names):
        raise _unsupported("no aggregation, or two of one name,")
    return tuple(found)


@dataclass
class RunningSums:
    """The sums so far: one array per `SumSpec`, and how many updates are in them."""

    specs: tuple[SumSpec, ...]
    num_inputs: int = 0
    sums: list[NDArray[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = [np.zeros(one.source.shape, one.source.dtype) for one in self.specs]

    def add(self, update: Tensors) -> None:
        """Adds an update that has every leaf of the specs, in its shape and dtype."""
        self._add([update[one.source.name] for one in self.specs], 1)

    def partial(self) -> bytes:
        """Serialized `CheckpointAggregatorState`: per sum the number of inputs and the values, little-endian rows."""
        states = [
            aggregation_pb2.AggVectorAggregatorState(
                num_inputs=self.num_inputs, vector_data=np.ascontiguousarray(one, one.dtype.newbyteorder("<")).tobytes()
            ).SerializeToString(deterministic=True)
            for one in self.sums
        ]
        return aggregation_pb2.CheckpointAggregatorState(aggregators=states).SerializeToString(deterministic=True)

    def merge(self, partial: bytes) -> None:
        """Adds what `partial` wrote. Raises ArtifactInvalid: PARTIAL_SUM_MALFORMED or PARTIAL_SUM_MISMATCH."""
        try:
            state = aggregation_pb2.CheckpointAggregatorState.FromString(partial)
            vectors = [aggregation_pb2.AggVectorAggregatorState.FromString(one) for one in state.aggregators]
        except DecodeError as cause:
            raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"{len(partial)} bytes are no partial sum") from cause
        sizes = [math.prod(one.source.shape) * one.source.dtype.itemsize for one in self.specs]
        inputs = {one.num_inputs for one in vectors}
        if [len(one.vector_data) for one in vectors] != sizes or len(inputs) != 1:
            raise ArtifactInvalid(
                Reason.PARTIAL_SUM_MISMATCH, f"a partial sum of {len(vectors)} leaves is not one of this plan"
            )
        values = [
            np.frombuffer(vector.vector_data, one.source.dtype.newbyteorder("<")).reshape(one.source.shape)
            for vector, one in zip(vectors, self.specs, strict=True)
        ]
        self._add(values, inputs.pop())

    def report(self) -> dict[str, NDArray[Any]]:
        """The sums under the names of the aggregate."""
        return {one.output_name: value for one, value in zip(self.specs, self.sums, strict=True)}

    def _add(self, values: Iterable[NDArray[Any]], num_inputs: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            for total, value in zip(self.sums, values, strict=True):
                total += value
        self.num_inputs += num_inputs


def _unsupported(what: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"{what} cannot run here")
