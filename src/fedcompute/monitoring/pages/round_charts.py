"""The charts of a round's page; `round` of their query is its number."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from starlette.datastructures import QueryParams

from fedcompute.monitoring.pages.charts import MOST_POINTS, Chart, Series
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.summaries import arrivals_of_round, round_attempts
from fedcompute.storage.tasks import get_task
from fedcompute.storage.training_seconds import training_seconds

# Seconds, six steps to every power of ten: devices differ by factors, and one that slept must not hide the others.
EDGES = tuple(step * 10.0**power / 10 for power in range(-2, 7) for step in (10, 15, 20, 30, 50, 70))


def arrivals(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Contributions of a round that had arrived, at the time of each, against the goal."""
    iteration_id = _round(query)
    with context.database.read() as tx:
        existing_task(get_task(tx, key), key)
        times = arrivals_of_round(tx, key, iteration_id, limit=100_000)
        attempts = round_attempts(tx, key, iteration_id)
    step = max(1, -(-(len(times) - 1) // (MOST_POINTS - 1)))
    kept = [at for at in range(len(times)) if at % step == 0 or at == len(times) - 1]
    lines = [Series("contributions", [times[at] for at in kept], [at + 1 for at in kept], colour=2)]
    if times and attempts:
        goal = attempts[-1].report_goal
        lines.append(Series("goal", [times[0], times[-1]], [goal, goal], dashed=True, colour=7))
    return Chart(
        "Uploads over the round",
        "time (UTC)",
        "contributions",
        lines,
        x_is="time",
        empty="No upload yet, or none is kept any more.",
        note="Of all attempts together." if len(attempts) > 1 else "",
    )


def durations(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """How many devices of a round trained how long."""
    with context.database.read() as tx:
        existing_task(get_task(tx, key), key)
        seconds = training_seconds(tx, key, _round(query))
    names, counts = histogram(seconds)
    return Chart(
        "Training durations",
        "seconds from assignment to report",
        "devices",
        [Series("devices", names, counts, colour=0)],
        x_is="category",
        kind="bar",
        empty="No device has reported yet, or none is kept any more.",
    )


def histogram(seconds: Sequence[float]) -> tuple[list[str], list[int]]:
    """Intervals of EDGES from the first that has a value to the last, each without its upper end, and their counts."""
    counts = Counter(bisect_right(EDGES, one) for one in seconds)
    places = range(min(counts, default=0), max(counts, default=-1) + 1)
    return [_interval(place) for place in places], [counts[place] for place in places]


def _interval(place: int) -> str:
    if place == 0:
        return f"below {EDGES[0]:g}"
    if place == len(EDGES):
        return f"from {EDGES[-1]:g}"
    return f"{EDGES[place - 1]:g} to {EDGES[place]:g}"


def _round(query: QueryParams) -> int:
    return int(text) if (text := query.get("round", "")).isdecimal() and len(text) < 10 else 0


ROUND_CHARTS: Mapping[str, Callable[[Context, TaskKey, QueryParams], Chart]] = {
    "arrivals": arrivals,
    "durations": durations,
}
