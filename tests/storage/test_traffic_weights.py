"""Traffic weight 0: never while a task of another weight is at work."""

import pytest

from fedcompute.storage.check_ins import Assigned, Declined, DeclineKind
from fedcompute.storage.iterations import move_iteration
from fedcompute.storage.schema import IterationStatus
from fedcompute.storage.tasks import complete_task, pause_task


@pytest.fixture
def tasks(collecting):
    """A training task with room for one device, and an evaluation of weight 0 with room for many."""

    def make(**fields):
        training = collecting(max_aggregation_size=1, min_aggregation_size=1, weight=5, **fields)
        return training, collecting(evaluates=1, weight=0, max_aggregation_size=50)

    return make


def test_a_full_round_of_the_other_task_gives_weight_zero_no_devices(tasks, check_in):
    training, _ = tasks()
    assert check_in().iteration.key == training
    assert check_in() == Declined(DeclineKind.ITERATION_FULL)


def test_a_closed_round_of_the_other_task_gives_weight_zero_no_devices(tasks, check_in, database, now):
    training, _ = tasks()
    with database.write() as tx:
        assert move_iteration(tx, training, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now)
    assert isinstance(check_in(), Declined)


def test_weight_zero_takes_devices_whose_version_the_other_task_does_not(tasks, check_in):
    training, evaluation = tasks(min_client_version="100")
    assert check_in(version=99).iteration.key == evaluation
    assert check_in(version=100).iteration.key == training
    assert isinstance(check_in(version=100), Declined)


@pytest.mark.parametrize("end", [pause_task, complete_task])
def test_weight_zero_takes_every_device_once_the_other_task_is_paused_or_over(tasks, check_in, database, now, end):
    training, evaluation = tasks()
    with database.write() as tx:
        assert end(tx, training.task, now)
    answers = [check_in() for _ in range(5)]
    assert all(isinstance(one, Assigned) for one in answers)
    assert {one.iteration.key for one in answers} == {evaluation}
