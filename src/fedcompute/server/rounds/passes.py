"""One pass of the round engine over everything that is under way (spec/server.md 5.1)."""

import logging
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial

from fedcompute.errors import FedComputeError
from fedcompute.server.context import Context, now
from fedcompute.server.logs import bound
from fedcompute.server.rounds.attempts import expire
from fedcompute.server.rounds.collect import collect, finish_aggregating, time_out
from fedcompute.server.rounds.order import forget_preparations, look_ahead
from fedcompute.server.rounds.release import apply
from fedcompute.server.rounds.schedule import advance, open_if_complete
from fedcompute.server.rounds.summarize import summarize
from fedcompute.server.security.keys import delete_old_keys
from fedcompute.server.security.tokens import TOKEN_MEMORY
from fedcompute.server.tracing import within_round
from fedcompute.storage.audit import forget_strangers
from fedcompute.storage.check_ins import forget_idempotency
from fedcompute.storage.iterations import IterationRow, busy_iterations, list_iterations, tasks_to_advance
from fedcompute.storage.leases import forget_expired_leases
from fedcompute.storage.paths import updates_prefix
from fedcompute.storage.request_minutes import forget_request_minutes
from fedcompute.storage.schema import ACTIVE_ITERATION, IterationStatus, TaskStatus
from fedcompute.storage.tasks import LIST_LIMIT, TaskRow, list_tasks
from fedcompute.storage.tokens import forget_tokens

_LOG = logging.getLogger(__name__)
_LONGEST_SWEEP = 5.0
_CLEANING = 600.0
_SUMMARY_PERIOD = 1.0
_STRANGERS_KEPT = timedelta(days=30)
_MINUTES_KEPT = timedelta(days=30)
_ROUND_LIMIT = 100_000

_STEPS: dict[IterationStatus, Callable[[Context, IterationRow], bool]] = {
    IterationStatus.COLLECTING: collect,
    IterationStatus.AGGREGATING: finish_aggregating,
    IterationStatus.APPLYING: apply,
}


class Passes:
    """Remembers between passes when the slower chores are due and which complaints were already logged."""

    def __init__(self, context: Context) -> None:
        self._context = context
        settings = context.settings
        clocks = [settings.local_compute_timeout, settings.upload_timeout, settings.round_expiry or _LONGEST_SWEEP * 4]
        self._sweep_period = min(_LONGEST_SWEEP, *(seconds / 4 for seconds in clocks))
        self._next_sweep = 0.0
        self._next_summary = 0.0
        self._next_cleaning = 0.0
        self._complaints: dict[str, str] = {}

    def __call__(self) -> bool:
        """Does what can be done now for every task and round; one that fails does not stop the others."""
        started = time.monotonic()
        try:
            return self._pass()
        finally:
            self._context.measures.engine_pass(time.monotonic() - started)

    def _pass(self) -> bool:
        context = self._context
        context.jobs.keep()
        sweeps = time.monotonic() >= self._next_sweep
        changed = self._chores()
        with context.database.read() as tx:
            created = _all(partial(list_tasks, tx, statuses=[TaskStatus.CREATED]))
            idle = _all(partial(tasks_to_advance, tx))
        changed |= self._each((str(task.key), partial(open_if_complete, context, task)) for task in created)
        changed |= self._each((str(task.key), partial(advance, context, task)) for task in idle)
        with context.database.read() as tx:
            rounds = list_iterations(tx, statuses=ACTIVE_ITERATION, limit=_ROUND_LIMIT)
            waiting = {task.key for task in _all(partial(list_tasks, tx, statuses=[TaskStatus.PAUSED]))}
            busy = busy_iterations(tx, context.uploads.all())
        context.jobs.retain({one.key for one in rounds}, {task.key for task in [*created, *idle]})
        forget_preparations(context, {one.key for one in rounds})
        context.uploads.retain({updates_prefix(one.key.task, one.result_id) for one in rounds})
        changed |= self._each(
            (f"the cost of {one.key}", partial(within_round, context, one.key, partial(look_ahead, context, one)))
            for one in rounds
            if one.status is IterationStatus.COLLECTING and one.key.task not in waiting
        )
        changed |= self._each(
            (str(one.key), partial(within_round, context, one.key, partial(_STEPS[one.status], context, one)))
            for one in rounds
            if one.status is not IterationStatus.COLLECTING or one.key in busy
        )
        # Last: a round that has all it needs closes, also after a time in which no server ran.
        return changed | (sweeps and self._each([("expiry", partial(expire, context))]))

    def _chores(self) -> bool:
        changed = False
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + self._sweep_period
            changed |= self._each([("time-outs", lambda: time_out(self._context))])
        if time.monotonic() >= self._next_summary:
            # What cannot be settled yet waits for time-outs of minutes, so it need not be asked for at every pass.
            left = self._each([("summaries", lambda: summarize(self._context))])
            self._next_summary = time.monotonic() + (0.0 if left else _SUMMARY_PERIOD)
            changed |= left
        if time.monotonic() >= self._next_cleaning:
            self._next_cleaning = time.monotonic() + _CLEANING
            self._each([("cleaning", self._clean)])
        return changed

    def _clean(self) -> bool:
        with self._context.database.write() as tx:
            forget_idempotency(tx, now())
            forget_tokens(tx, now() - TOKEN_MEMORY)
            forget_expired_leases(tx, now())
            forget_strangers(tx, now() - _STRANGERS_KEPT)
            forget_request_minutes(tx, now() - _MINUTES_KEPT)
        delete_old_keys(self._context.database, now())
        return False

    def _each(self, steps: Iterable[tuple[str, Callable[[], bool]]]) -> bool:
        changed = False
        for name, step in steps:
            try:
                with bound(partial(_facts, name)):
                    changed |= step()
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}"
                # The pass comes again every second; the same complaint is worth one line, or one traceback.
                if self._complaints.get(name) != complaint:
                    trace = None if isinstance(error, FedComputeError) else error
                    with bound(_facts(name)):
                        _LOG.error("no progress with %s: %s", name, error, exc_info=trace)
                self._complaints[name] = complaint
            else:
                self._complaints.pop(name, None)
        return changed


def _all(page: Callable[..., list[TaskRow]]) -> list[TaskRow]:
    """Every row of a paged list: what lies behind the first page must not starve."""
    found = page()
    while found and len(found) % LIST_LIMIT == 0:
        following = page(after=found[-1].key)
        if not following:
            break
        found += following
    return found


def _facts(name: str) -> dict[str, str]:
    parts = name.removeprefix("the cost of ").split("/")
    return dict(zip(("population", "task", "iteration", "attempt"), parts, strict=False)) if len(parts) > 1 else {}
