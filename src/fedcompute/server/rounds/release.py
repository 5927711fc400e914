"""Applying: a round's sums become a released model, its metrics and its ledger entry, together (spec/server.md 5.3)."""

import logging
import math

from fedcompute.errors import Reason
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.attempts import update_failed
from fedcompute.server.rounds.order import order, result_paths
from fedcompute.server.rounds.schedule import expiry, tell_overspent
from fedcompute.server.rounds.spending import Overspent
from fedcompute.server.rounds.update import UpdateResult, update
from fedcompute.storage.assignments import cancel_unused
from fedcompute.storage.iterations import (
    IterationRow,
    active_iterations,
    close_and_open_next,
    end_unreleased,
    next_iteration,
)
from fedcompute.storage.paths import MODEL
from fedcompute.storage.releases import LedgerMoved
from fedcompute.storage.schema import TaskStatus
from fedcompute.storage.summaries import phase_seconds, round_timeline
from fedcompute.storage.tasks import get_task
from fedcompute.tracing import span

_LOG = logging.getLogger(__name__)


def apply(context: Context, iteration: IterationRow) -> bool:
    """One look at an APPLYING iteration: starts its update job, or closes it with what the job gave; True if it did."""
    if _has_predecessor(context, iteration):
        return False
    outcome = context.jobs.poll(iteration.key, update, lambda: order(context, iteration))
    if outcome is None:
        return False
    try:
        if outcome.error is not None:
            update_failed(context, iteration, outcome.error)
        elif isinstance(outcome.result, Overspent):
            with span("release", {"outcome": "refused", "reason": Reason.BUDGET_SPENT.value}):
                _refuse(context, iteration, outcome.result)
        else:
            with span("release", {"contributions": outcome.result.contributions}) as traced:
                traced["outcome"] = "released" if _close(context, iteration, outcome.result) else "superseded"
    except LedgerMoved as moved:
        _LOG.info("round %s is looked at again: %s", iteration.key, moved)
    context.jobs.forget(iteration.key)
    return True


def _has_predecessor(context: Context, iteration: IterationRow) -> bool:
    """Whether an earlier round of the task is under way: models are released in the order of their rounds."""
    with context.database.read() as tx:
        active = active_iterations(tx, iteration.key.task)
    return any(one.key.iteration_id < iteration.key.iteration_id for one in active)


def _close(context: Context, iteration: IterationRow, result: UpdateResult) -> bool:
    metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
    charged = any(one.event is not None for one in result.releases)
    with context.database.write() as tx:
        task = get_task(tx, iteration.key.task)
        assert task is not None, "an iteration's foreign key is its task"
        stopped = task.do_not_create_iteration_after is not None and now() > task.do_not_create_iteration_after
        # Overlapping rounds open when there is no place left in those under way; the next pass looks.
        alone = task.is_training and task.max_parallel <= 1 and not stopped
        goes_on = iteration.key.iteration_id < task.total_iteration and result.no_more is None
        expires = expiry(context.settings, now())
        closed = close_and_open_next(
            tx,
            iteration.key,
            metrics=metrics,
            releases=result.releases,
            standing=result.standing if charged else None,
            # An evaluation's next round needs a checkpoint of its own choice; the next pass makes it.
            following=next_iteration(task, iteration, expires=expires) if alone and goes_on else None,
            now=now(),
            end=None if result.no_more is None else Reason.BUDGET_SPENT,
        )
        ended = None
        if closed:
            cancel_unused(tx, iteration.key, now())
            ended = get_task(tx, iteration.key.task)
    if closed:
        context.measures.round_ended(iteration.key.population, "completed")
        with context.database.read() as tx:
            context.measures.phases(phase_seconds(round_timeline(tx, iteration.key)))
        _LOG.info("round %s is complete with %d contributions", iteration.key, result.contributions)
    # A paused task asks again when it is resumed.
    if ended is not None and ended.status is TaskStatus.COMPLETED and result.no_more is not None:
        tell_overspent(context, iteration.key.task, result.no_more)
    return closed


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
        context.measures.round_ended(iteration.key.population, "refused", Reason.BUDGET_SPENT.value)
        tell_overspent(context, iteration.key.task, overspent)
