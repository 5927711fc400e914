"""Budgets: what is spent of them, by which number, and which numbers may stand in a ledger."""

import math

import pytest

from fedcompute.privacy.accounting import gaussian_epsilon, poisson_epsilon
from fedcompute.privacy.bounds import epsilon_bounds
from fedcompute.privacy.budget import Budget, BudgetAssumption, cumulative_epsilon, is_cumulative, spent_of
from fedcompute.privacy.composition import TaskReleases
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.participation import Assumption, Participation

DELTA = 1e-6
SAMPLED = [TaskReleases([(GaussianEvent(1.0),)] * 5, Assumption(Participation.POISSON, 1000, 10))]


def test_the_quick_bound_counts_unless_only_a_tighter_one_or_the_exact_value_decides():
    quick = cumulative_epsilon(SAMPLED, DELTA)
    tight = epsilon_bounds(SAMPLED, DELTA)
    exact = poisson_epsilon(1.0, 5, 0.01, DELTA)
    assert tight.lower < exact < tight.upper < quick < 1.01 * exact
    assert cumulative_epsilon(SAMPLED, DELTA, limit=2 * quick) == quick
    assert cumulative_epsilon(SAMPLED, DELTA, limit=tight.lower / 2) == quick
    assert cumulative_epsilon(SAMPLED, DELTA, limit=(tight.upper + quick) / 2) == tight.upper
    between = (exact + tight.upper) / 2
    assert cumulative_epsilon(SAMPLED, DELTA, limit=between) == pytest.approx(exact, rel=1e-9)
    assert cumulative_epsilon(SAMPLED, DELTA, limit=exact) <= exact


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    bare = TaskReleases([(GaussianEvent(5.0), GaussianEvent(0.0))], SAMPLED[0].assumption)
    assert cumulative_epsilon([], DELTA) == 0
    assert math.isinf(cumulative_epsilon([*SAMPLED, bare], DELTA))
    assert math.isinf(spent_of(Budget(1e9, 0.5), [bare]))


def test_a_budget_without_amplification_counts_what_any_device_may_lose():
    assert spent_of(Budget(1.0, 1e-5), SAMPLED) == pytest.approx(poisson_epsilon(1.0, 5, 0.01, 1e-5), rel=1e-2)
    wary = Budget(1.0, 1e-5, BudgetAssumption.NO_AMPLIFICATION)
    assert spent_of(wary, SAMPLED) == pytest.approx(gaussian_epsilon(5**-0.5, 1e-5), rel=1e-9)


def test_tasks_of_one_population_add_up():
    both = [TaskReleases([(GaussianEvent(z),)], Assumption(Participation.NO_AMPLIFICATION, 9, 1)) for z in (3.0, 4.0)]
    assert cumulative_epsilon(both, DELTA) == pytest.approx(gaussian_epsilon(1 / math.hypot(1 / 3, 1 / 4), DELTA))


def test_a_ledger_may_hold_no_less_than_the_exact_value_and_little_more_than_the_bound():
    exact, upper = poisson_epsilon(1.0, 5, 0.01, DELTA), cumulative_epsilon(SAMPLED, DELTA)
    for value, right in (
        (upper, True),
        (upper * 1.009, True),
        (upper * 1.02, False),
        (exact, True),
        (exact * (1 - 1e-7), True),
        (exact * (1 - 1e-5), False),
        (0.0, False),
        (math.inf, False),
    ):
        assert is_cumulative(value, SAMPLED, DELTA)[0] is right, value
    assert is_cumulative(0.0, [], DELTA)[0]
    bare = [TaskReleases([(GaussianEvent(0.0),)], SAMPLED[0].assumption)]
    assert is_cumulative(math.inf, bare, DELTA)[0]
    assert not is_cumulative(1e300, bare, DELTA)[0]


@pytest.mark.parametrize("budget", [Budget(0, 0.1), Budget(-1, 0.1), Budget(math.nan, 0.1), Budget(1, math.nan)])
def test_numbers_that_are_no_budget_are_named(budget):
    assert len(budget.problems()) == 1
