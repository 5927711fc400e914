"""What an update job is told: where its inputs and results lie, and what its population has spent so far."""

from collections.abc import Collection
from dataclasses import dataclass

from fedcompute.server.context import Context
from fedcompute.server.rounds.jobs import AheadKey
from fedcompute.server.rounds.merge import groups_of
from fedcompute.server.rounds.spending import Overspent, charges, has_noise
from fedcompute.server.rounds.update import UpdateJob, foresee, prepare
from fedcompute.server.security.key_service import key_service_of
from fedcompute.storage.batches import list_batches
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.iterations import IterationRow, NewIteration, active_iterations, newest_release
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.paths import (
    client_checkpoint_path,
    metrics_path,
    server_checkpoint_path,
    server_plan_path,
)
from fedcompute.storage.secrets import private_keys
from fedcompute.storage.tasks import TaskRow, get_task


def order(context: Context, iteration: IterationRow | NewIteration) -> UpdateJob:
    """The job that applies a round, or that looks ahead at one that is not open yet."""
    task = iteration.key.task
    with context.database.read() as tx:
        row = get_task(tx, task)
        groups = groups_of(task, iteration.result_id, list_batches(tx, iteration.key))
        spending = context.accounts.spending(tx, task.population)
        keys = private_keys(tx, context.sealer)
    assert row is not None, "an iteration's foreign key is its task"
    checkpoint, client_checkpoint, metrics = result_paths(iteration)
    prepared = context.prepared.get(iteration.key)
    return UpdateJob(
        blob_url=context.settings.blobs,
        plan_path=server_plan_path(task),
        base_path=_base_path(row, iteration),
        sums=tuple(groups),
        checkpoint_path=checkpoint,
        client_checkpoint_path=client_checkpoint,
        metrics_path=metrics,
        max_checkpoint_bytes=context.settings.max_checkpoint_bytes,
        key=iteration.key,
        report_goal=iteration.report_goal,
        is_last=iteration.key.iteration_id >= row.total_iteration,
        staleness=max(0, iteration.key.iteration_id - 1 - iteration.base_on_result_id),
        spending=spending,
        prospect=None if prepared is None else prepared.prospect,
        draws=() if prepared is None else prepared.draws,
        noise_key=context.noise_key,
        private_keys=keys,
        key_service=key_service_of(context.settings),
    )


def _base_path(task: TaskRow, iteration: IterationRow | NewIteration) -> str:
    if task.is_training:
        # Models are released in the order of their rounds, also where the devices of one started from an older model.
        return server_checkpoint_path(task.key, iteration.key.iteration_id - 1)
    info = task.info.evaluation_info
    training = TaskKey(info.training_population_name, info.training_task_id)
    return server_checkpoint_path(training, iteration.info.evaluation_training_iteration_id)


def result_paths(iteration: IterationRow | NewIteration) -> tuple[str, str, str]:
    """Where a round's server checkpoint, client checkpoint and metrics lie; bucket `model`."""
    task, result_id = iteration.key.task, iteration.result_id
    return (
        server_checkpoint_path(task, result_id),
        client_checkpoint_path(task, result_id),
        metrics_path(task, result_id),
    )


@dataclass(frozen=True)
class Outlook:
    """Whether a round that is not open yet could be released; `known` is False as long as a job finds it out."""

    known: bool
    refused: Overspent | None = None


def outlook(context: Context, new: NewIteration) -> Outlook:
    """Asks, by a job of its own, whether the budget leaves room for a round, so that no device works for nothing.

    Only advice: the round is judged again before it is released.
    """
    with context.database.read() as tx:
        limited = budget_of(tx, new.key.population) is not None
        # A round that overlaps others is judged at its release, when they are.
        overlaps = bool(active_iterations(tx, new.key.task))
    if overlaps or not limited or not charges(context.plans.server_plan(new.key.task).process):
        return Outlook(known=True)
    outcome = context.jobs.poll(AheadKey(new.key), foresee, lambda: order(context, new))
    if outcome is None:
        return Outlook(known=False)
    context.jobs.forget(AheadKey(new.key))
    # A job that fails says nothing about the budget; the round itself will show what is wrong.
    return Outlook(known=True, refused=outcome.result.refused if outcome.error is None else None)


def look_ahead(context: Context, iteration: IterationRow) -> bool:
    """Works out what a collecting round will cost and draws its noise, once, so that its release waits for neither.

    Always False: what is learnt changes nothing until the round is applied.
    """
    if iteration.key in context.prepared:
        return False
    if not has_noise(context.plans.server_plan(iteration.key.task).process):
        context.prepared[iteration.key] = None
        return False
    with context.database.read() as tx:
        task = get_task(tx, iteration.key.task)
        # What an overlapping round will cost depends on those before it.
        if task is None or (task.is_training and newest_release(tx, task.key) != iteration.key.iteration_id - 1):
            return False
    outcome = context.jobs.poll(AheadKey(iteration.key), prepare, lambda: order(context, iteration))
    if outcome is not None:
        context.prepared[iteration.key] = outcome.result
        context.jobs.forget(AheadKey(iteration.key))
    return False


def forget_preparations(context: Context, active: Collection[IterationKey]) -> None:
    """Drops what was prepared for rounds that are over."""
    for known in (context.prepared, context.merged):
        for key in [key for key in known if key not in active]:
            del known[key]
