import math
from itertools import pairwise

import pytest

from fedcompute.privacy.accounting import gaussian_epsilon, poisson_epsilon, tree_epsilon
from fedcompute.privacy.ledger import GaussianEvent, TreeEvent
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.report import privacy_report, privacy_sentences

SETTINGS = {"clip_norm": 1.0, "delta": 1e-3}


def assumed(participation, separation=0, population=40):
    return Assumption(participation, population, 10, separation)


def test_a_report_shows_epsilon_with_and_without_the_assumption_and_warns_of_the_difference():
    report = privacy_report([[GaussianEvent(2.0)]] * 12, assumed(Participation.POISSON, 4), **SETTINGS)
    assert report.epsilon == poisson_epsilon(2.0, 12, 0.25, 1e-3)
    assert report.unamplified_epsilon == pytest.approx(gaussian_epsilon(2.0 / math.sqrt(12), 1e-3))
    assert report.separated_epsilon == pytest.approx(gaussian_epsilon(2.0 / math.sqrt(3), 1e-3))
    assert (report.rounds, report.participations) == (12, 3)
    text = " ".join(privacy_sentences(report))
    for value in (report.epsilon, report.unamplified_epsilon, report.separated_epsilon):
        assert f"{value:.2f}" in text
    assert report.warning is not None
    assert report.warning in text


def test_a_claim_without_an_assumption_needs_no_warning():
    report = privacy_report([[GaussianEvent(2.0)]] * 12, assumed(Participation.NO_AMPLIFICATION), **SETTINGS)
    assert report.epsilon == report.unamplified_epsilon
    assert report.separated_epsilon is None
    assert report.warning is None
    assert "Without that assumption" not in " ".join(privacy_sentences(report))


def test_a_tree_report_says_that_the_claim_is_one_participation():
    steps = [1, 2, 3, 1, 2]
    report = privacy_report([[TreeEvent(2.0, step)] for step in steps], assumed(Participation.POISSON), **SETTINGS)
    assert (report.trees, report.epsilon) == (2, tree_epsilon(2.0, (5,), 1e-3))
    assert report.unamplified_epsilon > 2 * report.epsilon
    assert "one round of the task" in privacy_sentences(report)[1]


def test_what_left_without_noise_is_named_and_counted():
    outside = {"zeroed_count": 3, "metrics": 5}
    report = privacy_report(
        [[GaussianEvent(2.0)]], assumed(Participation.POISSON), unprotected=outside, claimed_epsilon=7.5, **SETTINGS
    )
    text = " ".join(privacy_sentences(report))
    assert "metrics (5), zeroed_count (3)" in text
    assert "promises 7.50" in text


def test_runs_without_noise_and_runs_without_releases_are_called_so():
    noiseless = privacy_report([[GaussianEvent(0.0)]], assumed(Participation.POISSON), **SETTINGS)
    assert "no privacy promise" in privacy_sentences(noiseless)[0]
    nothing = privacy_report([[], []], assumed(Participation.POISSON), **SETTINGS)
    assert (nothing.rounds, nothing.epsilon) == (0, 0.0)
    assert "Nothing was released" in privacy_sentences(nothing)[0]


def test_the_series_rises_to_the_report_s_own_figures():
    rounds = [[GaussianEvent(2.0)]] * 50
    report = privacy_report(rounds, assumed(Participation.POISSON), with_series=True, **SETTINGS)
    values = [point.epsilon for point in report.series]
    # Points before the last are bounds, a trace above the exact values.
    assert all(before < after * 1.01 for before, after in pairwise(values))
    last = report.series[-1]
    assert (last.rounds, last.epsilon, last.unamplified_epsilon) == (50, report.epsilon, report.unamplified_epsilon)
    for point in report.series[::10]:
        assert poisson_epsilon(2.0, point.rounds, 0.25, 1e-3) <= point.epsilon * (1 + 1e-9)


def test_a_small_fleet_is_told_that_it_is_small():
    few = privacy_report([[GaussianEvent(2.0)]], assumed(Participation.POISSON), **SETTINGS)
    many = privacy_report([[GaussianEvent(2.0)]], assumed(Participation.POISSON, population=100_000), **SETTINGS)
    assert any("drown" in sentence for sentence in privacy_sentences(few))
    assert not any("drown" in sentence for sentence in privacy_sentences(many))
