"""The charts of a task's page, each a function of the rounds that the page shows."""

from collections.abc import Callable, Mapping, Sequence

from starlette.datastructures import QueryParams

from fedcompute.monitoring.pages.charts import MOST_POINTS, Chart, Series
from fedcompute.monitoring.pages.minutes import LONGEST_RANGE, STATUS_COLOURS, minutes_chart, status_words
from fedcompute.monitoring.pages.round_charts import ROUND_CHARTS
from fedcompute.monitoring.pages.task_view import plan_facts
from fedcompute.monitoring.plots import metric_label
from fedcompute.privacy.chain import MODEL, NO_MECHANISM, Entry
from fedcompute.privacy.ledger import GaussianEvent, composed_noise_multiplier, read_events
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context, now
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.charts import evaluations_of, metric_names, metric_series, task_entries
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import AssignmentStatus
from fedcompute.storage.summaries import RoundSummary, round_summaries
from fedcompute.storage.tasks import TaskRow, get_task

_ROUND = "round"
_TRAINING, _EVALUATION = 0, 1
_EVALUATION_ROUNDS = MOST_POINTS


def metric(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """The metric `name` by round, and the same metric of the task's evaluation at the rounds that it measured."""
    name, before = query.get("name", ""), _before(query)
    with context.database.read() as tx:
        row = _task(tx, key)
        own = metric_series(tx, key, [name], limit=MOST_POINTS, before=before)[name]
        if row.is_training:
            lines = [_with_gaps("training", own, _TRAINING)]
        else:
            lines = [_through("evaluation", _measured_at(tx, key, own))]
        for one in evaluations_of(tx, key) if row.is_training else ():
            names = metric_names(tx, one.key)
            same = next((other for other in names if metric_label(other) == metric_label(name)), None)
            if same is not None:
                found = metric_series(tx, one.key, [same], limit=_EVALUATION_ROUNDS)[same]
                points = _measured_at(tx, one.key, found)
                shown = [point for point in points if before is None or point[0] < before]
                label = "evaluation" if len(lines) == 1 else f"evaluation, task {one.key.task_id}"
                lines.append(_through(label, shown, dashed=True))
    return Chart(
        metric_label(name).capitalize(),
        _ROUND if row.is_training else "training round measured",
        metric_label(name),
        lines,
        share="accuracy" in name,
        empty="No round has measured it yet.",
        note="The evaluation stands at the training round whose model it measured." if len(lines) > 1 else "",
    )


def noise(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Noise multiplier of each release of the model, as an accountant takes its ledger entry."""
    entries = _entries(context, key, query)
    return _by_entry("Noise multiplier", "noise deviation / sensitivity", entries, _noise_multiplier)


def clip(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Clip norm of each release of the model."""
    entries = _entries(context, key, query)
    return _by_entry("Clip norm", "L2 norm, model units", entries, lambda entry: entry.clip_norm)


def epsilon(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """The population's epsilon after each release of this task, and what limits it."""
    entries = _entries(context, key, query)
    with context.database.read() as tx:
        budget, row = budget_of(tx, key.population), get_task(tx, key)
    promised = plan_facts(context, row)[1] if row else None
    limit, name = (budget.epsilon, "budget") if budget else (promised, "promise of the plan")
    rounds = [one.iteration_id for one in entries]
    lines = [Series("spent", rounds, [one.cumulative_epsilon for one in entries], colour=3)]
    if limit is not None and rounds:
        lines.append(Series(name, [rounds[0], rounds[-1]], [limit, limit], dashed=True, colour=7))
        left = [None if one.cumulative_epsilon is None else max(0.0, limit - one.cumulative_epsilon) for one in entries]
        lines.append(Series("left", rounds, left, colour=2))
    delta = f" at delta {entries[-1].delta:g}" if entries else ""
    return Chart(
        "Epsilon spent",
        _ROUND,
        f"epsilon{delta}",
        lines if entries else [],
        empty="Nothing was released under differential privacy.",
        note="Of the whole population, all its tasks together, under the assumptions of their plans."
        if entries
        else "",
    )


def devices(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """What became of each round's devices."""
    rounds = _rounds(context, key, query)
    order = sorted(AssignmentStatus, key=lambda status: (STATUS_COLOURS[status] != 2, status))
    return _stacked(
        "Devices by state",
        "devices",
        rounds,
        [
            (status_words(status), [one.assignments.get(status, 0) for one in rounds], STATUS_COLOURS[status])
            for status in order
        ],
        "No device has been assigned yet.",
    )


def rejections(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Contributions that were rejected, by the reason."""
    rounds = _rounds(context, key, query)
    reasons = sorted({reason for one in rounds for reason in one.rejections})
    return _stacked(
        "Rejected contributions by reason",
        "contributions",
        rounds,
        [(reason.replace("_", " "), [one.rejections.get(reason, 0) for one in rounds], None) for reason in reasons],
        "No contribution was rejected.",
    )


def phases(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """How long each round collected, aggregated and applied."""
    rounds = _rounds(context, key, query)
    parts = (
        ("collect", [one.collecting_seconds for one in rounds], 0),
        ("aggregate", [one.aggregating_seconds for one in rounds], 4),
        ("apply", [one.applying_seconds for one in rounds], 3),
    )
    return _stacked("Iteration processing time", "seconds", rounds, parts, "No round has got that far yet.")


def completion(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Minutes from a round's first COLLECTING to COMPLETED."""
    rounds = _rounds(context, key, query)
    minutes = [None if one.completion_seconds is None else one.completion_seconds / 60 for one in rounds]
    return _line("Iteration completion time", "minutes", rounds, minutes, logarithmic=True)


def working(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Seconds from a round's first AGGREGATING to COMPLETED."""
    rounds = _rounds(context, key, query)
    seconds = [
        None if one.aggregating_seconds is None else _sum(one.aggregating_seconds, one.applying_seconds)
        for one in rounds
    ]
    return _line("Aggregation and model update time", "seconds", rounds, seconds, logarithmic=True)


def over_time(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """The number of each round against the time at which it opened."""
    rounds = _rounds(context, key, query)
    series = Series(str(key), [one.opened for one in rounds], [one.key.iteration_id for one in rounds])
    return Chart("Iterations over time", "opened (UTC)", _ROUND, [series], x_is="time", empty="No round yet.")


def training(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Median seconds from assignment to the device's report."""
    rounds = _rounds(context, key, query)
    return _line("Device training duration", "seconds, median", rounds, [one.training_seconds for one in rounds])


def upload(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Median seconds from the device's report to its upload."""
    rounds = _rounds(context, key, query)
    return _line("Device upload duration", "seconds, median", rounds, [one.upload_seconds for one in rounds])


def assignment(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Mean seconds from assignment to upload."""
    rounds = _rounds(context, key, query)
    return _line("Assignment duration", "seconds, mean", rounds, [one.assignment_seconds for one in rounds])


def minutes(context: Context, key: TaskKey, query: QueryParams) -> Chart:
    """Assignments per minute, by status."""
    with context.database.read() as tx:
        _task(tx, key)
        return minutes_chart(tx, [key], now(), LONGEST_RANGE)


TASK_CHARTS: Mapping[str, Callable[[Context, TaskKey, QueryParams], Chart]] = {
    "metric": metric,
    "noise": noise,
    "clip": clip,
    "epsilon": epsilon,
    "devices": devices,
    "rejections": rejections,
    "phases": phases,
    "completion": completion,
    "working": working,
    "over-time": over_time,
    "training": training,
    "upload": upload,
    "assignment": assignment,
    "minutes": minutes,
    **ROUND_CHARTS,
}


def _before(query: QueryParams) -> int | None:
    text = query.get("before", "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _task(tx: Transaction, key: TaskKey) -> TaskRow:
    return existing_task(get_task(tx, key), key)


def _rounds(context: Context, key: TaskKey, query: QueryParams) -> list[RoundSummary]:
    """The newest attempt of each round."""
    with context.database.read() as tx:
        _task(tx, key)
        found = round_summaries(tx, key, before=_before(query), limit=MOST_POINTS)
    return list({one.key.iteration_id: one for one in found}.values())


def _entries(context: Context, key: TaskKey, query: QueryParams) -> list[Entry]:
    with context.database.read() as tx:
        _task(tx, key)
        found = task_entries(tx, key, released=MODEL, before=_before(query), limit=MOST_POINTS)
    return [one for one in found if one.mechanism != NO_MECHANISM]


def _measured_at(
    tx: Transaction, key: TaskKey, points: Sequence[tuple[int, float | None]]
) -> list[tuple[int, float | None]]:
    """An evaluation's values at the training rounds that it measured; of several the newest."""
    measured = {
        one.key.iteration_id: one.evaluated_iteration_id for one in round_summaries(tx, key, limit=_EVALUATION_ROUNDS)
    }
    found = {at: value for number, value in points if (at := measured.get(number)) is not None}
    return sorted(found.items())


def _noise_multiplier(entry: Entry) -> float | None:
    """The noise multiplier of a release; what an adaptive mechanism noises beside the sum is in it, as in its plan."""
    multipliers = [event.noise_multiplier for event in read_events(entry.event or {})]
    # One keeps its own number, which squaring and a root would round.
    return multipliers[0] if len(multipliers) == 1 else composed_noise_multiplier(map(GaussianEvent, multipliers))


def _sum(first: float, second: float | None) -> float | None:
    return None if second is None else first + second


def _with_gaps(name: str, points: Sequence[tuple[int, float | None]], colour: int) -> Series:
    """A line with a gap where a round between is missing, unless most of them are: single points make no line."""
    known = dict(points)
    rounds = list(range(points[0][0], points[-1][0] + 1)) if points else []
    if len(rounds) > min(MOST_POINTS, 2 * len(known)):
        rounds = list(known)
    return Series(name, rounds, [known.get(number) for number in rounds], colour=colour)


def _through(name: str, points: Sequence[tuple[int, float | None]], *, dashed: bool = False) -> Series:
    """A line from each round that was measured to the next."""
    return Series(name, [x for x, _ in points], [y for _, y in points], dashed=dashed, marks=True, colour=_EVALUATION)


def _by_entry(title: str, value: str, entries: Sequence[Entry], of: Callable[[Entry], float | None]) -> Chart:
    series = Series(title.lower(), [one.iteration_id for one in entries], [of(one) for one in entries], colour=3)
    return Chart(title, _ROUND, value, [series], empty="Nothing was released under differential privacy.")


def _stacked(
    title: str,
    value: str,
    rounds: Sequence[RoundSummary],
    parts: Sequence[tuple[str, Sequence[float | None], int | None]],
    empty: str,
) -> Chart:
    numbers = [one.key.iteration_id for one in rounds]
    series = [Series(name, numbers, values, colour=colour) for name, values, colour in parts if any(values)]
    return Chart(title, _ROUND, value, series, kind="bar", stacked=True, empty=empty)


def _line(
    title: str, value: str, rounds: Sequence[RoundSummary], values: Sequence[float | None], *, logarithmic: bool = False
) -> Chart:
    known = [one for one in values if one is not None]
    series = Series(title.lower(), [one.key.iteration_id for one in rounds], values) if known else None
    return Chart(
        title,
        _ROUND,
        value,
        [series] if series else [],
        logarithmic=logarithmic,
        empty="No round has got that far yet.",
    )
