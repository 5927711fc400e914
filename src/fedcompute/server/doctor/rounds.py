"""Tasks, rounds, batches and assignments that do not get on (lessons B1-B9)."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import func, select

from fedcompute.errors import CATALOGUE, Reason
from fedcompute.server.doctor.findings import Finding, Limits, Patient, age, spoken
from fedcompute.storage import schema
from fedcompute.storage.assignments import count_assignments, unbatched
from fedcompute.storage.batches import list_batches, sum_batches
from fedcompute.storage.database import Transaction
from fedcompute.storage.iterations import IterationRow, list_iterations, newest_iteration
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    MODEL,
    client_only_plan_path,
    server_checkpoint_path,
    server_plan_path,
)
from fedcompute.storage.releases import completed_iterations
from fedcompute.storage.schema import (
    ACTIVE_ITERATION,
    AssignmentStatus,
    BatchStatus,
    IterationStatus,
    TaskKind,
    TaskStatus,
)
from fedcompute.storage.tasks import TaskRow, list_tasks

_ENGINE = "make sure that a server with the engine's role runs on this database, and read its log"


def examine_tasks(patient: Patient, limits: Limits) -> Iterator[Finding]:
    """CREATED tasks without artifacts, failed tasks that nobody replaced, open tasks without a round."""
    with patient.database.read() as tx:
        created = list_tasks(tx, statuses=[TaskStatus.CREATED])
        failed = [one for one in list_tasks(tx, statuses=[TaskStatus.FAILED]) if _is_newest(tx, one)]
        idle = [(one, found) for one in list_tasks(tx, statuses=[TaskStatus.OPEN]) if (found := _idle(tx, one))]
    for task in created:
        yield from _created(patient, limits, task)
    for task in failed:
        yield _failed(task)
    for task, since in idle:
        seconds = age(patient, since)
        if seconds > limits.idle:
            yield Finding(
                "task_without_round",
                str(task.key),
                f"the task is open and has had no round for {spoken(seconds)}",
                _ENGINE,
                {"seconds": seconds},
            )


def examine_rounds(patient: Patient, limits: Limits) -> Iterator[Finding]:
    """Rounds that collect, add up or apply for too long, batches without an end, time-outs that nobody enforces."""
    with patient.database.read() as tx:
        paused = {one.key for one in list_tasks(tx, statuses=[TaskStatus.PAUSED])}
        for one in list_iterations(tx, statuses=ACTIVE_ITERATION):
            yield from _round(patient, limits, tx, one, paused)
        yield from _overdue(patient, tx)


def _created(patient: Patient, limits: Limits, task: TaskRow) -> Iterator[Finding]:
    seconds = age(patient, task.created)
    if seconds <= limits.artifacts:
        return
    paths = {"client-only plan": client_only_plan_path(task.key), "server plan": server_plan_path(task.key)}
    if task.is_training:
        paths["initial checkpoint"] = server_checkpoint_path(task.key, 0)
    missing = [name for name, path in paths.items() if not patient.blobs.exists(MODEL, path)]
    waits = task.start_no_earlier_than is not None and task.start_no_earlier_than > patient.now
    if not missing and waits:
        return
    what = f"lacks its {', '.join(missing)}" if missing else "has its artifacts and does not open"
    yield Finding(
        "task_without_artifacts" if missing else "task_does_not_open",
        str(task.key),
        f"the task was created {spoken(seconds)} ago and {what}; it keeps others of its kind from being created",
        "build it again or cancel it: fedcompute task cancel" if missing else _ENGINE,
        {"seconds": seconds},
    )


def _failed(task: TaskRow) -> Finding:
    reason = task.reason or Reason.INTERNAL.value
    known = reason in {one.value for one in CATALOGUE}
    return Finding(
        "task_failed",
        str(task.key),
        f"the task failed: {reason}, and no other of its kind has followed",
        f"{CATALOGUE[Reason(reason)].remedy if known else _ENGINE}; then build or clone the task",
        {"reason": reason},
    )


def _round(
    patient: Patient, limits: Limits, tx: Transaction, one: IterationRow, paused: set[TaskKey]
) -> Iterator[Finding]:
    seconds, subject = age(patient, one.entered), str(one.key)
    batches = sum_batches(tx, one.key)
    if one.status is IterationStatus.COLLECTING:
        if seconds > limits.collecting and one.key.task not in paused:
            counts = count_assignments(tx, one.key)
            have = counts[AssignmentStatus.UPLOAD_COMPLETED]
            yield Finding(
                "round_below_goal",
                subject,
                f"the round has collected for {spoken(seconds)} and has {have} of {one.report_goal} contributions",
                "let more devices check in, set --round-expiry, or cancel the task and build it with a lower goal",
                {
                    "seconds": seconds,
                    "contributions": have,
                    "goal": one.report_goal,
                    **{status.name: count for status, count in counts.items() if count},
                },
            )
        missing = one.report_goal - batches.full - batches.expected
        enough = min(patient.settings.collector_batch_size, missing)
        waiting = unbatched(tx, one.key, limit=max(1, enough))
        if 0 < enough <= len(waiting) and age(patient, waiting[-1].entered) > limits.idle:
            yield Finding(
                "uploads_not_batched",
                subject,
                f"collected uploads have waited for a batch for {spoken(age(patient, waiting[0].entered))}",
                _ENGINE,
                {"seconds": age(patient, waiting[0].entered), "uploads": len(waiting)},
            )
    elif seconds > limits.working:
        name = one.status.name.lower()
        yield Finding(
            f"round_stuck_{name}",
            subject,
            f"the round has been {name} for {spoken(seconds)}, with {batches.accepted} of {one.report_goal} "
            f"contributions added up and {batches.published} in batches under way",
            _ENGINE,
            {"seconds": seconds, "accepted": batches.accepted, "published": batches.published},
        )
    for batch in list_batches(tx, one.key, statuses=[BatchStatus.FULL, BatchStatus.PUBLISH_COMPLETED]):
        if age(patient, batch.entered) > limits.working:
            yield Finding(
                "batch_under_way_for_long",
                str(batch.key),
                f"a batch of {batch.batch_size} uploads has been {batch.status.name} for "
                f"{spoken(age(patient, batch.entered))}",
                _ENGINE,
                {"seconds": age(patient, batch.entered), "uploads": batch.batch_size},
            )


def _overdue(patient: Patient, tx: Transaction) -> Iterator[Finding]:
    settings, table = patient.settings, schema.assignment
    for status, seconds in (
        (AssignmentStatus.ASSIGNED, settings.local_compute_timeout),
        (AssignmentStatus.LOCAL_COMPLETED, settings.upload_timeout),
    ):
        before = patient.now - timedelta(seconds=2 * seconds + 60)
        late = (table.c.status == int(status), table.c.status_time < before)
        count = tx.execute(select(func.count()).select_from(table).where(*late)).scalar_one()
        if count:
            yield Finding(
                "assignments_overdue",
                status.name,
                f"{count} assignments have been {status.name} for more than twice their {seconds:g} seconds",
                _ENGINE,
                {"assignments": count, "timeout": seconds},
            )


def _idle(tx: Transaction, task: TaskRow) -> datetime | None:
    """Since when an open task could have had a round and has none."""
    newest = newest_iteration(tx, task.key)
    if newest is not None and newest.status in ACTIVE_ITERATION:
        return None
    if not task.is_training:
        info = task.info.evaluation_info
        training = TaskKey(info.training_population_name, info.training_task_id)
        if not completed_iterations(tx, training, stored=True, limit=1):
            return None
    if newest is None and task.start_no_earlier_than is not None and task.started is not None:
        return max(task.started, task.start_no_earlier_than)
    return newest.entered if newest is not None else task.entered


def _is_newest(tx: Transaction, task: TaskRow) -> bool:
    table = schema.task
    later = (
        table.c.population_name == task.key.population,
        table.c.kind == int(TaskKind(task.kind)),
        table.c.task_id > task.key.task_id,
    )
    return tx.execute(select(table.c.task_id).where(*later).limit(1)).first() is None
