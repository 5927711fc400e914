"""What a server does with a plan that carries graphs, whatever the form of the plan."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from fedcompute.tensors.tree import LeafSpec, Tensors


class Accumulator(Protocol):
    """A sum in the making."""

    def add(self, update: Tensors) -> None:
        """Adds one update of the plan's layout.

        Raises GraphRefused if the graph refuses its values; the sum is of no use then. OperationFailed otherwise.
        """

    def partial(self) -> bytes:
        """The sum so far, in the reference's form."""


@dataclass(frozen=True)
class Applied:
    """A round's outcome: the new server checkpoint with its metrics in it, and the metrics by their reported names."""

    checkpoint: bytes
    metrics: Mapping[str, float]


class GraphPlan(Protocol):
    """What a server does with a plan. Checkpoints are V1 files; a call uses no more of memory than a few of them.

    Graphs draw their noise themselves, from TensorFlow's generator: nothing here vouches for it.
    """

    @property
    def update_leaves(self) -> Mapping[str, LeafSpec]:
        """The leaves of a device's update."""

    def client_checkpoint(self, server_checkpoint: bytes) -> bytes:
        """What devices get of a server state; STATE_MISMATCH if the plan cannot read it."""

    def accumulator(self) -> AbstractContextManager[Accumulator]:
        """A sum of nothing yet."""

    def apply(self, server_checkpoint: bytes, partials: Iterable[bytes], num_inputs: int) -> Applied:
        """Merges partial sums of `num_inputs` updates in all, in their order, and applies them to a server state.

        Raises ArtifactInvalid: STATE_MISMATCH, PARTIAL_SUM_MALFORMED or PARTIAL_SUM_MISMATCH; OperationFailed
        (GRAPH_FAILED) if a graph fails. Every call draws new noise: only one outcome of a round may be released.
        """

    def metrics_of(self, server_checkpoint: bytes) -> dict[str, float]:
        """The metrics that `apply` put into a checkpoint."""
