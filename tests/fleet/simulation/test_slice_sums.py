from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.builder.config import read_config
from fedcompute.builder.sample_config import sample_config
from fedcompute.fleet.simulation.jobs import Setup
from fedcompute.fleet.simulation.setup import load
from fedcompute.fleet.simulation.slice_sums import in_threads, in_workers, local_training, slice_sum
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state
from fedcompute.protos import task_builder_pb2
from fedcompute.tensors.partial_sum import encode

SLICES = [np.array([3, 1, 2]), np.array([0, 7]), np.array([5])]


@pytest.fixture(scope="module")
def setup():
    config = read_config(sample_config(task_builder_pb2.TaskMode.TRAINING_ONLY, rounds=3, report_goal=6).encode())
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True)
    return Setup(config.config.SerializeToString(), flags.SerializeToString(), "digits-linear", "digits", 20)


@pytest.fixture(scope="module")
def told(setup):
    task = load(setup).task
    return client_checkpoint(task.process, initial_state(task.process, task.model.trainable, ()))


def test_workers_and_threads_give_the_same_bytes(setup, told):
    process, local = load(setup).task.process, local_training(setup)
    with ThreadPoolExecutor(2) as pool:
        by_threads = list(in_threads(process, local, pool)(told, SLICES))
        # The jobs are those of worker processes; here they run where the test does.
        by_workers = list(in_workers(setup, pool)(told, SLICES))
    assert [encode(one.total) for one in by_threads] == [encode(one.total) for one in by_workers]
    assert [one.total.num_inputs for one in by_threads] == [3, 2, 1]


def test_an_update_that_a_server_would_reject_is_left_out_and_counted(setup, told):
    process, local = load(setup).task.process, local_training(setup)
    broken = {name: np.full_like(value, np.inf) if value.ndim == 2 else value for name, value in told.items()}
    found = slice_sum(process, local, broken, [0, 1])
    assert (found.total.num_inputs, sum(found.rejected.values())) == (0, 2)
    assert list(found.rejected) == ["update_not_finite"] or list(found.rejected) == ["not_finite"]
