"""The arithmetic of schedules, against numbers worked out by hand from spec/device.md 6.3 and 6.6."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcompute.device.jobs import times
from fedcompute.device.jobs.flags import Flags

NOW = 1_700_000_000_000
SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
DEFAULTS = Flags()


@pytest.mark.parametrize(
    ("recurrent", "interval", "delay"),
    [
        (False, 0, 5 * MINUTE),
        (False, 6 * HOUR, 5 * MINUTE),
        (True, 1, MINUTE),
        (True, 2 * MINUTE, 2 * MINUTE),
        (True, 5 * MINUTE, 5 * MINUTE),
        (True, 5 * MINUTE + 1, 5 * MINUTE),
        (True, 30 * DAY, 5 * MINUTE),
    ],
)
def test_a_new_task_first_runs_after_its_interval_or_five_minutes(recurrent, interval, delay):
    assert times.first_run(NOW, recurrent, interval, DEFAULTS) == NOW + delay


@pytest.mark.parametrize(
    ("recurrent", "interval", "delay"),
    [
        (False, 0, 5 * MINUTE),
        (False, 9 * DAY, 5 * MINUTE),
        (True, 1, MINUTE),
        (True, 6 * HOUR, 6 * HOUR),
        (True, 6 * DAY, 6 * DAY),
        (True, 7 * DAY, 6 * DAY),
    ],
)
def test_a_changed_task_waits_its_new_interval(recurrent, interval, delay):
    assert times.changed_run(NOW, recurrent, interval, DEFAULTS) == NOW + delay


@pytest.mark.parametrize(
    ("recurrent", "left", "kept"),
    [
        (False, -HOUR, 0),
        (False, 0, 0),
        (False, 1, 1),
        (False, 2 * DAY, 2 * DAY),
        (False, 2 * DAY + 1, 2 * DAY),
        (True, -HOUR, MINUTE),
        (True, 59 * SECOND, MINUTE),
        (True, 61 * SECOND, 61 * SECOND),
        (True, 7 * DAY, 6 * DAY),
    ],
)
def test_a_task_scheduled_again_keeps_its_time_within_bounds(recurrent, left, kept):
    assert times.kept_run(NOW, recurrent, NOW + left, DEFAULTS) == NOW + kept


@pytest.mark.parametrize(
    ("started", "ended", "running"),
    [
        (0, 0, False),
        (NOW, 0, False),
        (NOW - 1, 0, True),
        (NOW - 614_999, NOW - 615_000, True),
        (NOW - 615_000, 0, False),
        (NOW - 1000, NOW - 1000, False),
        (NOW - 1000, NOW - 500, False),
        (NOW + 1000, 0, False),
    ],
)
def test_a_run_is_probably_in_progress_for_615_seconds(started, ended, running):
    assert times.probably_running(NOW, started, ended) == running


@pytest.mark.parametrize(
    ("window", "delay"),
    [
        (None, 0),
        (0.0, 0),
        (-5.0, 0),
        (0.001, 1),
        (0.0074, 7),
        (90.5, 90_500),
        (172_800.0, 172_800_000),
        (1e9, 172_800_000),
    ],
)
def test_a_servers_delay_is_whole_milliseconds_up_to_two_days(window, delay):
    assert times.server_delay(window, DEFAULTS) == delay


class Drawn(random.Random):
    """Draws what it is told, and remembers between which bounds."""

    def __init__(self, *values):
        self.values, self.bounds = list(values), []

    def randint(self, low, high):
        self.bounds.append((low, high))
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("recurrent", "interval", "success", "server", "delay"),
    [
        (True, HOUR, True, 0, HOUR),
        (True, HOUR, True, 2 * HOUR, 2 * HOUR),
        (True, 1, True, 0, MINUTE),
        (True, 1, True, 59_999, MINUTE),
        (True, 30 * DAY, True, 0, 6 * DAY),
        (True, HOUR, False, 0, 800_000),
        (True, HOUR, False, 1, 1),
        (True, HOUR, False, DAY, DAY),
        (False, 0, False, 0, 800_000),
        (False, HOUR, False, 7000, 7000),
    ],
)
def test_the_delay_after_a_run_is_the_intervals_the_servers_or_a_drawn_one(recurrent, interval, success, server, delay):
    chance = Drawn(800_000)
    found = times.delay_after_run(recurrent, interval, success, server, DEFAULTS, chance)
    assert (found.milliseconds, found.server) == (delay, server)
    assert (found.transient is not None) == (delay == 800_000)
    assert chance.bounds == ([(720_000, 1_080_000)] if delay == 800_000 else [])


def test_flags_move_every_bound():
    flags = Flags(
        {
            "default_scheduling_period_secs": 10,
            "min_scheduling_interval_secs_for_federated_computation": 2,
            "max_scheduling_interval_secs_for_federated_computation": 20,
            "max_scheduling_period_secs": 30,
            "transient_error_retry_delay_secs": 100,
            "transient_error_retry_delay_jitter_percent": 0.5,
        }
    )
    assert times.first_run(0, False, 0, flags) == 10_000
    assert times.first_run(0, True, 1, flags) == 2000
    assert times.changed_run(0, True, HOUR, flags) == 20_000
    assert times.kept_run(0, False, HOUR, flags) == 30_000
    assert times.server_delay(3600.0, flags) == 30_000
    chance = Drawn(50_000)
    assert times.delay_after_run(False, 0, False, 0, flags, chance).milliseconds == 50_000
    assert chance.bounds == [(50_000, 150_000)]


milliseconds = st.integers(-(10**12), 10**14)


@given(milliseconds, milliseconds, milliseconds)
def test_a_clamped_value_is_within_its_bounds_and_otherwise_itself(value, low, high):
    clamped = times.clamp(value, low, high)
    assert clamped >= low
    assert clamped <= max(low, high)
    assert clamped == value or not low <= value <= high


@given(st.integers(0, 2**41), st.booleans(), milliseconds, milliseconds)
def test_scheduling_again_at_once_changes_nothing_more(now, recurrent, earliest, interval):
    kept = times.kept_run(now, recurrent, earliest, DEFAULTS)
    assert now <= kept <= now + 6 * DAY
    assert times.kept_run(now, recurrent, kept, DEFAULTS) == kept
    first = times.first_run(now, recurrent, interval, DEFAULTS)
    assert now + MINUTE <= first <= now + 5 * MINUTE
    assert times.kept_run(now, recurrent, first, DEFAULTS) == first


@given(st.booleans(), milliseconds, st.booleans(), st.integers(0, 2 * DAY), st.integers())
def test_a_delay_is_never_nothing_and_never_above_six_days(recurrent, interval, success, server, seed):
    chance = random.Random(seed)
    before = chance.getstate()
    delay = times.delay_after_run(recurrent, interval, success, server, DEFAULTS, chance)
    assert 0 < delay.milliseconds <= 6 * DAY
    assert delay.milliseconds >= server
    if delay.transient is None:
        assert chance.getstate() == before
    else:
        assert 720_000 <= delay.transient == delay.milliseconds <= 1_080_000
