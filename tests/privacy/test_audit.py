"""The statistic of audits, against closed forms, published values and exact false-alarm rates."""

import math
from itertools import accumulate

import numpy as np
import pytest
from scipy import stats

from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.privacy.audit import (
    epsilon_lower_bound,
    gaussian_lower_bound,
    largest_lower_bound,
    planned_guesses,
    right_guesses_probability,
)


def probability_by_counting(epsilon, delta, canaries, guesses, correct):
    right = 1 / (1 + math.exp(-epsilon))
    exact = [math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)]
    below = accumulate(reversed(exact[:correct]))
    missed = max((mass / (i + 1) for i, mass in enumerate(below)), default=0.0)
    return min(1.0, sum(exact[correct:]) + 2 * canaries * delta * missed)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
@pytest.mark.parametrize(("guesses", "correct"), [(1, 0), (1, 1), (20, 9), (20, 20), (60, 48)])
def test_the_probability_is_the_sum_over_all_numbers_of_right_guesses(epsilon, delta, guesses, correct):
    expected = probability_by_counting(epsilon, delta, 100, guesses, correct)
    assert right_guesses_probability(epsilon, delta, 100, guesses, correct) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("guesses", "correct", "delta", "canaries", "published"),
    # arXiv 2305.08846, appendix D (rounded to three digits) and section 7 (cut to three).
    [(100, 75, 1e-4, 1000, 0.673), (1510, 1439, 1e-5, 100_000, 2.675)],
)
def test_the_lower_bound_is_the_published_one(guesses, correct, delta, canaries, published):
    assert epsilon_lower_bound(guesses, correct, delta, canaries) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("guesses", [10, 100, 5000])
@pytest.mark.parametrize("confidence", [0.95, 1 - 1e-6])
def test_without_a_wrong_guess_the_lower_bound_is_the_closed_form(guesses, confidence):
    # The binomial's last probability: right ** guesses = 1 - confidence.
    logarithm = math.log(1 - confidence) / guesses
    expected = max(0.0, logarithm - math.log(-math.expm1(logarithm)))
    assert epsilon_lower_bound(guesses, guesses, 0.0, guesses, confidence) == pytest.approx(expected, abs=1e-9)
    assert largest_lower_bound(guesses, 0.0, confidence) == pytest.approx(expected, abs=1e-9)


def false_alarm_rate(bound, truth, canaries, right):
    """Exactly, where an auditor guesses all canaries and each guess is right with probability `right` on its own."""
    outcomes = np.arange(canaries + 1)
    alarms = [bound(int(correct)) > truth for correct in outcomes]
    return float(stats.binom.pmf(outcomes, canaries, right) @ np.array(alarms, float))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2])
def test_randomized_response_is_accused_in_at_most_one_run_out_of_twenty(epsilon, delta):
    # It tells a bit outright with probability delta and is epsilon-private otherwise: the worst mechanism there is.
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    rate = false_alarm_rate(lambda correct: epsilon_lower_bound(80, correct, delta, 80), epsilon, 80, right)
    assert rate <= 0.05
    if delta == 0:
        assert rate > 0.01, "the bound gives away more than the steps of a binomial explain"


@pytest.mark.parametrize("separation", [0.3, 1.0, 3.0])
def test_gaussian_noise_is_accused_in_at_most_one_run_out_of_twenty(separation):
    # Scores at 0 and `separation`, cut in the middle.
    right = stats.norm.cdf(separation / 2)
    truth = gaussian_epsilon(1 / separation, 1e-5)
    for bound in (epsilon_lower_bound, gaussian_lower_bound):
        assert false_alarm_rate(lambda correct, b=bound: b(80, correct, 1e-5, 80), truth, 80, right) <= 0.05


def test_one_guess_about_one_canary_refutes_noise_by_the_crossing_of_its_error_rates():
    # With Gaussian noise a guess is right with probability quantile(separation / 2) at best.
    for allowed in (0.6, 0.8, 0.99):
        separation = 2 * stats.norm.ppf(allowed)
        bound = gaussian_lower_bound(1, 1, 1e-5, 1, confidence=1 - allowed)
        assert bound == pytest.approx(gaussian_epsilon(1 / separation, 1e-5), rel=1e-6)


def test_more_right_guesses_never_prove_less():
    for bound in (epsilon_lower_bound, gaussian_lower_bound):
        found = [bound(60, correct, 1e-5, 200) for correct in range(0, 61, 4)]
        assert found == sorted(found)
        assert found[0] == 0.0 < found[-1]


def test_knowing_that_noise_is_gaussian_proves_more():
    assert gaussian_lower_bound(400, 380, 1e-5, 2000) > 1.2 * epsilon_lower_bound(400, 380, 1e-5, 2000)


def test_a_larger_delta_or_a_higher_confidence_proves_less():
    strict = epsilon_lower_bound(100, 90, 1e-4, 1000)
    assert epsilon_lower_bound(100, 90, 0.0, 1000) > strict > epsilon_lower_bound(100, 90, 1e-4, 1000, 0.999)


@pytest.mark.parametrize("separation", [0.01, 0.5, 3.0, 10.0, math.inf])
@pytest.mark.parametrize("canaries", [2, 16, 2000])
def test_planned_guesses_are_as_many_for_in_as_for_out_and_leave_room_for_the_coins(canaries, separation):
    guesses = planned_guesses(canaries, separation, 1e-5)
    assert guesses % 2 == 0
    assert 2 <= guesses <= max(2, canaries - 4 * math.sqrt(canaries))


def test_a_clearer_signal_lets_the_auditor_guess_more():
    found = [planned_guesses(2000, separation, 1e-5) for separation in (1.0, 2.0, 4.0, math.inf)]
    assert found == sorted(set(found))


@pytest.mark.parametrize(("guesses", "correct", "canaries"), [(10, 11, 20), (21, 10, 20), (10, -1, 20)])
def test_impossible_counts_are_refused(guesses, correct, canaries):
    with pytest.raises(ValueError, match="right out of"):
        epsilon_lower_bound(guesses, correct, 1e-5, canaries)


def test_a_single_canary_is_no_audit():
    with pytest.raises(ValueError, match="too few"):
        planned_guesses(1, 1.0, 1e-5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_a_confidence_of_none_or_all_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        epsilon_lower_bound(10, 10, 1e-5, 20, confidence)
