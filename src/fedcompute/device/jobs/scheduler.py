"""Runs what is due: federated tasks, one at a time, and background jobs (spec/device.md 6.4-6.7)."""

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcompute.device.jobs import background
from fedcompute.device.jobs.background import BackgroundJob
from fedcompute.device.jobs.conditions import TRAINING, Conditions, is_throttled, start_failures, unmet
from fedcompute.device.jobs.events import Event, EventKind
from fedcompute.device.jobs.flags import Flags, flags
from fedcompute.device.state import tasks
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import record_contribution
from fedcompute.device.state.settings import consent
from fedcompute.device.state.tasks import KILL_SWITCHES, Removal, Rescheduled, Task
from fedcompute.errors import FedComputeError, Reason

if TYPE_CHECKING:
    from fedcompute.device.client.runtime import RunOutcome  # which loads an HTTP client

LOOK_AGAIN = 60_000
"""Milliseconds after which what keeps a due job from running is looked at again."""

_NUMBER = re.compile(r"\d+(\.\d+)?")
_WATCH_SECONDS = 1.0
_BACKGROUND_SECONDS = 600.0
_STOPPED = "stopped"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Finished:
    """How a run ended, in the terms of the task table."""

    success: bool
    counted: bool
    reason: str
    detail: str
    outcome: "RunOutcome | None" = None


class JobScheduler:
    """Decides what runs when. One at a time may work on a device's file; other processes may change tasks in it.

    Everything durable is in the file, and each step is one transaction: killed between any two, a new scheduler goes
    on where this one was, a run that was cut off begins again at its stored time, and a contribution is remembered
    together with what follows from it or not at all.
    """

    def __init__(
        self,
        database: DeviceDatabase,
        run: Callable[[Task], Awaitable["RunOutcome"]],
        background: Mapping[str, BackgroundJob],
        conditions: Callable[[], Conditions],
        clock: Callable[[], int],
        chance: random.Random,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """`run` takes part in a round for a task, and stops when it is cancelled. `background`: the jobs by name.
        `clock`: Unix milliseconds. `chance` draws transient delays. `on_event` is told each step once it is stored.
        """
        self._database = database
        self._run = run
        self._background = background
        self._conditions = conditions
        self._clock = clock
        self._chance = chance
        self._on_event = on_event
        self._working = False
        self._running: Task | None = None  # into whose run others may fire
        # Only to check no more often than the throttle says, and to tell nothing twice.
        self._last_check: int | None = None
        self._waiting: dict[str | int, str] = {}

    def start(self) -> None:
        """Call at the start of the process: runs that its predecessor left are due again, as they were."""
        now = self._clock()
        with self._database.write() as tx:
            recovered = tasks.recover_orphans(tx)
            background.set_up(tx, self._background.values(), now)
        for task in recovered:
            self._on_event(Event(now, EventKind.RECOVERED, task.population, task, earliest_run=task.earliest_run))

    async def run_due(self) -> bool:
        """Runs the first job that is due and may run, to its end; False if there is none.

        Called while a task runs, it ends every other task that fires, as Android does: a failure that does not count.
        Only a forced one waits for the end of the run. Raises OperationFailed (STORAGE_FAILED); call `start` again
        then.
        """
        if self._working:
            return self._turn_away()
        self._working = True
        try:
            job = self._first_due()
            match job:
                case BackgroundJob():
                    await self._work(job)
                case Task():
                    await self._fire(job)
            return job is not None
        finally:
            self._working = False

    async def run_forced(self) -> None:
        """Runs the tasks that `tasks.force` has marked, one after the other, and leaves all others and the background
        jobs alone. Raises OperationFailed (STORAGE_FAILED).
        """
        with self._database.read() as tx:
            rules = flags(tx)
            forced = [task for task in tasks.due(tx, self._clock()) if task.forced]
        if self._working or _switched_off(KILL_SWITCHES, rules):
            return
        self._working = True
        try:
            for task in forced:
                await self._fire(task, alone=True)
        finally:
            self._working = False

    def next_time(self) -> int | None:
        """The earliest time, in Unix milliseconds, at which something may be due; None while nothing is set.

        In the past or present: `run_due` has something to do. Other processes may change it at any time;
        `DeviceDatabase.changes` tells.
        """
        now, conditions = self._clock(), self._conditions()
        with self._database.read() as tx:
            rules = flags(tx)
            pending = [task for task in tasks.list_tasks(tx) if task.pending]
            jobs = self._set_jobs(background.earliest_runs(tx))
        moments = []
        for task in pending:
            time = min(task.earliest_run, now) if task.forced else task.earliest_run
            moments.append((time, bool(_task_blocks(task, conditions, rules))))
        moments += [(time, bool(_job_blocks(job, conditions, rules))) for job, time in jobs]
        return min((now + LOOK_AGAIN if time <= now and blocked else time for time, blocked in moments), default=None)

    def _first_due(self) -> BackgroundJob | Task | None:
        """The job to run now. Background jobs come first: they are short, and a task may take ten minutes."""
        now, conditions = self._clock(), self._conditions()
        with self._database.read() as tx:
            rules = flags(tx)
            jobs = self._set_jobs(background.earliest_runs(tx))
            due = tasks.due(tx, now)
        found: list[tuple[BackgroundJob | Task, tuple[str, ...]]] = [
            (job, _job_blocks(job, conditions, rules)) for job, time in jobs if time <= now
        ]
        found += [(task, _task_blocks(task, conditions, rules)) for task in due]
        self._tell_waiting(now, found)
        return next((job for job, why in found if not why), None)

    def _set_jobs(self, earliest_runs: Sequence[tuple[str, int]]) -> list[tuple[BackgroundJob, int]]:
        return [(self._background[name], time) for name, time in earliest_runs if name in self._background]

    async def _fire(self, task: Task, *, alone: bool = False) -> None:
        """Runs a task that is due; `alone`: whatever else is due is not touched."""
        now, conditions = self._clock(), self._conditions()
        with self._database.read() as tx:
            rules = flags(tx)
        failing: tuple[str, ...] = ()
        if not is_throttled(now, self._last_check, rules):
            self._last_check = now
            failing = start_failures(conditions, rules)
        started = self._start(task, now, "conditions", failing)
        if started is None:
            return
        self._running = None if alone else started
        try:
            # What fired together with it.
            self._turn_away()
            finished = await self._supervise(started, rules.integer("training_time_limit_secs"))
            # What fired since it was last looked at.
            self._turn_away()
        finally:
            self._running = None
        self._end(started, finished)

    def _start(self, task: Task, now: int, reason: str, failing: tuple[str, ...]) -> Task | None:
        """Starts a run, or ends it at once if something is failing; None if it did not start."""
        with self._database.write() as tx:
            rules = flags(tx)
            started = tasks.start_run(tx, task.job_id, now, rules)
            ended = None
            if failing and isinstance(started, Task):
                ended = tasks.end_run(tx, started, now, rules, self._chance, success=False, counted=False)
        if started is None:
            return None
        if isinstance(started, Removal):
            self._on_event(Event(now, EventKind.DELETED, task.population, task, detail=started))
            return None
        if not failing:
            self._on_event(Event(now, EventKind.STARTED, task.population, started))
            return started
        self._tell_end(now, EventKind.NOT_RUN, started, ended, _Finished(False, False, reason, ", ".join(failing)))
        return None

    def _turn_away(self) -> bool:
        """Ends every task that fires while another one runs; whether there was one."""
        if self._running is None:
            return False
        now, conditions = self._clock(), self._conditions()
        with self._database.read() as tx:
            rules = flags(tx)
            due = [task for task in tasks.due(tx, now) if not task.forced]
        fired = [task for task in due if not _task_blocks(task, conditions, rules)]
        for task in fired:
            self._start(task, now, "busy", ("another run is in progress",))
        return bool(fired)

    async def _supervise(self, started: Task, limit: int) -> _Finished:
        """Runs a task for at most `limit` seconds, and no longer than it is wanted."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        run = asyncio.ensure_future(self._run(started))
        why: tuple[str, str] | None = None
        try:
            while not run.done() and why is None:
                await asyncio.wait({run}, timeout=min(_WATCH_SECONDS, max(0.0, deadline - loop.time())))
                if not run.done():
                    why = self._unwanted(started)
                    if why is None and loop.time() >= deadline:
                        why = (_STOPPED, f"took more than {limit} s")
                    self._turn_away()
        finally:
            run.cancel()
            await asyncio.wait({run})
        if run.cancelled():
            reason, detail = why if why is not None else (_STOPPED, "cancelled itself")
            return _Finished(False, reason == _STOPPED, reason, detail)
        error = run.exception()
        if isinstance(error, FedComputeError):
            return _Finished(False, True, error.reason.value, error.detail)
        if error is not None:
            _LOG.error("a run failed", exc_info=error)
            return _Finished(False, True, Reason.INTERNAL.value, type(error).__name__)
        outcome = run.result()
        return _Finished(outcome.success, outcome.counted, outcome.reason or "", outcome.detail, outcome)

    def _unwanted(self, started: Task) -> tuple[str, str] | None:
        with self._database.read() as tx:
            if not consent(tx).measurement:
                return "consent", Removal.CONSENT.value
            if tasks.running(tx, started) is None:
                return "cancelled", "cancelled, or scheduled anew"
        return None

    def _end(self, started: Task, finished: _Finished) -> None:
        now, outcome = self._clock(), finished.outcome
        with self._database.write() as tx:
            if outcome is not None and outcome.contribution is not None:
                record_contribution(tx, outcome.contribution)
            ended = tasks.end_run(
                tx,
                started,
                now,
                flags(tx),
                self._chance,
                success=finished.success,
                counted=finished.counted,
                retry_window=outcome.retry_window if outcome is not None else None,
            )
        self._tell_end(now, EventKind.ENDED, started, ended, finished)

    def _tell_end(
        self, now: int, kind: EventKind, started: Task, ended: Rescheduled | Removal | None, finished: _Finished
    ) -> None:
        task, earliest, delay = started, None, None
        if isinstance(ended, Rescheduled):
            task, earliest, delay = ended.task, ended.task.earliest_run, ended.delay
        self._on_event(
            Event(
                now, kind, task.population, task, finished.success, finished.counted,
                finished.reason, finished.detail, earliest, delay,
            )
        )  # fmt: skip
        if isinstance(ended, Removal):
            self._on_event(Event(now, EventKind.DELETED, task.population, task, detail=ended))

    async def _work(self, job: BackgroundJob) -> None:
        start = self._clock()
        with self._database.write() as tx:
            if not background.begin(tx, job, start):
                return
        self._on_event(Event(start, EventKind.STARTED, job.name))
        reason = detail = ""
        limit = asyncio.timeout(_BACKGROUND_SECONDS)
        try:
            async with limit:
                await job.work()
        except FedComputeError as error:
            reason, detail = error.reason.value, error.detail
        except Exception as error:
            reason, detail = _STOPPED, f"took more than {_BACKGROUND_SECONDS:.0f} s"
            if not limit.expired():
                _LOG.exception("background job %s failed", job.name)
                reason, detail = Reason.INTERNAL.value, type(error).__name__
        now = self._clock()
        with self._database.write() as tx:
            earliest = background.end(tx, job, start, now, not reason)
        self._on_event(
            Event(
                now, EventKind.ENDED, job.name, success=not reason, reason=reason, detail=detail, earliest_run=earliest
            )
        )

    def _tell_waiting(self, now: int, found: Sequence[tuple[BackgroundJob | Task, tuple[str, ...]]]) -> None:
        waiting: dict[str | int, str] = {}
        for job, why in found:
            if not why:
                continue
            task = job if isinstance(job, Task) else None
            key = job.job_id if isinstance(job, Task) else job.name
            name = job.population if isinstance(job, Task) else job.name
            # The numbers in it change all the time.
            waiting[key] = _NUMBER.sub("", ", ".join(why))
            if self._waiting.get(key) != waiting[key]:
                self._on_event(Event(now, EventKind.WAITING, name, task, detail=", ".join(why)))
        self._waiting = waiting


def _task_blocks(task: Task, conditions: Conditions, rules: Flags) -> tuple[str, ...]:
    """What keeps a task from firing."""
    return _switched_off(KILL_SWITCHES, rules) or (() if task.forced else unmet(conditions, TRAINING, rules))


def _job_blocks(job: BackgroundJob, conditions: Conditions, rules: Flags) -> tuple[str, ...]:
    return _switched_off(job.kill_switches, rules) or unmet(conditions, job.constraints, rules)


def _switched_off(switches: Sequence[str], rules: Flags) -> tuple[str, ...]:
    return tuple(f"{name} is on" for name in switches if rules.boolean(name))
