"""The privacy budgets of populations as stored."""

from datetime import datetime

from sqlalchemy import delete, insert, select, update

from fedcompute.errors import Reason, RequestRejected
from fedcompute.privacy.budget import Budget, BudgetAssumption
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.tasks import population_problems

_TABLE = schema.privacy_budget


def budget_of(tx: Transaction, population: str) -> Budget | None:
    """The population's budget, or None if what its tasks release is not limited."""
    row = tx.execute(select(_TABLE).where(_TABLE.c.population_name == population)).one_or_none()
    return None if row is None else Budget(row.epsilon, row.delta, BudgetAssumption(row.assumption))


def set_budget(tx: Transaction, population: str, budget: Budget, now: datetime) -> None:
    """Gives the population a budget in place of the one it has; what is spent already stays so.

    Raises RequestRejected(BUDGET_INVALID) for numbers that are no budget or a name that no population may have.
    """
    problems = [*population_problems(population), *budget.problems()]
    if problems:
        raise RequestRejected(Reason.BUDGET_INVALID, "; ".join(problems))
    lock_population(tx, population)
    values = {
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "assumption": budget.assumption.value,
        "created_time": now,
    }
    if not tx.execute(update(_TABLE).where(_TABLE.c.population_name == population).values(values)).rowcount:
        tx.execute(insert(_TABLE).values(population_name=population, **values))


def remove_budget(tx: Transaction, population: str) -> bool:
    """Takes the population's limit away; False if it had none."""
    lock_population(tx, population)
    return bool(tx.execute(delete(_TABLE).where(_TABLE.c.population_name == population)).rowcount)
