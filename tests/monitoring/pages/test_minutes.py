"""Intervals of time that charts are drawn in."""

from datetime import UTC, datetime, timedelta

import pytest

from fedcompute.monitoring.pages.charts import MOST_POINTS
from fedcompute.monitoring.pages.minutes import RANGES, begin_of, bins_of, mean_of, per_minute

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LONG_AGO, MUCH_LATER = NOON - timedelta(days=90), NOON + timedelta(days=90)


def after(minutes):
    return NOON + timedelta(minutes=minutes)


def test_minutes_without_a_count_are_zero_and_one_more_at_each_end():
    bins = bins_of(after(0), after(3), LONG_AGO, MUCH_LATER)
    assert bins.begins == [after(minutes) for minutes in range(-1, 5)]
    assert bins.means({after(0): 2, after(3): 5}) == [0, 2, 0, 0, 5, 0]


def test_no_zero_is_claimed_outside_the_range_that_was_asked_for():
    bins = bins_of(after(0), after(3), after(0.5), after(3.9))
    assert bins.begins == [after(minutes) for minutes in range(4)]


def test_a_count_from_a_clock_that_is_ahead_is_drawn():
    bins = bins_of(after(0), after(2), after(0), after(1))
    assert bins.means({after(2): 1}) == [0, 0, 1]


def test_of_many_minutes_an_interval_holds_the_mean_per_minute():
    bins = bins_of(after(0), after(3000), LONG_AGO, MUCH_LATER)
    assert bins.step == 5
    means = bins.means({after(0): 10, after(4): 5, after(5): 1, after(3000): 20})
    places = dict(zip(bins.begins, means, strict=True))
    assert (places[after(0)], places[after(5)], places[after(3000)]) == (3, 0.2, 4)
    assert sum(means) * bins.step == 36


@pytest.mark.parametrize("minutes", [998, 999, 1000, 1001, 4995, 9990, 9995, 43_199, 43_200, 2_000_000])
@pytest.mark.parametrize("offset", [0, 7, 59])
def test_no_chart_has_more_points_than_it_may(minutes, offset):
    bins = bins_of(after(offset), after(offset + minutes), LONG_AGO, NOON + timedelta(days=3000))
    assert len(bins.begins) <= MOST_POINTS or bins.step == 1440
    assert bins.begins[0] <= after(offset)
    assert after(offset + minutes) < bins.begins[-1] + bins.step * timedelta(minutes=1)


@pytest.mark.parametrize("name", RANGES)
def test_the_first_interval_of_a_range_is_whole(name):
    for minutes in (0, 7, 13.5):
        since = begin_of(after(minutes), RANGES[name])
        assert after(minutes) - RANGES[name] - timedelta(hours=1) < since <= after(minutes) - RANGES[name]
        bins = bins_of(since, after(minutes), since, after(minutes))
        assert bins.begins[0] == since


def test_the_axis_says_how_long_an_interval_is():
    assert per_minute(1) == "assignments per minute"
    assert per_minute(15, "check-ins") == "check-ins per minute, mean of 15 min"
    assert mean_of(1) == ""
