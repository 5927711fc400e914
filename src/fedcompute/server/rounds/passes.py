"""One pass of the round engine over everything that is under way (spec/server.md 5.1)."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from fedcompute.errors import FedComputeError
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.collect import collect, finish_aggregating, time_out
from fedcompute.server.rounds.order import forget_preparations, look_ahead
from fedcompute.server.rounds.release import apply
from fedcompute.server.rounds.schedule import advance, open_if_complete
from fedcompute.storage.assignments import forget_idempotency
from fedcompute.storage.iterations import IterationRow, list_iterations
from fedcompute.storage.schema import ACTIVE_ITERATION, IterationStatus, TaskStatus
from fedcompute.storage.secrets import delete_expired_keys
from fedcompute.storage.tasks import list_tasks

_LOG = logging.getLogger(__name__)
_LONGEST_SWEEP = 5.0
_CLEANING = 600.0

_STEPS: dict[IterationStatus, Callable[[Context, IterationRow], bool]] = {
    IterationStatus.COLLECTING: collect,
    IterationStatus.AGGREGATING: finish_aggregating,
    IterationStatus.APPLYING: apply,
}


class Passes:
    """Remembers between passes when the slower chores are due and which complaints were already logged."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sweep_period = min(
            _LONGEST_SWEEP, context.settings.local_compute_timeout / 4, context.settings.upload_timeout / 4
        )
        self._next_sweep = 0.0
        self._next_cleaning = 0.0
        self._complaints: dict[str, str] = {}

    def __call__(self) -> bool:
        """Does what can be done now for every task and round; one that fails does not stop the others."""
        context = self._context
        changed = self._chores()
        with context.database.read() as tx:
            created = list_tasks(tx, statuses=[TaskStatus.CREATED])
            opened = list_tasks(tx, statuses=[TaskStatus.OPEN])
            paused = list_tasks(tx, statuses=[TaskStatus.PAUSED])
        changed |= self._each((str(task.key), partial(open_if_complete, context, task)) for task in created)
        changed |= self._each((str(task.key), partial(advance, context, task)) for task in [*opened, *paused])
        with context.database.read() as tx:
            rounds = list_iterations(tx, statuses=ACTIVE_ITERATION)
        context.jobs.retain({one.key for one in rounds}, {task.key for task in [*created, *opened]})
        forget_preparations(context, {one.key for one in rounds})
        waiting = {task.key for task in paused}
        changed |= self._each(
            (f"the cost of {one.key}", partial(look_ahead, context, one))
            for one in rounds
            if one.status is IterationStatus.COLLECTING and one.key.task not in waiting
        )
        return changed | self._each((str(one.key), partial(_STEPS[one.status], context, one)) for one in rounds)

    def _chores(self) -> bool:
        changed = False
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + self._sweep_period
            changed |= self._each([("time-outs", lambda: time_out(self._context))])
        if time.monotonic() >= self._next_cleaning:
            self._next_cleaning = time.monotonic() + _CLEANING
            self._each([("cleaning", self._clean)])
        return changed

    def _clean(self) -> bool:
        with self._context.database.write() as tx:
            forget_idempotency(tx, now())
            delete_expired_keys(tx, now())
        return False

    def _each(self, steps: Iterable[tuple[str, Callable[[], bool]]]) -> bool:
        changed = False
        for name, step in steps:
            try:
                changed |= step()
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}"
                # The pass comes again every second; the same complaint is worth one line, or one traceback.
                if self._complaints.get(name) != complaint:
                    trace = None if isinstance(error, FedComputeError) else error
                    _LOG.error("no progress with %s: %s", name, error, exc_info=trace)
                self._complaints[name] = complaint
            else:
                self._complaints.pop(name, None)
        return changed
