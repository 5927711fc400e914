"""Assignments per minute: sessions by the minute in which they first reached a status (spec/server.md 10.3, 10.4)."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from fedcompute.monitoring.pages.charts import MOST_POINTS, Chart, Series
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import AssignmentStatus
from fedcompute.storage.summaries import assignments_per_minute

MINUTE = timedelta(minutes=1)
LONGEST_RANGE = timedelta(days=30)
RANGES = {
    "hour": timedelta(hours=1),
    "6 hours": timedelta(hours=6),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
    "30 days": LONGEST_RANGE,
}
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 240, 360, 720, 1440)
STATUS_COLOURS = {
    AssignmentStatus.UPLOAD_COMPLETED: 2,
    AssignmentStatus.ASSIGNED: 0,
    AssignmentStatus.LOCAL_COMPLETED: 6,
    AssignmentStatus.REMOTE_FAILED: 5,
    AssignmentStatus.LOCAL_FAILED: 1,
    AssignmentStatus.LOCAL_FAILED_EXAMPLE_GENERATION: 1,
    AssignmentStatus.LOCAL_FAILED_MODEL_COMPUTATION: 1,
    AssignmentStatus.LOCAL_FAILED_OPS_ERROR: 1,
    AssignmentStatus.LOCAL_NOT_ELIGIBLE: 4,
    AssignmentStatus.LOCAL_TIMEOUT: 3,
    AssignmentStatus.UPLOAD_TIMEOUT: 3,
    AssignmentStatus.CANCELED: 7,
}


def status_words(status: AssignmentStatus) -> str:
    """A status as people read it."""
    return status.name.lower().replace("_", " ")


def minutes_chart(tx: Transaction, tasks: Sequence[TaskKey], until: datetime, span: timedelta) -> Chart:
    """Assignments of `tasks` per minute, one line for each status that occurs, within `span` before `until`."""
    found = assignments_per_minute(tx, tasks, until - span, until)
    drawn, step = filled({status_words(status): dict(minutes) for status, minutes in found.items()})
    places = {status_words(status): STATUS_COLOURS[status] for status in AssignmentStatus}
    return Chart(
        "Assignments per minute",
        "time (UTC)",
        per_minute(step),
        [Series(name, times, values, colour=places[name]) for name, times, values in drawn],
        x_is="time",
        empty="No device has been assigned in this time.",
    )


def per_minute(step: int, what: str = "assignments") -> str:
    """The title of an axis that counts per minute, in intervals of `step` minutes."""
    return f"{what} per minute" + (f", mean of {step} min" if step > 1 else "")


def filled(
    counts: Mapping[str, Mapping[datetime, float]],
) -> tuple[list[tuple[str, list[datetime], list[float]]], int]:
    """Each name's counts by minute, minutes without any filled with zero, and the minutes of one interval.

    All names share the time from the first count to a minute behind the last. Of more than MOST_POINTS minutes,
    intervals of several minutes hold their mean.
    """
    moments = [moment for minutes in counts.values() for moment in minutes]
    if not moments:
        return [], 1
    first, last = min(moments) - MINUTE, max(moments) + MINUTE
    whole = int((last - first) / MINUTE) + 1
    step = next((step for step in _STEPS if whole <= step * MOST_POINTS), _STEPS[-1])
    if step > 1:
        first = floor(first, step)
    length = int((last - first) / (step * MINUTE)) + 1
    times = [first + number * step * MINUTE for number in range(length)]
    drawn = []
    for name, minutes in counts.items():
        values = [0.0] * length
        for moment, count in minutes.items():
            values[int((moment - first) / (step * MINUTE))] += count
        drawn.append((name, times, [value / step for value in values]))
    return drawn, step


def floor(moment: datetime, minutes: int) -> datetime:
    """The begin of the interval of so many minutes, counted from the epoch, that a time lies in."""
    length = 60 * minutes
    return datetime.fromtimestamp(moment.timestamp() // length * length, UTC)
