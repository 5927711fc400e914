from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.builder.config import read_config
from fedcompute.builder.sample_config import sample_config
from fedcompute.fleet.simulation.jobs import Setup
from fedcompute.fleet.simulation.setup import load
from fedcompute.fleet.simulation.slice_sums import (
    SliceSum,
    halved,
    in_threads,
    in_workers,
    local_training,
    merge_halves,
    slice_sum,
)
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state
from fedcompute.protos import task_builder_pb2
from fedcompute.tensors.partial_sum import PartialSum, encode

SLICES = [np.array(one) for one in ([3, 1, 2], [0, 7], [5], [4, 6], [8, 9, 11], [10], [12], [13, 14], [15])]


class Here:
    """An executor whose workers are threads of the test: the jobs are those of worker processes."""

    def __init__(self, pool, workers):
        self.capacity, self.jobs = 2 * workers, []
        self._pool = pool

    def submit(self, job, argument):
        self.jobs.append(argument)
        return self._pool.submit(job, argument)


@pytest.fixture(scope="module")
def setup():
    config = read_config(sample_config(task_builder_pb2.TaskMode.TRAINING_ONLY, rounds=3, report_goal=6).encode())
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True)
    return Setup(config.config.SerializeToString(), flags.SerializeToString(), "digits-linear", "digits", 20)


@pytest.fixture(scope="module")
def told(setup):
    task = load(setup).task
    return client_checkpoint(task.process, initial_state(task.process, task.model.trainable, ()))


@pytest.mark.parametrize(("workers", "jobs"), [(1, 1), (2, 2), (3, 9), (4, 4)])
def test_so_many_workers_and_threads_give_the_same_bytes(setup, told, workers, jobs):
    process, local = load(setup).task.process, local_training(setup)
    with ThreadPoolExecutor(2) as pool:
        by_threads = in_threads(process, local, pool)(told, SLICES)
        here = Here(pool, workers)
        by_workers = in_workers(setup, here)(told, SLICES)
    assert by_threads.total.real, "sums of floats are those whose order matters"
    assert encode(by_threads.total) == encode(by_workers.total)
    assert (by_workers.total.num_inputs, by_workers.rejected) == (16, {})
    assert len(here.jobs) == jobs


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("times", [0, 1, 2, 64])
def test_halves_hold_every_slice_once_and_in_order_and_are_merged_whole(count, times):
    slices = [np.array([number]) for number in range(count)]
    runs = halved(slices, times)
    assert [one.item() for run in runs for one in run] == list(range(count))
    assert len(runs) == min(count, 1 << times)
    sums = iter([SliceSum(of_inputs(len(run)), {"odd": 1}) for run in runs])
    found = merge_halves(sums, count, times)
    assert (found.total.num_inputs, found.rejected["odd"]) == (count, len(runs))
    assert next(sums, None) is None


def of_inputs(count):
    return PartialSum(b"", count, {}, {}, {"leaf": np.full(3, float(count))})


def test_an_update_that_a_server_would_reject_is_left_out_and_counted(setup, told):
    process, local = load(setup).task.process, local_training(setup)
    broken = {name: np.full_like(value, np.inf) if value.ndim == 2 else value for name, value in told.items()}
    found = slice_sum(process, local, broken, [0, 1])
    assert (found.total.num_inputs, sum(found.rejected.values())) == (0, 2)
    assert list(found.rejected) == ["update_not_finite"] or list(found.rejected) == ["not_finite"]
