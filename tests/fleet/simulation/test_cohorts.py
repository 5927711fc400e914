import itertools

import numpy as np
import pytest

from fedcompute.errors import OperationFailed
from fedcompute.fleet.simulation.cohorts import cohorts, slices


def of(counts, **changes):
    settings = {"size": 3, "minimum_examples": 1, "minimum_separation": 1, "seed": 0} | changes
    return cohorts(np.array(counts), **settings)


def test_a_cohort_has_each_client_once_and_every_client_comes():
    found = list(itertools.islice(of([1] * 10), 50))
    assert all(len(set(one.tolist())) == 3 for one in found)
    assert {client for one in found for client in one.tolist()} == set(range(10))


def test_equal_seeds_give_equal_cohorts_and_others_do_not():
    def first(seed):
        return np.concatenate(list(itertools.islice(of([1] * 50, seed=seed), 5))).tolist()

    assert first(1) == first(1) != first(2)


def test_a_client_rests_for_as_many_rounds_as_the_policy_says():
    found = list(itertools.islice(of([1] * 9, minimum_separation=3), 30))
    for number, cohort in enumerate(found):
        recent = {client for one in found[max(0, number - 2) : number] for client in one.tolist()}
        assert not recent & set(cohort.tolist())


def test_clients_with_too_few_examples_never_take_part():
    found = itertools.islice(of([5, 1, 5, 0, 5, 4], minimum_examples=4), 20)
    assert {client for one in found for client in one.tolist()} == {0, 2, 4, 5}


@pytest.mark.parametrize(
    ("counts", "changes"), [([1, 1, 0], {}), ([1] * 5, {"minimum_separation": 2}), ([3] * 9, {"minimum_examples": 4})]
)
def test_too_few_clients_are_refused_with_the_number_that_is_needed(counts, changes):
    with pytest.raises(OperationFailed, match=r"need [36]\b"):
        of(counts, **changes)


@pytest.mark.parametrize(("size", "width", "count"), [(50, 16, 4), (50, 13, 4), (50, 1, 50), (3, 16, 3), (100, 16, 8)])
def test_slices_are_even_and_hold_the_cohort_in_order(size, width, count):
    found = slices(np.arange(size), width)
    assert len(found) == count
    assert max(map(len, found)) <= min(map(len, found)) + 1
    assert np.concatenate(found).tolist() == list(range(size))
