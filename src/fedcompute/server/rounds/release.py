"""Applying: a round's sums become a released model, its metrics and its ledger entry, together (spec/server.md 5.3)."""

import logging
import math

from fedcompute.errors import FedComputeError, Reason
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.collect import add_up_again
from fedcompute.server.rounds.order import order, result_paths
from fedcompute.server.rounds.schedule import fail, tell_overspent
from fedcompute.server.rounds.spending import Overspent
from fedcompute.server.rounds.update import UpdateResult, update
from fedcompute.storage.assignments import cancel_unused
from fedcompute.storage.iterations import (
    IterationRow,
    close_and_open_next,
    end_unreleased,
    move_iteration,
    next_iteration,
)
from fedcompute.storage.paths import MODEL
from fedcompute.storage.releases import LedgerMoved
from fedcompute.storage.schema import IterationStatus, TaskStatus
from fedcompute.storage.tasks import get_task

_LOG = logging.getLogger(__name__)
_DAMAGED_SUM = (Reason.PARTIAL_SUM_MALFORMED, Reason.PARTIAL_SUM_MISMATCH)


def apply(context: Context, iteration: IterationRow) -> bool:
    """One look at an APPLYING iteration: starts its update job, or closes it with what the job gave; True if it did.

    Sums that lie damaged in the store are made anew from their uploads, once.
    """
    outcome = context.jobs.poll(iteration.key, update, lambda: order(context, iteration))
    if outcome is None:
        return False
    if outcome.error is not None and outcome.error.reason in _DAMAGED_SUM and iteration.key not in context.repaired:
        again = add_up_again(context, iteration)
        if again is None:
            return False
        _LOG.warning("the sums of round %s were damaged and %s", iteration.key, "are made anew" if again else "lost")
        context.repaired.add(iteration.key)
        if again:
            context.jobs.forget(iteration.key)
            return True
    try:
        if outcome.error is not None:
            _give_up(context, iteration, outcome.error)
        elif isinstance(outcome.result, Overspent):
            _refuse(context, iteration, outcome.result)
        else:
            _close(context, iteration, outcome.result)
    except LedgerMoved as moved:
        _LOG.info("round %s is looked at again: %s", iteration.key, moved)
    context.jobs.forget(iteration.key)
    return True


def _close(context: Context, iteration: IterationRow, result: UpdateResult) -> None:
    metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
    charged = any(one.event is not None for one in result.releases)
    with context.database.write() as tx:
        task = get_task(tx, iteration.key.task)
        assert task is not None, "an iteration's foreign key is its task"
        goes_on = iteration.key.iteration_id < task.total_iteration and result.no_more is None
        closed = close_and_open_next(
            tx,
            iteration.key,
            metrics=metrics,
            releases=result.releases,
            standing=result.standing if charged else None,
            # An evaluation's next round needs a checkpoint of its own choice; the next pass makes it.
            following=next_iteration(task, iteration) if task.is_training and goes_on else None,
            now=now(),
            end=None if result.no_more is None else Reason.BUDGET_SPENT,
        )
        ended = None
        if closed:
            cancel_unused(tx, iteration.key, now())
            ended = get_task(tx, iteration.key.task)
    if closed:
        _LOG.info("round %s is complete with %d contributions", iteration.key, result.contributions)
    # A paused task asks again when it is resumed.
    if ended is not None and ended.status is TaskStatus.COMPLETED and result.no_more is not None:
        tell_overspent(context, iteration.key.task, result.no_more)


def _refuse(context: Context, iteration: IterationRow, overspent: Overspent) -> None:
    with context.database.write() as tx:
        ended = end_unreleased(tx, iteration.key, overspent.standing, Reason.BUDGET_SPENT, now())
        if ended:
            cancel_unused(tx, iteration.key, now())
            # An earlier run of the job, which knew of fewer charges, may have stored its result. Before the end of the
            # transaction: whoever is killed here comes again.
            for path in result_paths(iteration):
                context.blobs.delete(MODEL, path)
    if ended:
        tell_overspent(context, iteration.key.task, overspent)


def _give_up(context: Context, iteration: IterationRow, error: FedComputeError) -> None:
    with context.database.write() as tx:
        move_iteration(tx, iteration.key, IterationStatus.APPLYING, IterationStatus.APPLYING_FAILED, now())
    fail(context, iteration.key.task, error)
