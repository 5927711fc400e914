"""The privacy budget of a population: how much all of its tasks together may release."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from fedcompute.privacy.composition import TaskReleases
from fedcompute.privacy.participation import Participation

# Sums and roots of the same numbers come out a little different on other machines.
TOLERANCE = 1e-6
_LOOSENESS = 1.01
# Every round waits for them or at least shares its processor with them: a few hundredths of a second, and bounds that
# lie a few thousandths above the tightest.
_QUICK_CELLS = 1 << 14


class BudgetAssumption(StrEnum):
    """What a budget believes of devices: what each task claims, or nothing at all."""

    CLAIMED = "CLAIMED"
    NO_AMPLIFICATION = "NO_AMPLIFICATION"


@dataclass(frozen=True)
class Budget:
    """At most `epsilon` at `delta` may be released about a device by all tasks of its population together."""

    epsilon: float
    delta: float
    assumption: BudgetAssumption = BudgetAssumption.CLAIMED

    def problems(self) -> list[str]:
        """What makes the numbers no budget."""
        found = []
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            found.append(f"epsilon is {self.epsilon:g}, must be greater than 0 and finite")
        if not 0 < self.delta < 1:
            found.append(f"delta is {self.delta:g}, must lie between 0 and 1")
        return found


def cumulative_epsilon(tasks: Sequence[TaskReleases], delta: float, *, limit: float = math.inf) -> float:
    """What the tasks' releases come to at `delta`: a proven upper bound, or the exact value where only that decides.

    `limit`: the caller compares with it. Tighter bounds, and the exact value, which may take seconds, are computed
    only if the limit lies between the bounds that come quickly.

    Formal guarantees: at least the epsilon of all releases together, under each task's assumption; infinite if one of
    them has no noise. At most `limit` if that epsilon is.
    """
    if not tasks:
        return 0.0
    from fedcompute.privacy.bounds import parts_bounds, parts_upper
    from fedcompute.privacy.composition import parts_epsilon, parts_of

    parts = parts_of(tasks)
    upper = parts_upper(parts, delta, _QUICK_CELLS)
    if upper <= limit or parts_bounds(parts, delta, _QUICK_CELLS).lower > limit:
        return upper
    tight = parts_bounds(parts, delta)
    if not tight.lower <= limit < tight.upper:
        return tight.upper
    return min(tight.upper, parts_epsilon(parts, delta))


def is_cumulative(value: float, tasks: Sequence[TaskReleases], delta: float) -> tuple[bool, float]:
    """Whether `value` may stand for what the tasks' releases come to, and the number that says so.

    It must not lie below the exact value, by more than 1e-6 of it, nor more than 1 % above the proven upper bound:
    room for bounds that another version computes. The exact value is looked at only where the bound does not tell.

    Formal guarantees: a value that passes is at least the epsilon of all releases together, under each task's
    assumption, but for 1e-6 of it.
    """
    upper = cumulative_epsilon(tasks, delta)
    if math.isinf(upper):
        return math.isinf(value), upper
    if value >= upper * (1 - TOLERANCE):
        return value <= upper * _LOOSENESS, upper
    from fedcompute.privacy.bounds import parts_lower
    from fedcompute.privacy.composition import parts_epsilon, parts_of

    parts = parts_of(tasks)
    if value < (lower := parts_lower(parts, delta, _QUICK_CELLS)) * (1 - TOLERANCE):
        return False, lower
    exact = min(upper, parts_epsilon(parts, delta))
    return value >= exact * (1 - TOLERANCE), exact


def spent_of(budget: Budget, tasks: Sequence[TaskReleases]) -> float:
    """What the tasks have spent of a budget: epsilon at its delta, under its assumption, just as it is enforced.

    Formal guarantees: those of `cumulative_epsilon`; with NO_AMPLIFICATION nothing is assumed about when devices come.
    """
    if budget.assumption is BudgetAssumption.NO_AMPLIFICATION:
        tasks = [
            replace(task, assumption=replace(task.assumption, participation=Participation.NO_AMPLIFICATION))
            for task in tasks
        ]
    return cumulative_epsilon(tasks, budget.delta, limit=budget.epsilon)
