import math

import pytest

from fedcompute.privacy.accounting import poisson_epsilon, tree_epsilon
from fedcompute.privacy.composition import TaskReleases, epsilon
from fedcompute.privacy.ledger import TreeEvent
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.planned import KINDS, calibrated_noise, planned_rounds

DELTA = 1e-6
SETTINGS = {"report_goal": 100, "bands": 4, "restart_period": 16, "restart_offset": 5}


def assumed(participation, separation=3):
    return Assumption(participation, population=2000, report_goal=100, minimum_separation=separation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metrics", [0.0, 7.0])
def test_a_plan_is_short_for_the_very_events_it_stands_for(kind, metrics):
    for rounds in (1, 5, 6, 21, 50):
        planned = planned_rounds(kind, 3.0, rounds, metrics_noise_multiplier=metrics, **SETTINGS)
        written = list(planned)
        assert len(written) == rounds
        for participation in (Participation.MIN_SEPARATION, Participation.NO_AMPLIFICATION):
            found = epsilon([TaskReleases(planned, assumed(participation))], DELTA)
            assert found == pytest.approx(epsilon([TaskReleases(written, assumed(participation))], DELTA), rel=1e-9)
        assert list(planned[:4]) == written[:4]
        assert planned[-1] == written[-1]


def test_an_adaptive_tree_restarts_where_the_reference_does():
    planned = planned_rounds("adaptive_tree", 3.0, 1200, report_goal=100)
    starts = [n for n, events in enumerate(planned) if isinstance(events[0], TreeEvent) and events[0].step == 1]
    assert starts == [0, 128, 1152]


def test_adaptive_types_cost_what_the_reference_says():
    planned = planned_rounds("adaptive_gaussian", 2.0, 20, report_goal=100)
    assert epsilon([TaskReleases(planned, assumed(Participation.POISSON))], DELTA) == poisson_epsilon(
        2, 20, 0.05, DELTA
    )
    planned = planned_rounds("adaptive_tree", 2.0, 300, report_goal=100)
    assert epsilon([TaskReleases(planned, assumed(Participation.POISSON))], DELTA) == tree_epsilon(2, (300,), DELTA)


@pytest.mark.parametrize(
    ("kind", "participation", "metrics"),
    [
        ("fixed_gaussian", Participation.POISSON, 20.0),
        ("adaptive_gaussian", Participation.FIXED_SIZE, 20.0),
        ("tree_aggregation", Participation.POISSON, 0.0),
        ("tree_aggregation", Participation.POISSON, 20.0),
        ("adaptive_tree", Participation.MIN_SEPARATION, 40.0),
        ("banded_mf", Participation.MIN_SEPARATION, 30.0),
        ("fixed_gaussian", Participation.NO_AMPLIFICATION, 0.0),
    ],
)
def test_calibrated_noise_meets_its_target_and_hardly_more(kind, participation, metrics):
    planned = planned_rounds(kind, 0.0, 12, metrics_noise_multiplier=metrics, **SETTINGS)
    noise = calibrated_noise(planned, assumed(participation), 1.0, DELTA)
    reached = planned_rounds(kind, noise, 12, metrics_noise_multiplier=metrics, **SETTINGS)
    assert 1.0 - 1e-3 <= epsilon([TaskReleases(reached, assumed(participation))], DELTA) <= 1.0


def test_metrics_that_spend_everything_leave_nothing_to_calibrate():
    planned = planned_rounds("fixed_gaussian", 0.0, 12, metrics_noise_multiplier=0.5, report_goal=100)
    with pytest.raises(ValueError, match="metrics alone"):
        calibrated_noise(planned, assumed(Participation.NO_AMPLIFICATION), 3.0, DELTA)


def test_a_plan_of_a_thousand_million_rounds_is_accounted_for_at_once():
    for kind in KINDS:
        planned = planned_rounds(kind, 100.0, 10**9, report_goal=10_000, bands=8)
        assert math.isfinite(epsilon([TaskReleases(planned, assumed(Participation.MIN_SEPARATION, 1000))], DELTA))
