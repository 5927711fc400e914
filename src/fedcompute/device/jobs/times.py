"""When a task runs: the arithmetic of its schedule (spec/device.md 1.5, 6.3, 6.6).

All times are Unix milliseconds, all delays and intervals milliseconds; both are integers.
"""

import random
from dataclasses import dataclass

from fedcompute.device.jobs.flags import Flags

PROBABLE_RUN = 585_000 + 30_000
"""For how long a run that has not ended is taken to be in progress."""


@dataclass(frozen=True)
class Delay:
    """How long a task waits after a run. `server`: what the server asked for, 0 for nothing; `transient`: what was
    drawn because nobody else named a delay, else None.
    """

    milliseconds: int
    server: int = 0
    transient: int | None = None


def clamp(value: int, low: int, high: int) -> int:
    """`value` within [low, high]; `low` where the bounds are crossed."""
    return max(low, min(high, value))


def bounded_interval(interval: int, flags: Flags) -> int:
    """A developer's interval as it counts: 1 minute to 6 days."""
    return clamp(
        interval,
        flags.integer("min_scheduling_interval_secs_for_federated_computation") * 1000,
        flags.integer("max_scheduling_interval_secs_for_federated_computation") * 1000,
    )


def first_run(now: int, recurrent: bool, interval: int, flags: Flags) -> int:
    """The earliest run of a new task: within five minutes, whatever its interval."""
    period = flags.integer("default_scheduling_period_secs") * 1000
    return now + (min(bounded_interval(interval, flags), period) if recurrent else period)


def changed_run(now: int, recurrent: bool, interval: int, flags: Flags) -> int:
    """The earliest run of a task that is scheduled again with another mode or interval."""
    if recurrent:
        return now + bounded_interval(interval, flags)
    return now + flags.integer("default_scheduling_period_secs") * 1000


def kept_run(now: int, recurrent: bool, earliest: int, flags: Flags) -> int:
    """The earliest run of a task that is scheduled again as it was, and was due at `earliest`."""
    if recurrent:
        return now + bounded_interval(earliest - now, flags)
    return now + clamp(earliest - now, 0, flags.integer("max_scheduling_period_secs") * 1000)


def probably_running(now: int, last_start: int, last_end: int) -> bool:
    """Whether a run has begun, not ended, and not lasted longer than runs may."""
    return last_start < now and now - last_start < PROBABLE_RUN and last_start > last_end


def server_delay(window: float | None, flags: Flags) -> int:
    """The delay drawn from a server's retry window, `window` seconds, as it counts: up to 2 days; 0 without one."""
    if window is None:
        return 0
    return clamp(round(window * 1000), 0, flags.integer("max_scheduling_period_secs") * 1000)


def transient_delay(flags: Flags, chance: random.Random) -> int:
    """Uniform within 15 minutes, 20 percent less or more; both bounds may be drawn."""
    middle = flags.integer("transient_error_retry_delay_secs") * 1000
    jitter = flags.number("transient_error_retry_delay_jitter_percent")
    return chance.randint(round(middle * (1 - jitter)), round(middle * (1 + jitter)))


def delay_after_run(
    recurrent: bool, interval: int, success: bool, server: int, flags: Flags, chance: random.Random
) -> Delay:
    """How long a task waits that goes on after a run; `server` as `server_delay` gives it.

    A developer's interval counts after a success only. One draw of `chance` if neither names a delay, else none.
    """
    if recurrent and success:
        return Delay(max(bounded_interval(interval, flags), server), server)
    if server > 0:
        return Delay(server, server)
    drawn = transient_delay(flags, chance)
    return Delay(drawn, server, drawn)
