"""What tasks have released under differential privacy so far, compressed: what an accountant needs and no more."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.privacy.composition import TaskReleases
from fedcompute.privacy.ledger import Event, GaussianEvent
from fedcompute.privacy.mechanisms import Mechanisms, gathered
from fedcompute.privacy.participation import Assumption, Participation

# What the columns of a database hold; with it, sums of two fit into 64 bits.
_NUMBER_LIMIT = 1 << 62


@dataclass(frozen=True)
class Run:
    """`rounds` rounds in a row with the same events, but that the steps of trees and factorizations count up."""

    events: tuple[Event, ...]
    rounds: int


@dataclass(frozen=True)
class ChargedRounds(Sequence[tuple[Event, ...]]):
    """The rounds of `runs`, one after the other, written out only where they are looked at."""

    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return sum(run.rounds for run in self.runs)

    def __iter__(self) -> Iterator[tuple[Event, ...]]:
        for run in self.runs:
            yield from (_advanced(run.events, index) for index in range(run.rounds))

    @overload
    def __getitem__(self, index: int) -> tuple[Event, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Event, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Event, ...] | Sequence[tuple[Event, ...]]:
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if (start, stride) == (0, 1):
                return ChargedRounds(tuple(_first(self.runs, stop)))
            return [self[position] for position in range(start, stop, stride)]
        left = index + len(self) if index < 0 else index
        for run in self.runs if left >= 0 else ():
            if left < run.rounds:
                return _advanced(run.events, left)
            left -= run.rounds
        raise IndexError(index)

    @property
    def mechanisms(self) -> Mechanisms:
        """What `mechanisms.mechanisms_of` finds in these rounds."""
        return gathered((run.events, run.rounds) for run in self.runs)


@dataclass(frozen=True)
class Charges:
    """A task's rounds from the first on, without events where nothing is charged, and how its devices come to them."""

    assumption: Assumption
    runs: tuple[Run, ...] = ()


Spent = Mapping[int, Charges]
"""A population's charges by task id."""


def charged(
    spent: Spent, task_id: int, iteration_id: int, events: Sequence[Event], assumption: Assumption
) -> dict[int, Charges]:
    """`spent` and one more round of a task, whose events it releases together.

    Formal guarantees: unit of privacy is the device, adjacency that of the accountant. When a task's rounds come with
    different assumptions, the weakest of each of their parts holds for all of its rounds, so that what is computed
    from the result is an upper bound under each round's own assumption.
    """
    before = spent.get(task_id, Charges(assumption))
    runs = list(before.runs)
    # Minimum separation counts every round, also one that the ledger charges nothing for.
    skipped = iteration_id - 1 - sum(run.rounds for run in runs)
    if skipped > 0:
        runs.append(Run((), skipped))
    if runs and _advanced(runs[-1].events, runs[-1].rounds) == tuple(events):
        runs[-1] = Run(runs[-1].events, runs[-1].rounds + 1)
    else:
        runs.append(Run(tuple(events), 1))
    return {**spent, task_id: Charges(weaker(before.assumption, assumption), tuple(runs))}


def weaker(one: Assumption, other: Assumption) -> Assumption:
    """An assumption that both of two fulfil: fewer devices, more of them in a round, rounds nearer to each other.

    Formal guarantees: what holds under the result holds under both. Different ways of participation leave none.
    """
    if one == other:
        return one
    same = one.participation is other.participation
    return Assumption(
        participation=one.participation if same else Participation.NO_AMPLIFICATION,
        population=min(one.population, other.population),
        report_goal=max(one.report_goal, other.report_goal),
        minimum_separation=min(one.minimum_separation, other.minimum_separation),
    )


def releases(spent: Spent) -> list[TaskReleases]:
    """The charges as accountants take them, one entry per task; takes no more memory than `spent`.

    Formal guarantees: none of its own; every charged round of every task is in the result, once and in order.
    """
    return [TaskReleases(ChargedRounds(charges.runs), charges.assumption) for charges in spent.values()]


def claim_document(
    participation: Participation, population: int, minimum_separation: int, report_goal: int, delta: float
) -> dict[str, Any]:
    """A claim as ledgers keep it.

    Formal guarantees: none; it says what is assumed of devices and proves nothing about them.
    """
    return {
        "participation": participation.name,
        "estimated_population": population,
        "minimum_separation": minimum_separation,
        "report_goal": report_goal,
        "delta": delta,
    }


def assumption_of(claim: Mapping[str, Any] | None, report_goal: int, contributions: int) -> Assumption:
    """What a ledger's claim assumes of a round of `contributions`; NO_AMPLIFICATION without a claim.

    Raises ArtifactInvalid (LEDGER_MALFORMED) for a document of another form.

    Formal guarantees: sampling is never assumed to be rarer than it was: a round that holds more contributions than
    its goal counts as one with so many, and a population is at least as large as a round.
    """
    if claim is None:
        most = max(report_goal, contributions, 1)
        return Assumption(Participation.NO_AMPLIFICATION, most, most)
    try:
        participation = Participation[claim["participation"]]
        population, separation, goal = (
            int(claim[name]) for name in ("estimated_population", "minimum_separation", "report_goal")
        )
        if not 0 <= min(population, separation, goal) <= max(population, separation, goal) < _NUMBER_LIMIT:
            raise ValueError
        if not 0 < float(claim["delta"]) < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as cause:
        raise ArtifactInvalid(Reason.LEDGER_MALFORMED, "a ledger entry's claim cannot be read") from cause
    most = max(goal, report_goal, contributions, 1)
    return Assumption(participation, max(population, most), most, separation)


def unprotected(events: Iterable[Event]) -> bool:
    """Whether one of the events has no noise at all.

    Formal guarantees: if so, the epsilon of any composition with it is infinite, whatever its adjacency.
    """
    return any(event.noise_multiplier == 0 for event in events)


def _first(runs: Iterable[Run], rounds: int) -> Iterator[Run]:
    for run in runs:
        if rounds <= 0:
            return
        yield run if run.rounds <= rounds else replace(run, rounds=rounds)
        rounds -= run.rounds


def _advanced(events: tuple[Event, ...], rounds: int) -> tuple[Event, ...]:
    if all(isinstance(event, GaussianEvent) for event in events):
        return events
    return tuple(
        event if isinstance(event, GaussianEvent) else replace(event, step=event.step + rounds) for event in events
    )
