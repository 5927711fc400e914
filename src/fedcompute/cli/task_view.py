"""A task on a terminal: what the operator API says, as tables."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedcompute.monitoring.plots import metric_label

_SHOWN_ROUNDS = 12
_BAR, _CURVES, _CURVE = 24, 4, 40
_SPARKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"OPEN": "green", "COMPLETED": "blue", "FAILED": "red", "CANCELED": "yellow", "PAUSED": "yellow"}


def task_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """One line per task."""
    table = _table("population", "task", "kind", "status", "round", "goal", "traffic", "created")
    for task in tasks:
        newest = task.get("newest_iteration")
        table.add_row(
            str(task["population"]),
            str(task["task_id"]),
            str(task["kind"]).lower(),
            _status(task["status"], task.get("reason")),
            f"{newest['iteration_id'] if newest else 0} of {task['total_iteration']}",
            str(task["min_aggregation_size"]),
            str(task["traffic_weight"]),
            _time(task["created"]),
        )
    return table


def task_view(view: Mapping[str, Any]) -> RenderableType:
    """One task: a head line, its latest rounds with their metrics, and what went wrong."""
    task = view["task"]
    done = sum(1 for one in view["iterations"] if one["completed"])
    head = Text.assemble(
        (f"{task['population']}/{task['task_id']}", "bold"),
        f"  {str(task['kind']).lower()}  ",
        _status(task["status"], task.get("reason")),
        f"  {done} of {task['total_iteration']} rounds  report goal {task['min_aggregation_size']}"
        f"  at most {task['max_aggregation_size']} assigned",
    )
    parts: list[RenderableType] = [head, *_under_way(view), _rounds(view), *_curves(view)]
    if view["assignments"]:
        parts.append(_counts("devices", view["assignments"]))
    if view["rejections"]:
        parts.append(_counts("rejected", view["rejections"]))
    if view["ledger"]:
        parts.append(Text(_spent(view["ledger"]), style="dim"))
    if failure := view.get("failure"):
        # A task whose budget is spent has done what it was allowed to.
        ended, style = ("ended early", "yellow") if task["status"] == "COMPLETED" else ("failed", "red")
        parts.append(Text(f"{ended}: {failure.get('message', '')}  {failure.get('remedy', '')}", style=style))
    return Group(*parts)


def _under_way(view: Mapping[str, Any]) -> list[Text]:
    """A bar for each round that collects: contributions of the report goal."""
    lines = []
    for one in view["iterations"][-_SHOWN_ROUNDS:]:
        if one["status"] == "COLLECTING":
            done, goal = one["assignments"].get("UPLOAD_COMPLETED", 0), one["report_goal"]
            filled = min(_BAR, _BAR * done // max(1, goal))
            bar = "█" * filled + "░" * (_BAR - filled)
            lines.append(
                Text.assemble(f"round {one['iteration_id']} ", (bar, "cyan"), f" {done} of {goal} contributions")
            )
    return lines


def _curves(view: Mapping[str, Any]) -> list[Text]:
    """The latest rounds of each metric as a row of small bars between its least and its greatest value."""
    lines = []
    metrics = _metrics(view)
    for name in list(dict.fromkeys(name for values in metrics.values() for name in values))[:_CURVES]:
        found = [one.get(name) for _, one in sorted(metrics.items())]
        values = [value for value in found if value is not None][-_CURVE:]
        if len(values) > 2:
            low, span = min(values), (max(values) - min(values)) or 1.0
            drawn = "".join(_SPARKS[round((value - low) / span * (len(_SPARKS) - 1))] for value in values)
            lines.append(Text.assemble(f"{metric_label(name)} ", (drawn, "green"), f" {_number(values[-1])}"))
    return lines


def _spent(ledger: Sequence[Mapping[str, Any]]) -> str:
    epsilon, delta = ledger[-1].get("cumulative_epsilon"), ledger[-1].get("delta")
    spent = "unbounded epsilon" if epsilon is None else f"epsilon {epsilon:.4g} at delta {delta:g}"
    return f"privacy: {spent}, the whole population's; see `fedcompute privacy report` for this task's"


def progress_lines(found: Mapping[str, Any]) -> list[str]:
    """How far a task is, in a few lines."""
    lines = [
        f"{found['population']}/{found['task_id']}: {_words(found['status'])} for "
        f"{_duration(found['seconds_in_status'])}, "
        f"{found['rounds_completed']} of {found['rounds_total']} rounds released"
    ]
    for one in found["rounds"]:
        rate = one["contributions_per_minute"]
        pace = "" if rate is None else f", {_pace(rate)} a minute"
        lines.append(
            f"round {one['iteration_id']}: {_words(one['status'])} for {_duration(one['seconds_in_status'])}, "
            f"{one['contributions']} of {one['report_goal']} contributions{pace}"
        )
    if found["rounds_per_hour"] is not None:
        left = "" if found["seconds_left"] is None else f"; about {_duration(found['seconds_left'])} left"
        lines.append(f"{_pace(found['rounds_per_hour'])} rounds an hour{left}")
    return lines


def summary(view: Mapping[str, Any]) -> dict[str, Any]:
    """What a program that watches wants to know of a moment."""
    newest = view["iterations"][-1] if view["iterations"] else None
    done = [one["iteration_id"] for one in view["iterations"] if one["completed"]]
    return {
        "status": view["task"]["status"],
        "reason": view["task"].get("reason"),
        "completed_rounds": len(done),
        "total_rounds": view["task"]["total_iteration"],
        "round": newest["iteration_id"] if newest else 0,
        "round_status": newest["status"] if newest else None,
        "assignments": newest["assignments"] if newest else {},
        "metrics": _metrics(view).get(max(done), {}) if done else {},
    }


def _rounds(view: Mapping[str, Any]) -> Table:
    metrics = _metrics(view)
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    evaluates = any(one["evaluated_iteration_id"] for one in view["iterations"])
    table = _table(
        "round",
        *(["of round"] if evaluates else []),
        "status",
        "devices",
        *map(metric_label, names),
        "seconds",
        wrap=True,
    )
    for one in view["iterations"][-_SHOWN_ROUNDS:]:
        values = metrics.get(one["iteration_id"], {})
        table.add_row(
            str(one["iteration_id"]),
            *([str(one["evaluated_iteration_id"] or "")] if evaluates else []),
            _status(one["status"]),
            f"{one['assignments'].get('UPLOAD_COMPLETED', 0)} of {one['report_goal']}",
            *(_number(values.get(name)) for name in names),
            _seconds(one),
        )
    return table


def _metrics(view: Mapping[str, Any]) -> dict[int, dict[str, float | None]]:
    found: dict[int, dict[str, float | None]] = {}
    for row in view["metrics"]:
        found.setdefault(row["iteration_id"], {})[row["name"]] = row["value"]
    return found


def _counts(title: str, counts: Mapping[str, int]) -> Text:
    return Text(f"{title}: " + "  ".join(f"{name.lower().replace('_', ' ')} {count}" for name, count in counts.items()))


def _table(*names: str, wrap: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=not wrap)
    return table


def _status(status: str, reason: str | None = None) -> Text:
    text = status.lower() if reason is None else f"{status.lower()} ({reason})"
    return Text(text.replace("_", " "), style=_COLOURS.get(status, ""))


def _words(status: str) -> str:
    return status.lower().replace("_", " ")


def _pace(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _seconds(one: Mapping[str, Any]) -> str:
    if not one["completed"]:
        return ""
    return f"{(datetime.fromisoformat(one['completed']) - datetime.fromisoformat(one['opened'])).total_seconds():.1f}"


def _time(text: str) -> str:
    return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}"
