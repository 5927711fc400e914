from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from fedcompute.protos import task_pb2
from fedcompute.server.rounds.evaluate import candidates, choose, measurable_of
from fedcompute.storage.releases import CompletedIteration

START = datetime(2026, 1, 1, tzinfo=UTC)


def released(*hours):
    """Round 1, 2, ... completed so many hours after the start."""
    return [CompletedIteration(index + 1, START + timedelta(hours=hour)) for index, hour in enumerate(hours)]


def every(*, rounds=0, hours=0):
    selector = task_pb2.CheckPointSelector()
    if rounds:
        selector.iteration_selector.size = rounds
    else:
        selector.duration_selector.hours = hours
    return selector


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [1, 4]), (9, [1])])
def test_every_k_rounds_admits_the_first_of_each_k(size, expected):
    assert candidates(every(rounds=size), released(1, 2, 3, 4, 5), START) == expected


def test_every_k_hours_counts_from_the_start_of_the_task():
    assert candidates(every(hours=2), released(0.5, 1.9, 2.1, 7, 7.5), START) == [1, 3, 4]


def test_rounds_of_long_ago_are_candidates_too():
    assert candidates(every(hours=24), released(1, 24 * 400), START) == [1, 2]


def test_nothing_is_chosen_from_nothing():
    assert choose([], [1, 2]) is None


def test_the_choice_is_uniform_over_what_was_evaluated_least():
    drawn = Counter(choose([1, 3, 5, 7], [1, 1, 3]) for _ in range(2000))
    assert drawn.keys() == {5, 7}
    assert 850 < drawn[5] < 1150
    assert {choose([1, 3], [1, 3]) for _ in range(100)} == {1, 3}


def measurable(size, *, there, evaluated=()):
    return measurable_of(every(rounds=size), released(1, 2, 3, 4, 5, 6), START, there=there, evaluated=evaluated)


def test_a_lost_checkpoint_gives_its_place_to_the_next_of_its_bucket_if_it_was_not_evaluated():
    assert measurable(3, there=range(1, 7)) == [1, 4]
    assert measurable(3, there=[2, 3, 4, 5, 6]) == [2, 4]
    assert measurable(3, there=[2, 3, 4, 5, 6], evaluated=[1]) == [4]
    assert measurable(3, there=[4, 5, 6], evaluated=[1, 1]) == [4]


def test_an_evaluation_goes_on_as_long_as_any_checkpoint_is_there():
    assert measurable(3, there=[5, 6], evaluated=[1, 4]) == [5]
    assert measurable(3, there=[], evaluated=[1, 4]) == []
