"""Epsilon of whole populations, against dp-accounting called directly."""

import math
import time

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcompute.privacy.accounting import fixed_size_epsilon, gaussian_epsilon, poisson_epsilon, tree_epsilon
from fedcompute.privacy.composition import TaskReleases, epsilon, unamplified_epsilon
from fedcompute.privacy.ledger import BandedEvent, GaussianEvent, TreeEvent
from fedcompute.privacy.participation import Assumption, Participation

DELTA = 1e-5
POISSON = Assumption(Participation.POISSON, population=1000, report_goal=100)
FIXED_SIZE = Assumption(Participation.FIXED_SIZE, population=1000, report_goal=100)
FREE = Assumption(Participation.NO_AMPLIFICATION, population=1000, report_goal=100)


def separated(rounds):
    return Assumption(Participation.MIN_SEPARATION, population=1000, report_goal=100, minimum_separation=rounds)


def gaussians(noise, rounds):
    return [(GaussianEvent(noise),)] * rounds


def tree(noise, rounds):
    return [(TreeEvent(noise, step + 1),) for step in range(rounds)]


def test_one_task_is_what_its_accountant_says():
    assert epsilon([TaskReleases(gaussians(2.0, 30), POISSON)], DELTA) == poisson_epsilon(2.0, 30, 0.1, DELTA)
    assert epsilon([TaskReleases(gaussians(2.0, 30), FIXED_SIZE)], DELTA) == fixed_size_epsilon(
        2.0, 30, 100, 1000, DELTA
    )
    assert epsilon([TaskReleases(tree(2.0, 30), POISSON)], DELTA) == tree_epsilon(2.0, (30,), DELTA)
    free = gaussian_epsilon(2.0 / math.sqrt(30), DELTA)
    assert epsilon([TaskReleases(gaussians(2.0, 30), FREE)], DELTA) == pytest.approx(free, rel=1e-9)
    assert unamplified_epsilon([TaskReleases(gaussians(2.0, 30), POISSON)], DELTA) == pytest.approx(free, rel=1e-9)


def test_sampled_and_unsampled_tasks_compose_in_one_accountant():
    tasks = [
        TaskReleases(gaussians(2.0, 30), POISSON),
        TaskReleases(gaussians(1.5, 4), POISSON),
        TaskReleases(gaussians(3.0, 9), separated(4)),
        TaskReleases(tree(8.0, 5), POISSON),
    ]
    accountant = pld.PLDAccountant()
    for noise, rounds in ((2.0, 30), (1.5, 4)):
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(noise)), rounds)
    # Three participations with noise 3, and three heights of a tree with noise 8.
    accountant.compose(dp_accounting.GaussianDpEvent((3 / 9 + 3 / 64) ** -0.5))
    assert epsilon(tasks, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-6)
    assert epsilon(list(reversed(tasks)), DELTA) == epsilon(tasks, DELTA)


def test_beside_a_sample_of_fixed_size_everything_is_replaced_and_nothing_else_is_amplified():
    tasks = [
        TaskReleases(gaussians(4.0, 20), FIXED_SIZE),
        TaskReleases(gaussians(30.0, 10), POISSON),
        TaskReleases(gaussians(20.0, 3), FREE),
    ]
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(1000, 100, dp_accounting.GaussianDpEvent(2.0))
    accountant.compose(sampled, 20)
    accountant.compose(dp_accounting.GaussianDpEvent(15.0), 10)
    accountant.compose(dp_accounting.GaussianDpEvent(10.0), 3)
    assert epsilon(tasks, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)


def test_events_of_one_round_are_one_gaussian_release():
    both = [(GaussianEvent(3.0), GaussianEvent(4.0))] * 10
    assert epsilon([TaskReleases(both, POISSON)], DELTA) == pytest.approx(
        poisson_epsilon((1 / 9 + 1 / 16) ** -0.5, 10, 0.1, DELTA), rel=1e-9
    )


def test_the_two_trees_of_an_adaptive_task_and_its_metrics_compose():
    rounds = [(TreeEvent(3.0, step), TreeEvent(4.0, step), GaussianEvent(6.0)) for step in (1, 2, 3, 1, 2)]
    both = (1 / 9 + 1 / 16) ** -0.5
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(both, 5))
    accountant.compose(dp_accounting.GaussianDpEvent(6.0))
    assert epsilon([TaskReleases(rounds, POISSON)], DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    # In every round: trees of 3 and 2 rounds have squared sensitivities 3 + 4 and 2 + 4.
    square = 13 / both**2 + 5 / 36
    assert epsilon([TaskReleases(rounds, FREE)], DELTA) == pytest.approx(gaussian_epsilon(square**-0.5, DELTA))
    # Once in five rounds lies in one tree only.
    once = 2 / both**2 + 1 / 36
    assert epsilon([TaskReleases(rounds, separated(5))], DELTA) == pytest.approx(gaussian_epsilon(once**-0.5, DELTA))


def test_banded_rounds_compose_over_the_participations_that_separation_leaves():
    rounds = [(BandedEvent(2.0, 4, step + 1),) for step in range(12)]
    four = gaussian_epsilon(2.0 / math.sqrt(3), DELTA)
    assert epsilon([TaskReleases(rounds, separated(4))], DELTA) == pytest.approx(four)
    # Six participations in two classes of three.
    two = gaussian_epsilon(2.0 / (2 * math.sqrt(3)), DELTA)
    assert epsilon([TaskReleases(rounds, separated(2))], DELTA) == pytest.approx(two)


def test_rounds_without_a_release_separate_devices_and_nothing_more():
    rounds = [(GaussianEvent(2.0),), (), (), (GaussianEvent(2.0),)]
    twice = gaussian_epsilon(2.0 / math.sqrt(2), DELTA)
    assert epsilon([TaskReleases(rounds, separated(3))], DELTA) == pytest.approx(twice)
    assert epsilon([TaskReleases(rounds, separated(4))], DELTA) == pytest.approx(gaussian_epsilon(2.0, DELTA))
    # The second node of this tree has both participations below it, though they are three rounds apart.
    grown = [(TreeEvent(2.0, 1),), (), (), (TreeEvent(2.0, 2),)]
    both = gaussian_epsilon(2.0 / math.sqrt(1 + 1 + 4), DELTA)
    assert epsilon([TaskReleases(grown, separated(3))], DELTA) == pytest.approx(both)


@pytest.mark.parametrize("assumption", [POISSON, FIXED_SIZE, FREE, separated(3)])
def test_no_noise_is_no_privacy_and_no_release_costs_nothing(assumption):
    noisy = TaskReleases(gaussians(2.0, 3), assumption)
    for event in (GaussianEvent(0.0), TreeEvent(0.0, 1), BandedEvent(0.0, 2, 1)):
        assert epsilon([noisy, TaskReleases([(event,)], assumption)], DELTA) == math.inf
    assert epsilon([], DELTA) == 0.0
    assert epsilon([TaskReleases([], assumption), TaskReleases([(), ()], assumption)], DELTA) == 0.0


noises = st.floats(0.5, 20)
separations = st.integers(1, 40)
events = st.sampled_from(["sum", "tree", "banded"])


@settings(max_examples=40, deadline=None)
@given(events, noises, st.integers(1, 60), separations, st.integers(1, 9))
def test_more_noise_fewer_rounds_and_wider_separation_never_cost_privacy(kind, noise, rounds, separation, bands):
    def value(noise, rounds, separation):
        made = {
            "sum": gaussians(noise, rounds),
            "tree": tree(noise, rounds),
            "banded": [(BandedEvent(noise, bands, step + 1),) for step in range(rounds)],
        }[kind]
        return epsilon([TaskReleases(made, separated(separation))], DELTA)

    here = value(noise, rounds, separation)
    assert value(noise * 1.1, rounds, separation) <= here * (1 + 1e-9)
    assert value(noise, rounds + 1, separation) >= here * (1 - 1e-9)
    assert value(noise, rounds, separation + 1) <= here * (1 + 1e-9)


def test_a_hundred_thousand_rounds_are_no_burden():
    rounds = [(GaussianEvent(3.0), GaussianEvent(9.0))] * 50_000 + gaussians(5.0, 50_000)
    begun = time.process_time()
    assert math.isfinite(epsilon([TaskReleases(rounds, separated(100))], DELTA))
    assert math.isfinite(epsilon([TaskReleases(tree(50.0, 100_000), separated(100))], DELTA))
    assert time.process_time() - begun < 5
