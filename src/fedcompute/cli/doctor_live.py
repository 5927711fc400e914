"""What `fedcompute doctor --server` finds out about a server over HTTP alone."""

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from fedcompute.cli.connection import connect
from fedcompute.errors import FedComputeError
from fedcompute.server.doctor.findings import Finding, Limits, spoken

_PATIENCE = 15.0
_BODY_LIMIT = 64 * 1024


def examine_server(url: str, api_key_file: Path | None, limits: Limits, now: datetime) -> Iterator[Finding]:
    """Whether a server answers and is ready, its clock, and its tasks and rounds as the management API shows them."""
    try:
        with httpx.Client(timeout=_PATIENCE, base_url=url) as http:
            alive, ready = http.get("/healthz"), http.get("/ready")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield Finding(
            "server_unreachable", url, f"the server does not answer: {type(error).__name__}",
            "check the URL, and that the server runs",
        )  # fmt: skip
        return
    if alive.status_code != 200:
        yield Finding("server_unhealthy", url, f"/healthz answers {alive.status_code}", "read the server's log")
    yield from _ready(url, ready)
    yield from _clock(alive, limits)
    try:
        tasks = connect(url, api_key_file).tasks()
    except FedComputeError as error:
        yield Finding("not_examined", "tasks", error.detail, error.remedy)
        return
    for view in tasks:
        yield from _task(view, tasks, limits, now)


def _ready(url: str, answer: httpx.Response) -> Iterator[Finding]:
    if answer.status_code == 200:
        return
    try:
        problems = answer.json()["problems"] if len(answer.content) < _BODY_LIMIT else {}
        what = "; ".join(f"{name}: {words}" for name, words in problems.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        what = ""
    yield Finding(
        "server_not_ready", url, what or f"/ready answers {answer.status_code}",
        "look after the parts that it names: fedcompute doctor --data-dir on the server's machine",
    )  # fmt: skip


def _clock(answer: httpx.Response, limits: Limits) -> Iterator[Finding]:
    try:
        told = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        return
    # A date has whole seconds, and the answer took a moment.
    skew = abs((datetime.now(UTC) - told).total_seconds()) - 1.0
    if skew > limits.skew:
        yield Finding(
            "clock_skew", "clock", f"this machine's clock and the server's are {skew:.0f} seconds apart",
            "synchronise the clocks (NTP): time-outs and signed URLs rest on them", {"seconds": skew},
        )  # fmt: skip


def _task(view: dict[str, Any], tasks: list[dict[str, Any]], limits: Limits, now: datetime) -> Iterator[Finding]:
    name = f"{view['population']}/{view['task_id']}"
    later = any(
        (one["population"], one["kind"]) == (view["population"], view["kind"]) and one["task_id"] > view["task_id"]
        for one in tasks
    )
    seconds = _age(view["created"], now)
    if view["status"] == "FAILED" and not later:
        yield Finding(
            "task_failed", name, f"the task failed: {view.get('reason') or 'internal'}",
            f"fedcompute task show --population {view['population']} --task-id {view['task_id']}",
        )  # fmt: skip
    if view["status"] == "CREATED" and seconds > limits.artifacts:
        yield Finding(
            "task_without_artifacts", name, f"the task was created {spoken(seconds)} ago and has not opened",
            "build it again or cancel it: fedcompute task cancel", {"seconds": seconds},
        )  # fmt: skip
    newest = view.get("newest_iteration")
    if view["status"] != "OPEN" or not newest:
        return
    seconds, status = _age(newest["entered"], now), newest["status"].lower()
    subject, goal = f"{name}/{newest['iteration_id']}", newest["report_goal"]
    have = newest["assignments"].get("UPLOAD_COMPLETED", 0)
    if status == "collecting" and seconds > limits.collecting:
        yield Finding(
            "round_below_goal", subject, f"the round has collected for {spoken(seconds)}: {have} of {goal}",
            "let more devices check in, set --round-expiry, or cancel the task and build it with a lower goal",
            {"seconds": seconds, "contributions": have, "goal": goal},
        )  # fmt: skip
    elif status in ("aggregating", "applying") and seconds > limits.working:
        yield Finding(
            f"round_stuck_{status}", subject, f"the round has been {status} for {spoken(seconds)}",
            "read the server's log, and restart it if it does nothing", {"seconds": seconds},
        )  # fmt: skip


def _age(moment: str, now: datetime) -> float:
    return (now - datetime.fromisoformat(moment)).total_seconds()
