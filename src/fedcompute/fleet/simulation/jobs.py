"""Jobs of a simulation for worker processes: plain data in and out.

TensorFlow is loaded when one runs, so that whoever makes or receives a job need not have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedcompute.models.quiet import quiet_tensorflow


@dataclass(frozen=True)
class Setup:
    """`config`, `flags`: serialized TaskConfig and ExperimentFlags. `model`: a SavedModel directory, a zip archive of
    one, or the name of a sample model. `data`: a directory of TFRecord files, one for each client, or what
    `models.datasets.load_dataset` takes, divided among `clients` by `seed`.
    """

    config: bytes
    flags: bytes
    model: str
    data: str
    clients: int
    seed: int = 0


@dataclass(frozen=True)
class RunOfSlices:
    """Slices for a worker, each the numbers of its clients; `told` is a client checkpoint."""

    setup: Setup
    told: bytes
    slices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RunJob:
    """What to run: `rounds` of a setup (None: as many as configured), measured after each `every`th.

    `threads`: clients that train at a time; None is one for each core.
    """

    setup: Setup
    rounds: int | None = None
    every: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class RoundFacts:
    """A round in numbers; see `SimulatedRound`."""

    number: int
    seconds: float
    contributions: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunResult:
    """`epsilon` at `delta` of all rounds, None without DP; `warnings`: what the builder would say of the task."""

    rounds: tuple[RoundFacts, ...]
    epsilon: float | None
    delta: float
    warnings: tuple[str, ...]


def sum_of_run(job: RunOfSlices) -> tuple[bytes, dict[str, int]]:
    """A worker's share of a round: the encoded partial sum, and rejections by reason."""
    with quiet_tensorflow():
        from fedcompute.fleet.simulation.slice_sums import in_worker, run_sum
        from fedcompute.tensors.checkpoint import read_checkpoint
        from fedcompute.tensors.partial_sum import encode

        process, training = in_worker(job.setup)
        found = run_sum(process, training, read_checkpoint(job.told), job.slices)
        return encode(found.total), dict(found.rejected)


def run_in_worker(job: RunJob) -> RunResult:
    """A whole run as a worker's job; it trains `threads` clients at a time, one if that is not set."""
    with quiet_tensorflow():
        from fedcompute.fleet.simulation.local_training import pin_threads
        from fedcompute.fleet.simulation.runs import run

        threads = job.threads or 1
        pin_threads(threads)
        return run(replace(job, threads=threads), lambda _: None)
