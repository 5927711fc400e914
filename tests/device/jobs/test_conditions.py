"""What keeps jobs from firing and runs from starting."""

from dataclasses import replace

import pytest

from fedcompute.device.jobs.conditions import TRAINING, Conditions, Constraint, is_throttled, start_failures, unmet
from fedcompute.device.jobs.flags import Flags

GOOD = Conditions()
DEFAULTS = Flags()


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, ()),
        ({"idle": False}, ("not idle",)),
        ({"idle": False, "load": 0.75}, ("not idle: load 0.75 per processor",)),
        ({"battery_percent": 15}, ()),
        ({"battery_percent": 14}, ("battery 14 %, below 15 %, not charging",)),
        ({"battery_percent": 14, "charging": True}, ()),
        ({"unmetered": False}, ("metered network",)),
        ({"network": False}, ("no network",)),
        ({"thermal_status": 6, "free_bytes": 0}, ()),
        ({"idle": False, "network": False}, ("not idle", "no network")),
    ],
)
def test_a_task_fires_on_an_idle_device_with_power_and_free_network(change, failing):
    assert unmet(replace(GOOD, **change), TRAINING, DEFAULTS) == failing


def test_a_job_waits_for_its_own_constraints_only():
    bad = Conditions(idle=False, battery_percent=1, network=False, free_bytes=49_999_999)
    assert unmet(bad, frozenset(), DEFAULTS) == ()
    assert unmet(bad, {Constraint.STORAGE_NOT_LOW}, DEFAULTS) == ("49999999 bytes free, below 50000000",)
    assert len(unmet(bad, frozenset(Constraint), DEFAULTS)) == 4


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"battery_percent": 30, "thermal_status": 1, "free_bytes": 50_000_000}, ()),
        ({"battery_percent": 29, "charging": True}, ("battery 29 %, below 30 %",)),
        ({"thermal_status": 2}, ("thermal status 2, not below 2",)),
        ({"free_bytes": 49_999_999}, ("49999999 bytes free, below 50000000",)),
        ({"idle": False, "network": False}, ()),
    ],
)
def test_a_run_starts_with_battery_cool_and_room(change, failing):
    assert start_failures(replace(GOOD, **change), DEFAULTS) == failing


def test_flags_move_what_a_run_needs():
    flags = Flags({"training_min_battery_level": 0, "training_thermal_to_throttle": 7, "memory_size_limit": 0})
    assert start_failures(Conditions(battery_percent=0, thermal_status=6, free_bytes=0), flags) == ()


@pytest.mark.parametrize(
    ("now", "last_check", "throttled"),
    [(5000, None, False), (5000, 5000, True), (5999, 5000, True), (6000, 5000, False), (4000, 5000, False)],
)
def test_a_check_within_a_second_of_the_last_one_is_left_out(now, last_check, throttled):
    assert is_throttled(now, last_check, DEFAULTS) == throttled
