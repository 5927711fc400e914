"""Partial sums of a cohort's slices, by threads of this process or by the workers of an executor."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import UploadRejected
from fedcompute.fleet.simulation.jobs import Setup, SliceJob, sum_of_slice
from fedcompute.fleet.simulation.local_training import Clients, LocalTraining, pin_threads
from fedcompute.fleet.simulation.setup import load
from fedcompute.learning.contribution import add, clip_norm_told, empty_sum, judge, rules_of
from fedcompute.protos import learning_pb2
from fedcompute.server.executors import Executor
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.partial_sum import PartialSum, decode
from fedcompute.tensors.tree import Tensors, spec_from_proto

Slices = Sequence[NDArray[np.int64]]

# What the updates of one call may take, bytes, and how many there are at most.
_UPDATES_BYTES = 64 << 20
_MOST_CLIENTS = 16


@dataclass(frozen=True)
class SliceSum:
    """The sum of a slice's contributions, and those that were rejected, by reason."""

    total: PartialSum
    rejected: Mapping[str, int]


SumSlices = Callable[[Tensors, Slices], Iterator[SliceSum]]
"""What devices are told, and slices of a cohort -> the sum of each slice, in order."""


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


def in_threads(process: learning_pb2.LearningProcess, training: LocalTraining, pool: ThreadPoolExecutor) -> SumSlices:
    """Sums by the threads of `pool`, as many slices at a time as it has."""

    def sums(told: Tensors, slices: Slices) -> Iterator[SliceSum]:
        training.prepare()
        return pool.map(lambda clients: slice_sum(process, training, told, clients), slices)

    return sums


def in_workers(setup: Setup, executor: Executor) -> SumSlices:
    """Sums by the workers of an executor; each loads the setup once."""

    def sums(told: Tensors, slices: Slices) -> Iterator[SliceSum]:
        checkpoint = write_checkpoint(told)
        futures: list[Future[tuple[bytes, dict[str, int]]]] = [
            executor.submit(sum_of_slice, SliceJob(setup, checkpoint, tuple(clients.tolist()))) for clients in slices
        ]
        for future in futures:
            total, rejected = future.result()
            yield SliceSum(decode(total), rejected)

    return sums


@lru_cache(maxsize=1)
def in_worker(setup: Setup) -> tuple[learning_pb2.LearningProcess, LocalTraining]:
    """A setup's process and its clients' training, ready, in a worker that trains one client at a time."""
    pin_threads(1)
    training = local_training(setup)
    training.prepare()
    return load(setup).task.process, training
