"""The trace of a round: check-ins, reports, uploads, jobs and the release, without a device carrying anything.

Wherever something is done for a round, its trace is found from its key. The wire names a round without its attempt, so
all attempts share one trace.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

from fedcompute import tracing
from fedcompute.protos.task_assignments_pb2 import CreateTaskAssignmentResponse
from fedcompute.server.context import Context
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.schema import RELEASED_ITERATION, IterationStatus
from fedcompute.storage.summaries import RoundSummary, round_attempts, round_timeline
from fedcompute.storage.tasks import TaskRow, get_task
from fedcompute.tracing import Finished, Value

if TYPE_CHECKING:
    from opentelemetry.context import Context as Place

ROUND = "round"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_NAME = 64  # of a population
_PHASES = {
    IterationStatus.COLLECTING: "collecting",
    IterationStatus.AGGREGATING: "aggregating",
    IterationStatus.APPLYING: "applying",
}


def place_of(context: Context, key: IterationKey, *, with_attempt: bool = False) -> "Place | None":
    """The place of a round's spans; None while tracing is off."""
    if tracing.installed() is None:
        return None
    return tracing.below(_ids(context, key), ROUND, _named(key, with_attempt=with_attempt))


def within_round(context: Context, key: IterationKey, step: Callable[[], bool]) -> bool:
    """Runs a step of the engine at the place of its round."""
    with tracing.within(place_of(context, key, with_attempt=True)):
        return step()


def record_check_in(context: Context, answer: CreateTaskAssignmentResponse, started: int) -> None:
    """Sends the span of a check-in that got an assignment; `started`: nanoseconds since 1970.

    One that got none belongs to no round, and figures count it: devices come by the thousand to hear that.
    """
    if tracing.installed() is None or not answer.HasField("task_assignment"):
        return
    given = answer.task_assignment
    key = IterationKey(given.population_name, int(given.task_id), int(given.aggregation_id))
    tracing.record(Finished("check_in", started, time.time_ns(), {}), place_of(context, key), serves=True)


def report_span(context: Context, key: IterationKey, result: str) -> AbstractContextManager[dict[str, Value]]:
    """The span of a device's report."""
    return tracing.span("report", {"result": result}, parent=place_of(context, key), serves=True)


def upload_span(context: Context, path: str) -> AbstractContextManager[dict[str, Value]]:
    """The span of an upload to the path of an update."""
    try:
        population, task, iteration, *_ = path.split("/")
        place = place_of(context, IterationKey(population, int(task), int(iteration)))
    except ValueError:
        # The route itself refuses a path that is no update's.
        place = None
    return tracing.span("upload", parent=place, serves=True)


def record_attempt(context: Context, key: IterationKey) -> None:
    """Sends the phases of an attempt that is over and settled and, if no other followed, the round itself."""
    if tracing.installed() is None:
        return
    with context.database.read() as tx:
        attempts = round_attempts(tx, key.task, key.iteration_id)
        timeline = round_timeline(tx, key)
        task = get_task(tx, key.task)
    mine = next(one for one in attempts if one.key == key)
    place = place_of(context, key, with_attempt=True)
    error = _error(mine)
    for (began, status), (ended, following) in pairwise(timeline):
        failed = error if following not in (*RELEASED_ITERATION, *_PHASES) else None
        if status in _PHASES:
            tracing.record(Finished(_PHASES[status], _nanoseconds(began), _nanoseconds(ended), {}, failed), place)
    if attempts[-1].key == key and task is not None:
        whole = Finished(ROUND, _nanoseconds(attempts[0].opened), _nanoseconds(mine.entered), _facts(mine, task), error)
        tracing.record_root(_ids(context, key), whole)


def _ids(context: Context, key: IterationKey) -> tuple[int, int]:
    # Seeded by a secret of the database: two servers that send to one collector have populations of the same name.
    return tracing.derived_ids(context.url_key, f"{key.population}/{key.task_id}/{key.iteration_id}")


def _named(key: IterationKey, *, with_attempt: bool) -> dict[str, Value]:
    named: dict[str, Value] = {
        "population": key.population[:_LONGEST_NAME],
        "task": key.task_id,
        "iteration": key.iteration_id,
    }
    return named | {"attempt": key.attempt_id} if with_attempt else named


def _facts(summary: RoundSummary, task: TaskRow) -> dict[str, Value]:
    counts: dict[str, Value] = {f"assignments.{one.name.lower()}": n for one, n in summary.assignments.items()}
    rejections: dict[str, Value] = {f"rejected.{reason}": n for reason, n in summary.rejections.items()}
    return {
        **_named(summary.key, with_attempt=True),
        "kind": task.kind.name.lower(),
        "status": summary.status.name.lower(),
        "report_goal": summary.report_goal,
        # That of the build which made the task, too.
        "correlation_id": task.correlation_id,
        **counts,
        **rejections,
    }


def _error(summary: RoundSummary) -> str | None:
    return None if summary.status in RELEASED_ITERATION else summary.reason or summary.status.name.lower()


def _nanoseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
