"""Whether the device may work now (spec/device.md 6.4)."""

from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum

from fedcompute.device.jobs.flags import Flags

LOW_BATTERY = 15
"""Percent below which a battery that is not charging is low."""


class Constraint(StrEnum):
    """What a job can wait for."""

    IDLE = "idle"
    BATTERY_NOT_LOW = "battery not low"
    UNMETERED = "unmetered network"
    STORAGE_NOT_LOW = "storage not low"


TRAINING = frozenset({Constraint.IDLE, Constraint.BATTERY_NOT_LOW, Constraint.UNMETERED})
"""The constraints of every federated task."""


@dataclass(frozen=True)
class Conditions:
    """The state of a device at one moment. `load`: share of its processors that work, as far as known;
    `battery_percent`: 100 without a battery; `thermal_status`: 0, no heat, to 6, shutting down; `free_bytes`: for
    temporary files; `unknown`: names of fields that could not be read and count as good.
    """

    idle: bool = True
    load: float | None = None
    battery_percent: int = 100
    charging: bool = False
    network: bool = True
    unmetered: bool = True
    thermal_status: int = 0
    free_bytes: int = 1 << 60
    unknown: frozenset[str] = frozenset()


def unmet(conditions: Conditions, constraints: Set[Constraint], flags: Flags) -> tuple[str, ...]:
    """Those of a job's constraints that do not hold, in words with numbers; while there are any the job waits."""
    failing = []
    if Constraint.IDLE in constraints and not conditions.idle:
        load = "" if conditions.load is None else f": load {conditions.load:.2f} per processor"
        failing.append(f"not idle{load}")
    low = conditions.battery_percent < LOW_BATTERY and not conditions.charging
    if Constraint.BATTERY_NOT_LOW in constraints and low:
        failing.append(f"battery {conditions.battery_percent} %, below {LOW_BATTERY} %, not charging")
    if Constraint.UNMETERED in constraints and not (conditions.network and conditions.unmetered):
        failing.append("metered network" if conditions.network else "no network")
    limit = flags.integer("memory_size_limit")
    if Constraint.STORAGE_NOT_LOW in constraints and conditions.free_bytes < limit:
        failing.append(f"{conditions.free_bytes} bytes free, below {limit}")
    return tuple(failing)


def is_throttled(now: int, last_check: int | None, flags: Flags) -> bool:
    """Whether a start comes so soon after the last check that it passes unchecked; both in milliseconds."""
    throttle = flags.integer("training_condition_check_period_throttle_period_mills")
    return last_check is not None and 0 <= now - last_check < throttle


def start_failures(conditions: Conditions, flags: Flags) -> tuple[str, ...]:
    """The checks that keep a run that fired from starting, in words with numbers."""
    failing = []
    battery, hot, free = (
        flags.integer(name)
        for name in ("training_min_battery_level", "training_thermal_to_throttle", "memory_size_limit")
    )
    if conditions.battery_percent < battery:
        failing.append(f"battery {conditions.battery_percent} %, below {battery} %")
    if conditions.thermal_status >= hot:
        failing.append(f"thermal status {conditions.thermal_status}, not below {hot}")
    if conditions.free_bytes < free:
        failing.append(f"{conditions.free_bytes} bytes free, below {free}")
    return tuple(failing)
