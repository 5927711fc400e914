"""A cohort's sum out of those of its slices, by threads of this process or by the workers of an executor.

Slices are merged as the leaves of a tree that halves them, so that whoever adds up a half, a quarter or a single slice
comes to the same sum, to the last bit.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import UploadRejected
from fedcompute.fleet.simulation.jobs import RunOfSlices, Setup, sum_of_run
from fedcompute.fleet.simulation.local_training import Clients, LocalTraining, pin_threads
from fedcompute.fleet.simulation.setup import load
from fedcompute.learning.contribution import add, clip_norm_told, empty_sum, judge, rules_of
from fedcompute.protos import learning_pb2
from fedcompute.server.executors import Executor
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.partial_sum import PartialSum, decode, merge
from fedcompute.tensors.tree import Tensors, spec_from_proto

Slices = Sequence[NDArray[np.int64]]

# What the updates of one call may take, bytes, and how many there are at most.
_UPDATES_BYTES = 64 << 20
_MOST_CLIENTS = 16
# More often than any list of slices can be halved.
_TO_SINGLE_SLICES = 64


@dataclass(frozen=True)
class SliceSum:
    """The sum of the contributions of one or many slices, and those that were rejected, by reason."""

    total: PartialSum
    rejected: Mapping[str, int]


SumSlices = Callable[[Tensors, Slices], SliceSum]
"""What devices are told, and the slices of a cohort -> their sum."""


def width_of(process: learning_pb2.LearningProcess) -> int:
    """How many clients are trained in one call: memory holds their updates, whatever the cohort's size."""
    size = sum(8 * int(np.prod(spec_from_proto(leaf.spec).shape)) for leaf in process.updates)
    return max(1, min(_MOST_CLIENTS, _UPDATES_BYTES // size))


def local_training(setup: Setup) -> LocalTraining:
    """The clients' training of a setup, ready to run."""
    found = load(setup)
    task = found.task
    return LocalTraining(task.process, task.model, task.client, found.clients, width=width_of(task.process))


def slice_sum(
    process: learning_pb2.LearningProcess, training: LocalTraining, told: Tensors, clients: Clients
) -> SliceSum:
    """Trains the clients of one slice and judges, bounds and adds their updates as a server does.

    Formal guarantees: those of `learning.contribution.judge` and `add`.
    """
    clip_norm = clip_norm_told(process, told)
    total, rules = empty_sum(process, b"", clip_norm), rules_of(process, clip_norm)
    rejected: Counter[str] = Counter()
    for update in training.updates(told, clients):
        try:
            total = add(total, judge(rules, update))
        except UploadRejected as error:
            rejected[error.reason.value] += 1
    return SliceSum(total, rejected)


def halved(slices: Slices, times: int) -> list[Slices]:
    """The slices in order, as runs: cut in half so many times, or until there is one in each."""
    if times == 0 or len(slices) <= 1:
        return [slices]
    middle = len(slices) // 2
    return halved(slices[:middle], times - 1) + halved(slices[middle:], times - 1)


def merge_halves(sums: Iterator[SliceSum], slices: int, times: int) -> SliceSum:
    """The sum of so many slices, from those of their runs, as `halved` makes them, in order."""
    if times == 0 or slices <= 1:
        return next(sums)
    middle = slices // 2
    first, second = merge_halves(sums, middle, times - 1), merge_halves(sums, slices - middle, times - 1)
    return SliceSum(merge(first.total, second.total), Counter(first.rejected) + Counter(second.rejected))


def run_sum(
    process: learning_pb2.LearningProcess, training: LocalTraining, told: Tensors, slices: Sequence[Clients]
) -> SliceSum:
    """The sum of a run of slices, one after the other."""
    sums = (slice_sum(process, training, told, clients) for clients in slices)
    return merge_halves(sums, len(slices), _TO_SINGLE_SLICES)


def in_threads(process: learning_pb2.LearningProcess, training: LocalTraining, pool: ThreadPoolExecutor) -> SumSlices:
    """Sums by the threads of `pool`, as many slices at a time as it has."""

    def summed(told: Tensors, slices: Slices) -> SliceSum:
        training.prepare()
        sums = pool.map(lambda clients: slice_sum(process, training, told, clients), slices)
        return merge_halves(iter(sums), len(slices), _TO_SINGLE_SLICES)

    return summed


def in_workers(setup: Setup, executor: Executor) -> SumSlices:
    """Sums by the workers of an executor; each loads the setup once, and sends one sum for each run of slices."""

    def summed(told: Tensors, slices: Slices) -> SliceSum:
        # Half of an executor's capacity waits for its workers.
        checkpoint, times = write_checkpoint(told), _halvings(executor.capacity // 2)
        futures: list[Future[tuple[bytes, dict[str, int]]]] = [
            executor.submit(sum_of_run, RunOfSlices(setup, checkpoint, tuple(tuple(one.tolist()) for one in run)))
            for run in halved(slices, times)
        ]
        return merge_halves(map(_received, futures), len(slices), times)

    return summed


def _halvings(workers: int) -> int:
    """How often to halve a cohort: a run for each worker, or some for each where they do not come out even."""
    times = max(0, workers - 1).bit_length()
    return times if workers == 1 << times else times + 2


def _received(future: "Future[tuple[bytes, dict[str, int]]]") -> SliceSum:
    total, rejected = future.result()
    return SliceSum(decode(total), rejected)


@lru_cache(maxsize=1)
def in_worker(setup: Setup) -> tuple[learning_pb2.LearningProcess, LocalTraining]:
    """A setup's process and its clients' training, ready, in a worker that trains one client at a time."""
    pin_threads(1)
    training = local_training(setup)
    training.prepare()
    return load(setup).task.process, training
