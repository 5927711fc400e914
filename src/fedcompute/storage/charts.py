"""What pages ask the database beyond single rows: overviews, series of metrics, and whether anything has changed."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select

from fedcompute.privacy.chain import Entry
from fedcompute.storage import schema
from fedcompute.storage.assignments import count_assignments
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.database import Transaction
from fedcompute.storage.iterations import IterationRow, iteration_row
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.releases import ledger_entries
from fedcompute.storage.schema import ACTIVE_ITERATION, ACTIVE_TASK, RELEASED_ITERATION, TaskKind
from fedcompute.storage.summaries import unsettled_attempts
from fedcompute.storage.tasks import TaskRow, task_row

# In how many of the newest rounds a metric is looked for.
_NAMED_ROUNDS = 20
_EVALUATIONS = 50
_ACTIVE_ROUNDS = 50


@dataclass(frozen=True)
class PopulationOverview:
    """A population in a list; `last_activity` is when a task or round of it last changed its status.

    `epsilon` is the ledger's cumulative one, None without an entry; `budget_epsilon` None where nothing limits it.
    """

    name: str
    tasks: int
    active_tasks: int
    newest_task: TaskKey
    rounds_released: int
    newest_release: datetime | None
    last_activity: datetime
    epsilon: float | None
    delta: float | None
    budget_epsilon: float | None


def population_overviews(
    tx: Transaction, *, name: str | None = None, after: str | None = None, limit: int = 100
) -> list[PopulationOverview]:
    """Populations by name, from the one behind `after`; or the one called `name`, if there is one."""
    task = schema.task
    query = select(task.c.population_name).distinct().order_by(task.c.population_name).limit(limit)
    if name is not None:
        query = query.where(task.c.population_name == name)
    if after is not None:
        query = query.where(task.c.population_name > after)
    return [_overview(tx, name) for name in tx.execute(query).scalars()]


def population_names(tx: Transaction, *, limit: int = 1000) -> list[str]:
    """Every population that has or had a task, at most `limit`."""
    query = select(schema.task.c.population_name).distinct().order_by(schema.task.c.population_name).limit(limit)
    return list(tx.execute(query).scalars())


def metric_names(tx: Transaction, task: TaskKey) -> list[str]:
    """The metrics of a task's newest rounds, by name."""
    table = schema.model_metrics
    rounds = (
        select(table.c.iteration_id)
        .where(schema.of_task(table, task))
        .distinct()
        .order_by(table.c.iteration_id.desc())
        .limit(_NAMED_ROUNDS)
    )
    newest = tx.execute(rounds).scalars().all()
    if not newest:
        return []
    names = select(table.c.metric_name).where(schema.of_task(table, task), table.c.iteration_id >= newest[-1])
    return list(tx.execute(names.distinct().order_by(table.c.metric_name)).scalars())


def metric_series(
    tx: Transaction, task: TaskKey, names: Collection[str], *, limit: int = 1000, before: int | None = None
) -> dict[str, list[tuple[int, float | None]]]:
    """Each metric as (round, value), ascending, of the newest `limit` rounds before `before`."""
    table = schema.model_metrics
    mine = [schema.of_task(table, task)] + ([] if before is None else [table.c.iteration_id < before])
    first = tx.execute(
        select(table.c.iteration_id).where(*mine).distinct().order_by(table.c.iteration_id.desc()).limit(limit)
    ).scalars()
    oldest = min(first, default=None)
    found: dict[str, list[tuple[int, float | None]]] = {name: [] for name in names}
    if oldest is None:
        return found
    query = (
        select(table.c.metric_name, table.c.iteration_id, table.c.metric_value)
        .where(*mine, table.c.iteration_id >= oldest, table.c.metric_name.in_(list(names)))
        .order_by(table.c.iteration_id)
    )
    for name, iteration_id, value in tx.execute(query):
        found[name].append((iteration_id, value))
    return found


def task_version(tx: Transaction, task: TaskKey) -> str:
    """A text that changes whenever a page about the task would, which shows its evaluations and its budget too."""
    table, rounds, ledger, population = schema.task, schema.iteration, schema.privacy_ledger, task.population
    row = tx.execute(select(table.c.status, table.c.status_id).where(schema.of_task(table, task))).one_or_none()
    shown = [task, *(one.key for one in evaluations_of(tx, task))]
    moved = select(
        func.count(), func.sum(rounds.c.status_id), func.max(rounds.c.status_time), func.max(rounds.c.settled_time)
    ).where(rounds.c.population_name == population, rounds.c.task_id.in_([one.task_id for one in shown]))
    # Devices come and go in rounds that are over, too, until these are summed up.
    open_ones = unsettled_attempts(tx, [task])[-_ACTIVE_ROUNDS:]
    counted = [(one.iteration_id, one.attempt_id, *count_assignments(tx, one).values()) for one in open_ones]
    spent = tx.execute(select(func.max(ledger.c.sequence)).where(ledger.c.population_name == population)).scalar()
    return repr((tuple(row or ()), shown, tuple(tx.execute(moved).one()), counted, spent, budget_of(tx, population)))


def overview_version(tx: Transaction, population: str | None = None) -> str:
    """A text that changes whenever a list of tasks, of all populations or one, would."""
    rounds = schema.iteration
    iterations = select(rounds).where(rounds.c.status.in_([int(one) for one in ACTIVE_ITERATION]))
    if population is not None:
        iterations = iterations.where(rounds.c.population_name == population)
    active = tx.execute(iterations.order_by(rounds.c.status_time.desc()).limit(_ACTIVE_ROUNDS)).all()
    keys = [IterationKey(row.population_name, row.task_id, row.iteration_id, row.attempt_id) for row in active]
    counted = [
        (key, row.status_id, *count_assignments(tx, key).values()) for key, row in zip(keys, active, strict=True)
    ]
    return repr((tasks_version(tx, population), counted))


def tasks_version(tx: Transaction, population: str | None = None) -> str:
    """A text that changes whenever a task or a budget does, of all populations or one; not with every device."""
    table, budget = schema.task, schema.privacy_budget
    tasks = select(func.count(), func.max(table.c.status_time), func.sum(table.c.status_id))
    budgets = select(func.count(), func.max(budget.c.created_time))
    if population is not None:
        tasks = tasks.where(table.c.population_name == population)
        budgets = budgets.where(budget.c.population_name == population)
    return repr((tuple(tx.execute(tasks).one()), tuple(tx.execute(budgets).one())))


def evaluations_of(tx: Transaction, task: TaskKey) -> list[TaskRow]:
    """The evaluation tasks of the population that measure this training task, newest first."""
    table = schema.task
    query = (
        select(table)
        .where(table.c.population_name == task.population, table.c.kind == int(TaskKind.EVALUATION))
        .order_by(table.c.task_id.desc())
        .limit(_EVALUATIONS)
    )
    rows = [task_row(row) for row in tx.execute(query)]
    measured = [(row, row.info.evaluation_info) for row in rows]
    return [
        row
        for row, info in measured
        # An evaluation may measure a task of another population.
        if info.training_task_id == task.task_id
        and (info.training_population_name or task.population) == task.population
    ]


def count_released(tx: Transaction, task: TaskKey) -> int:
    """How many rounds of a task were released."""
    table = schema.iteration
    query = select(func.count(table.c.iteration_id.distinct())).where(
        schema.of_task(table, task), table.c.status.in_([int(one) for one in RELEASED_ITERATION])
    )
    return int(tx.execute(query).scalar_one())


def recent_tasks(tx: Transaction, *, population: str | None = None, limit: int) -> list[TaskRow]:
    """The tasks that were created last, of all populations or one, newest first."""
    table = schema.task
    query = select(table).order_by(table.c.created_time.desc(), table.c.population_name, table.c.task_id.desc())
    if population is not None:
        query = query.where(table.c.population_name == population)
    return [task_row(row) for row in tx.execute(query.limit(limit))]


def newest_attempts(tx: Transaction, population: str, *, limit: int) -> list[IterationRow]:
    """The attempts of a population's rounds that opened last, of all its tasks, newest first."""
    table = schema.iteration
    query = (
        select(table)
        .where(table.c.population_name == population)
        .order_by(table.c.created_time.desc(), table.c.task_id.desc(), table.c.iteration_id.desc())
        .limit(limit)
    )
    return [iteration_row(row) for row in tx.execute(query)]


def newest_round(tx: Transaction, task: TaskKey) -> int:
    """The number of a task's newest round; 0 before the first."""
    query = select(func.max(schema.iteration.c.iteration_id)).where(schema.of_task(schema.iteration, task))
    return tx.execute(query).scalar() or 0


def round_entries(tx: Transaction, task: TaskKey, iteration_id: int) -> list[Entry]:
    """What one round released, as the ledger has it."""
    table = schema.privacy_ledger
    query = select(table.c.sequence).where(schema.of_task(table, task), table.c.iteration_id == iteration_id)
    sequences = list(tx.execute(query.order_by(table.c.sequence)).scalars())
    if not sequences:
        return []
    # What a round releases is entered together.
    found = ledger_entries(tx, task.population, after=sequences[0] - 1, limit=len(sequences))
    return [one for one in found if one.sequence in sequences]


def newest_entries(tx: Transaction, population: str, *, before: int | None = None, limit: int = 100) -> list[Entry]:
    """The newest entries of a population's ledger, newest first; of those before the sequence number `before`."""
    table = schema.privacy_ledger
    query = select(table.c.sequence).where(table.c.population_name == population)
    if before is not None:
        query = query.where(table.c.sequence < before)
    first = list(tx.execute(query.order_by(table.c.sequence.desc()).limit(limit)).scalars())
    if not first:
        return []
    return ledger_entries(tx, population, after=first[-1] - 1, limit=len(first))[::-1]


def task_entries(
    tx: Transaction, task: TaskKey, *, released: str | None = None, before: int | None = None, limit: int = 1000
) -> list[Entry]:
    """A task's ledger entries of its newest `limit` rounds before `before`, by round; `released` names one kind."""
    table = schema.privacy_ledger
    query = select(table.c.sequence).where(schema.of_task(table, task))
    if released is not None:
        query = query.where(table.c.released == released)
    if before is not None:
        query = query.where(table.c.iteration_id < before)
    order = [table.c.iteration_id.desc(), table.c.sequence.desc()]
    wanted = set(tx.execute(query.order_by(*order).limit(limit)).scalars())
    if not wanted:
        return []
    found = ledger_entries(tx, task.population, task=task, after=min(wanted) - 1)
    return [one for one in found if one.sequence in wanted]


def _overview(tx: Transaction, name: str) -> PopulationOverview:
    table, rounds, ledger = schema.task, schema.iteration, schema.privacy_ledger
    tasks = tx.execute(
        select(table.c.task_id, table.c.status, table.c.status_time).where(table.c.population_name == name)
    ).all()
    released, newest = tx.execute(
        select(func.count(), func.max(rounds.c.status_time)).where(
            rounds.c.population_name == name, rounds.c.status.in_([int(one) for one in RELEASED_ITERATION])
        )
    ).one()
    latest = tx.execute(select(func.max(rounds.c.status_time)).where(rounds.c.population_name == name)).scalar()
    entry = tx.execute(
        select(ledger.c.cumulative_epsilon, ledger.c.delta)
        .where(ledger.c.population_name == name)
        .order_by(ledger.c.sequence.desc())
        .limit(1)
    ).one_or_none()
    budget = budget_of(tx, name)
    return PopulationOverview(
        name=name,
        tasks=len(tasks),
        active_tasks=sum(row.status in [int(one) for one in ACTIVE_TASK] for row in tasks),
        newest_task=TaskKey(name, max(row.task_id for row in tasks)),
        rounds_released=released,
        newest_release=newest,
        last_activity=max([row.status_time for row in tasks] + ([latest] if latest else [])),
        epsilon=entry.cumulative_epsilon if entry else None,
        delta=entry.delta if entry else None,
        budget_epsilon=budget.epsilon if budget else None,
    )
