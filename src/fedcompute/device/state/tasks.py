"""The federated tasks of a device, and what moves them from run to run (spec/device.md 6.2, 6.3, 6.5, 6.6).

Each change is one step of a transaction and expects one old state. A task is pending until its run starts, and again
when that has ended. Times are Unix milliseconds.
"""

import random
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from fedcompute.device.jobs import times
from fedcompute.device.jobs.flags import Flags
from fedcompute.device.owner import Owner
from fedcompute.device.state.database import Transaction
from fedcompute.device.state.settings import consent

REGISTRATIONS_LIMIT = 1000
"""Populations of one owner that are remembered beside those that have a task."""

KILL_SWITCHES = ("global_kill_switch", "federated_compute_kill_switch")
"""The flags of which one that is on stops all federated tasks."""


def is_population(name: str) -> bool:
    """Whether a name can be that of a population: it stands in URLs as it is (spec 1.1)."""
    return 1 <= len(name) <= 255 and name.isprintable() and name == name.strip() and not set(name) & set("/?#%")


class SchedulingReason(IntEnum):
    """Why a task has its earliest run; the numbers are Android's."""

    NEW_TASK = 1
    FEDERATED_COMPUTATION_RETRY = 2
    FAILURE = 3


class Removal(StrEnum):
    """Why a task is gone."""

    SUCCEEDED = "one-time task succeeded"
    FAILED = "more counted failures than the limit"
    EXPIRED = "not scheduled again in time"
    CONSENT = "measurement consent is revoked"


@dataclass(frozen=True)
class ScheduleRequest:
    """What a service asks for. `server`: base URL; `minimum_interval`: milliseconds, for recurrent tasks."""

    owner: Owner
    population: str
    server: str
    recurrent: bool = False
    minimum_interval: int = 0

    @property
    def job_id(self) -> int:
        return self.owner.job_id(self.population)


@dataclass(frozen=True)
class Task:
    """A task as it is stored. `earliest_run`: when it is due; `forced`: due now, whatever constraints say;
    `last_run_start`, `last_run_end`: 0 before the first run; `reschedule_count`: counted failures in a row.
    """

    job_id: int
    owner: Owner
    population: str
    server: str
    recurrent: bool
    minimum_interval: int
    created: int
    last_scheduled: int
    earliest_run: int
    scheduling_reason: SchedulingReason = SchedulingReason.NEW_TASK
    last_run_start: int = 0
    last_run_end: int = 0
    reschedule_count: int = 0
    pending: bool = True
    forced: bool = False


@dataclass(frozen=True)
class Rescheduled:
    """A task that goes on after a run."""

    task: Task
    delay: times.Delay


_COLUMNS = (
    "job_id", "owner", "package", "class_name", "certificate_digest", "population", "server", "recurrent",
    "minimum_interval", "created", "last_scheduled", "earliest_run", "scheduling_reason", "last_run_start",
    "last_run_end", "reschedule_count", "pending", "forced",
)  # fmt: skip
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM task"
_UPSERT = (
    f"INSERT INTO task ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
    f" ON CONFLICT (job_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS[1:])}"
)


def schedule(tx: Transaction, request: ScheduleRequest, now: int, flags: Flags) -> str | None:
    """Stores a new task or renews one, and registers its population; returns None, or why not.

    A task whose mode or interval changes starts anew, and a run of it in progress is given up; otherwise its next run
    stays where it is, within bounds. Either way its failures are forgotten and its time to live begins again.
    """
    for switch in KILL_SWITCHES:
        if flags.boolean(switch):
            return f"{switch} is on"
    if not consent(tx).measurement:
        return Removal.CONSENT.value
    stored = find(tx, request.job_id)
    if stored is None:
        count = int(tx.execute("SELECT COUNT(*) FROM task WHERE package = ?", (request.owner.package,)).fetchone()[0])
        limit = flags.integer("task_limit_per_package")
        if count >= limit:
            return f"{count} tasks of package {request.owner.package}, the limit is {limit}"
        _put(tx, _new(request, now, flags))
    elif (stored.owner, stored.population) != (request.owner, request.population):
        return f"job id {request.job_id} is taken by another task; choose another name"
    else:
        _put(tx, _renewed(stored, request, now, flags))
    tx.execute(
        "INSERT OR IGNORE INTO registration (owner, population, job_id) VALUES (?, ?, ?)",
        (request.owner.digest, request.population, request.job_id),
    )
    # Of populations without a task the newest stay, so that no service fills the file with names.
    tx.execute(
        "DELETE FROM registration WHERE owner = ?1 AND population NOT IN (SELECT population FROM task WHERE owner = ?1)"
        " AND rowid NOT IN (SELECT rowid FROM registration WHERE owner = ?1 ORDER BY rowid DESC LIMIT ?2)",
        (request.owner.digest, REGISTRATIONS_LIMIT),
    )
    return None


def cancel(tx: Transaction, owner: Owner, population: str) -> bool:
    """Removes a task; whether there was one. Its registration stays. A run of it in progress is stopped."""
    # Not by the job's number alone: a service could choose a population whose number is that of another one's task.
    statement = "DELETE FROM task WHERE owner = ? AND population = ?"
    return tx.execute(statement, (owner.digest, population)).rowcount > 0


def find(tx: Transaction, job_id: int) -> Task | None:
    """The task of a job, None without one."""
    row = tx.execute(f"{_SELECT} WHERE job_id = ?", (job_id,)).fetchone()
    return None if row is None else _task(row)


def list_tasks(tx: Transaction) -> tuple[Task, ...]:
    """All tasks, the next one due first."""
    return tuple(map(_task, tx.execute(f"{_SELECT} ORDER BY earliest_run, job_id")))


def due(tx: Transaction, now: int) -> tuple[Task, ...]:
    """The pending tasks whose time has come, forced ones first, then the longest due."""
    rows = tx.execute(
        f"{_SELECT} WHERE pending AND (earliest_run <= ? OR forced) ORDER BY forced DESC, earliest_run, job_id", (now,)
    )
    return tuple(map(_task, rows))


def start_run(tx: Transaction, job_id: int, now: int, flags: Flags) -> Task | Removal | None:
    """Due -> running. A task that has outlived its time or its consent is removed instead; None if it is gone, running
    or no longer due.
    """
    stored = find(tx, job_id)
    if stored is None or not stored.pending or not (stored.forced or stored.earliest_run <= now):
        return None
    ttl = flags.integer("task_ttl_secs") * 1000
    if ttl and now - stored.last_scheduled > ttl:
        return _removed(tx, job_id, Removal.EXPIRED)
    if not consent(tx).measurement:
        return _removed(tx, job_id, Removal.CONSENT)
    started = replace(stored, last_run_start=now, pending=False, forced=False)
    _put(tx, started)
    return started


def running(tx: Transaction, started: Task) -> Task | None:
    """The task of a run as it is stored now; None if it was cancelled or scheduled anew, and the run is nobody's."""
    stored = find(tx, started.job_id)
    if stored is None or stored.pending or stored.last_run_start != started.last_run_start:
        return None
    return stored


def end_run(
    tx: Transaction,
    started: Task,
    now: int,
    flags: Flags,
    chance: random.Random,
    *,
    success: bool,
    counted: bool,
    retry_window: float | None = None,
) -> Rescheduled | Removal | None:
    """Running -> pending or removed, by the rules of spec 6.6; None if the run is nobody's: nothing changes then.

    `started`: as `start_run` gave it; `counted`: whether a failure counts; `retry_window`: seconds, as in RunOutcome.
    """
    stored = running(tx, started)
    if stored is None:
        return None
    if not consent(tx).measurement:
        return _removed(tx, stored.job_id, Removal.CONSENT)
    if success and not stored.recurrent:
        return _removed(tx, stored.job_id, Removal.SUCCEEDED)
    failures = 0 if success else stored.reschedule_count + counted
    limit = flags.integer("recurrent_reschedule_limit" if stored.recurrent else "reschedule_limit")
    if not success and counted and failures > limit:
        return _removed(tx, stored.job_id, Removal.FAILED)
    server = times.server_delay(retry_window, flags)
    delay = times.delay_after_run(stored.recurrent, stored.minimum_interval, success, server, flags, chance)
    ended = replace(
        stored,
        last_run_end=now,
        earliest_run=now + delay.milliseconds,
        scheduling_reason=SchedulingReason.FEDERATED_COMPUTATION_RETRY if success else SchedulingReason.FAILURE,
        reschedule_count=failures,
        pending=True,
    )
    _put(tx, ended)
    return Rescheduled(ended, delay)


def recover_orphans(tx: Transaction) -> tuple[Task, ...]:
    """Running -> pending, with the earliest run as it was, for every task; only while nothing runs. Returns them."""
    orphans = [replace(task, pending=True) for task in list_tasks(tx) if not task.pending]
    for task in orphans:
        _put(tx, task)
    return tuple(orphans)


def force(tx: Transaction, job_id: int) -> bool:
    """Makes a task due now, without its constraints; the checks at the start of a run stay. False if it is gone."""
    return tx.execute("UPDATE task SET forced = 1 WHERE job_id = ?", (job_id,)).rowcount > 0


def _new(request: ScheduleRequest, now: int, flags: Flags) -> Task:
    return Task(
        job_id=request.job_id,
        owner=request.owner,
        population=request.population,
        server=request.server,
        recurrent=request.recurrent,
        minimum_interval=request.minimum_interval,
        created=now,
        last_scheduled=now,
        earliest_run=times.first_run(now, request.recurrent, request.minimum_interval, flags),
    )


def _renewed(stored: Task, request: ScheduleRequest, now: int, flags: Flags) -> Task:
    """Spec 6.3: what scheduling an existing task again makes of it."""
    renewed = replace(stored, server=request.server, last_scheduled=now, reschedule_count=0)
    recurrent, interval = request.recurrent, request.minimum_interval
    if (recurrent, interval) != (stored.recurrent, stored.minimum_interval):
        return replace(
            renewed,
            recurrent=recurrent,
            minimum_interval=interval,
            earliest_run=times.changed_run(now, recurrent, interval, flags),
            scheduling_reason=SchedulingReason.NEW_TASK,
            last_run_start=0,
            last_run_end=0,
            pending=True,
        )
    if times.probably_running(now, stored.last_run_start, stored.last_run_end):
        return renewed
    earliest = times.kept_run(now, recurrent, stored.earliest_run, flags)
    if stored.pending and earliest == stored.earliest_run:
        return renewed
    return replace(renewed, earliest_run=earliest, scheduling_reason=SchedulingReason.NEW_TASK, pending=True)


def _removed(tx: Transaction, job_id: int, why: Removal) -> Removal:
    _delete(tx, job_id)
    return why


def _delete(tx: Transaction, job_id: int) -> bool:
    return tx.execute("DELETE FROM task WHERE job_id = ?", (job_id,)).rowcount > 0


def _put(tx: Transaction, task: Task) -> None:
    owner = task.owner
    tx.execute(
        _UPSERT,
        (
            task.job_id, owner.digest, owner.package, owner.class_name, owner.certificate_digest, task.population,
            task.server, task.recurrent, task.minimum_interval, task.created, task.last_scheduled, task.earliest_run,
            task.scheduling_reason, task.last_run_start, task.last_run_end, task.reschedule_count, task.pending,
            task.forced,
        ),
    )  # fmt: skip


def _task(row: tuple[int, str, str, str, str, str, str, int, int, int, int, int, int, int, int, int, int, int]) -> Task:
    return Task(
        job_id=row[0],
        owner=Owner(row[2], row[3], row[4]),
        population=row[5],
        server=row[6],
        recurrent=bool(row[7]),
        minimum_interval=row[8],
        created=row[9],
        last_scheduled=row[10],
        earliest_run=row[11],
        scheduling_reason=SchedulingReason(row[12]),
        last_run_start=row[13],
        last_run_end=row[14],
        reschedule_count=row[15],
        pending=bool(row[16]),
        forced=bool(row[17]),
    )
