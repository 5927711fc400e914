import json
import math

import dp_accounting
import pytest
from dp_accounting import pld

from fedcompute.errors import ArtifactInvalid
from fedcompute.privacy.accounting import (
    calibrate_noise,
    calibrate_tree_noise,
    gaussian_epsilon,
    poisson_epsilon,
    tree_epsilon,
)
from fedcompute.privacy.ledger import (
    GaussianEvent,
    TreeEvent,
    composed_noise_multiplier,
    events_document,
    read_events,
)
from fedcompute.privacy.report import privacy_report, privacy_sentences


def test_the_sampled_epsilon_is_that_of_the_library_called_directly_and_of_the_published_figure():
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.5)), 20
    )
    direct = pld.PLDAccountant().compose(event).get_epsilon(1e-5)
    assert poisson_epsilon(1.5, 20, 0.1, 1e-5) == pytest.approx(direct, rel=1e-9)
    # spec/task-builder.md 3.4: n = 2000 of 3,000,000, 1000 rounds, z = 1, delta 1e-6.
    assert poisson_epsilon(1.0, 1000, 2000 / 3_000_000, 1e-6) == pytest.approx(0.1195, abs=5e-4)


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


def test_a_tree_report_accounts_for_each_tree_as_a_whole():
    settings = {"clip_norm": 1.0, "report_goal": 10, "population": 40, "delta": 1e-3}
    steps = [1, 2, 3, 1, 2]
    report = privacy_report([[TreeEvent(2.0, step)] for step in steps], **settings)
    assert (report.trees, report.epsilon) == (2, tree_epsilon(2.0, (3, 2), 1e-3))
    split = privacy_report([[TreeEvent(4.0, step), TreeEvent(4.0, step)] for step in steps], **settings)
    assert split.noise_multiplier == pytest.approx(4.0 / math.sqrt(2))
    assert "noise trees" in privacy_sentences(report)[1]


def test_minimum_separation_lowers_the_honest_epsilon_and_noiseless_runs_are_called_so():
    settings = {"clip_norm": 1.0, "report_goal": 10, "population": 40, "delta": 1e-3}
    free = privacy_report([[GaussianEvent(2.0)]] * 12, **settings)
    spaced = privacy_report([[GaussianEvent(2.0)]] * 12, minimum_separation=4, **settings)
    assert (free.participations, spaced.participations) == (12, 3)
    assert spaced.epsilon == pytest.approx(gaussian_epsilon(2.0 / math.sqrt(3), 1e-3))
    assert spaced.epsilon < free.epsilon
    assert f"{free.epsilon:.2f}" in privacy_sentences(free)[1]
    assert "no privacy promise" in privacy_sentences(privacy_report([[GaussianEvent(0.0)]], **settings))[0]


def test_epsilon_of_little_noise_is_the_library_s_or_a_trace_above():
    event = dp_accounting.PoissonSampledDpEvent(0.002, dp_accounting.GaussianDpEvent(0.09))
    direct = pld.PLDAccountant().compose(event).get_epsilon(1e-6)
    assert direct <= poisson_epsilon(0.09, 1, 0.002, 1e-6) <= direct * (1 + 1e-4)


def test_the_least_noise_that_is_accounted_for_fits_into_memory():
    assert 1e5 < poisson_epsilon(1e-3, 1, 0.002, 1e-6) < math.inf
