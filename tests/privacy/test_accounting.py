import json
import math

import dp_accounting
import pytest
from dp_accounting import pld

from fedcompute.errors import ArtifactInvalid
from fedcompute.privacy.accounting import (
    calibrate_fixed_size_noise,
    calibrate_gaussian_noise,
    calibrate_noise,
    calibrate_tree_noise,
    fixed_size_epsilon,
    gaussian_epsilon,
    poisson_epsilon,
    tree_epsilon,
)
from fedcompute.privacy.bounds import parts_bounds
from fedcompute.privacy.composition import Parts, Poisson
from fedcompute.privacy.ledger import (
    GaussianEvent,
    TreeEvent,
    composed_noise_multiplier,
    events_document,
    read_events,
)


def test_the_sampled_epsilon_is_that_of_the_library_called_directly_and_of_the_published_figure():
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.5)), 20
    )
    direct = pld.PLDAccountant().compose(event).get_epsilon(1e-5)
    assert poisson_epsilon(1.5, 20, 0.1, 1e-5) == pytest.approx(direct, rel=1e-9)
    # spec/task-builder.md 3.4: n = 2000 of 3,000,000, 1000 rounds, delta 1e-6.
    assert poisson_epsilon(1.0, 1000, 2000 / 3_000_000, 1e-6) == pytest.approx(0.1195, abs=5e-5)
    assert poisson_epsilon(0.5, 1000, 2000 / 3_000_000, 1e-6) == pytest.approx(3.597, abs=5e-4)


def test_calibration_returns_the_safe_side_of_the_target():
    noise = calibrate_noise(2.0, 10, 0.25, 1e-3)
    assert 2.0 - 1e-2 < poisson_epsilon(noise, 10, 0.25, 1e-3) <= 2.0


def test_gaussian_releases_compose_to_one_gaussian_release():
    events = [GaussianEvent(1.0)] * 3 + [GaussianEvent(2.0)]
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    for event in events:
        accountant.compose(dp_accounting.GaussianDpEvent(event.noise_multiplier))
    honest = gaussian_epsilon(composed_noise_multiplier(events), 1e-5)
    assert honest == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_no_noise_is_no_privacy_and_no_release_costs_nothing():
    assert composed_noise_multiplier([GaussianEvent(1.0), GaussianEvent(0.0)]) == 0.0
    assert gaussian_epsilon(0.0, 1e-5) == math.inf
    assert poisson_epsilon(0.0, 3, 0.5, 1e-5) == math.inf
    assert gaussian_epsilon(composed_noise_multiplier([]), 1e-5) == 0.0
    assert poisson_epsilon(0.0, 0, 0.5, 1e-5) == 0.0


@pytest.mark.parametrize(
    "events",
    [
        [GaussianEvent(0.75)],
        [TreeEvent(0.5, 3)],
        [GaussianEvent(1.0), GaussianEvent(2.0)],
        [TreeEvent(1.0, 1), TreeEvent(2.0, 1)],
    ],
)
def test_events_survive_storage(events):
    assert read_events(json.loads(json.dumps(events_document(events)))) == events


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"class": "Other", "noise_multiplier": 1},
        {"class": "GaussianDpEvent", "noise_multiplier": -1},
        {"class": "GaussianDpEvent", "noise_multiplier": "nan"},
        {"class": "TreeAggregationStep", "noise_multiplier": 1, "step": 0},
        {"class": "ComposedDpEvent", "events": [{}]},
        {"class": "ComposedDpEvent", "events": 3},
    ],
)
def test_a_document_of_another_form_is_refused(document):
    with pytest.raises(ArtifactInvalid):
        read_events(document)


def test_the_tree_epsilon_is_that_of_the_library_and_calibration_returns_the_safe_side():
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(2.0, (20,)))
    assert tree_epsilon(2.0, (20,), 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    noise = calibrate_tree_noise(3.0, 20, 1e-5)
    assert 3.0 - 1e-2 < tree_epsilon(noise, (20,), 1e-5) <= 3.0
    assert tree_epsilon(0.0, (3,), 1e-5) == math.inf
    assert tree_epsilon(1.0, (0,), 1e-5) == 0.0


def test_the_fixed_size_epsilon_is_the_library_s_with_half_the_multiplier():
    for noise, rounds, sample, population in ((4.0, 100, 50, 1000), (1.5, 10, 7, 700)):
        gaussian = dp_accounting.GaussianDpEvent(noise / 2)
        event = dp_accounting.SampledWithoutReplacementDpEvent(population, sample, gaussian)
        accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        accountant.compose(event, rounds)
        direct = accountant.get_epsilon(1e-5)
        assert fixed_size_epsilon(noise, rounds, sample, population, 1e-5) == pytest.approx(direct, rel=1e-9)
    assert fixed_size_epsilon(0.0, 1, 1, 2, 1e-5) == math.inf
    assert fixed_size_epsilon(1.0, 0, 1, 2, 1e-5) == 0.0


def test_a_sample_of_everybody_is_two_devices_apart_when_one_is_replaced():
    # A replaced device moves the sum by twice the clip norm: half the multiplier, exactly by the Gaussian closed form.
    exact = gaussian_epsilon(4.0 / 2 / math.sqrt(100), 1e-5)
    assert exact <= fixed_size_epsilon(4.0, 100, 1000, 1000, 1e-5) <= 1.1 * exact


def test_calibrations_invert_their_accountants_from_the_safe_side():
    for target in (0.7, 6.0):
        noise = calibrate_gaussian_noise(target, 1e-6)
        assert target - 1e-6 <= gaussian_epsilon(noise, 1e-6) <= target
    noise = calibrate_fixed_size_noise(2.0, 30, 20, 2000, 1e-5)
    assert 2.0 - 1e-3 <= fixed_size_epsilon(noise, 30, 20, 2000, 1e-5) <= 2.0


def test_a_device_in_one_of_several_trees_is_protected_by_the_deepest():
    assert tree_epsilon(2.0, (3, 20), 1e-5) == tree_epsilon(2.0, (20,), 1e-5)


def test_the_least_noise_that_is_accounted_for_fits_into_memory_and_costs_a_trace_of_epsilon_at_most():
    # The interval of loss is wider than the library's own, which is for noise from 0.1 on.
    bounds = parts_bounds(Parts(poisson=(Poisson(0.002, 1.01e-3, 1),)), 1e-6)
    assert bounds.lower <= poisson_epsilon(1.01e-3, 1, 0.002, 1e-6) <= bounds.lower * (1 + 1e-4)
