"""Assignments per minute: sessions by the minute in which they first reached a status (spec/server.md 10.3, 10.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Bins:
    """Intervals of `step` minutes that follow one another, by their begins."""

    begins: Sequence[datetime]
    step: int

    def means(self, counts: Mapping[datetime, float]) -> list[float]:
        """The mean per minute of each interval; one without any count has zero."""
        values = [0.0] * len(self.begins)
        for moment, count in counts.items():
            values[self._place(moment)] += count
        return [value / self.step for value in values]

    def gaps(self, values: Mapping[datetime, float | None]) -> list[float | None]:
        """The value of each interval, by its begin; None where there is none."""
        return [values.get(begin) for begin in self.begins]

    def _place(self, moment: datetime) -> int:
        return int((moment - self.begins[0]) / (self.step * MINUTE))


def minutes_chart(tx: Transaction, tasks: Sequence[TaskKey], until: datetime, span: timedelta) -> Chart:
    """Assignments of `tasks` per minute, one line for each status that occurs, within `span` before `until`."""
    since = begin_of(until, span)
    found = {status: dict(counts) for status, counts in assignments_per_minute(tx, tasks, since, until).items()}
    moments = [moment for counts in found.values() for moment in counts]
    bins = bins_of(min(moments), max(moments), since, until) if moments else Bins([], 1)
    return Chart(
        "Assignments per minute",
        "time (UTC)",
        per_minute(bins.step),
        [
            Series(status_words(status), bins.begins, bins.means(counts), colour=STATUS_COLOURS[status])
            for status, counts in found.items()
        ],
        x_is="time",
        empty="No device has been assigned in this time.",
    )


def per_minute(step: int, what: str = "assignments") -> str:
    """The title of an axis that counts per minute, in intervals of `step` minutes."""
    return f"{what} per minute" + mean_of(step)


def mean_of(step: int) -> str:
    """What an axis says of intervals of more than a minute."""
    return f", mean of {step} min" if step > 1 else ""


def begin_of(until: datetime, span: timedelta) -> datetime:
    """Where a range of time begins: at an interval of its own, so that the first one is whole."""
    return floor(until - span, _step(int(span / MINUTE)))


def bins_of(first: datetime, last: datetime, since: datetime, until: datetime) -> Bins:
    """The intervals of a chart that has something from the minute `first` to the minute `last`.

    A minute more at each end, which is known to have nothing, as far as they lie between `since` and `until`. Of more
    than MOST_POINTS minutes, intervals of several.
    """
    begin = max(first - MINUTE, min(first, floor(since, 1)))
    end = min(last + MINUTE, max(last, floor(until, 1)))
    step = _step(int((end - begin) / MINUTE) + 1)
    begin = floor(begin, step)
    return Bins([begin + place * step * MINUTE for place in range(int((end - begin) / (step * MINUTE)) + 1)], step)


def floor(moment: datetime, minutes: int) -> datetime:
    """The begin of the interval of so many minutes, counted from the epoch, that a time lies in."""
    length = 60 * minutes
    return datetime.fromtimestamp(moment.timestamp() // length * length, UTC)


def _step(minutes: int) -> int:
    """The length of an interval, minutes, of which MOST_POINTS are enough wherever the first one begins."""
    return next((step for step in _STEPS if minutes <= step * (MOST_POINTS - 1)), _STEPS[-1])
