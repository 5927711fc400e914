"""What a round costs its population: decided before its noise is drawn, entered in the ledger when it closes."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedcompute.learning.contribution import clip_norm_told, empty_sum
from fedcompute.learning.process import RoundResult, client_checkpoint, round_update
from fedcompute.privacy.budget import Budget, BudgetAssumption, cumulative_epsilon, spent_of
from fedcompute.privacy.chain import (
    METRIC_MECHANISM,
    METRICS,
    MODEL,
    NO_MECHANISM,
    ZEROED_COUNT,
    Release,
    charge,
    rounds_of,
)
from fedcompute.privacy.charges import Spent, assumption_of, charged, claim_document, releases
from fedcompute.privacy.ledger import Event, GaussianEvent, events_document
from fedcompute.privacy.noise import SilentNoise
from fedcompute.privacy.participation import Participation
from fedcompute.protos import learning_pb2
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import Standing, charged_entries, standing_of
from fedcompute.tensors.tree import Tensors

Process = learning_pb2.LearningProcess
# What plans without a claim are taken to promise.
DEFAULT_DELTA = 1e-6
_ZEROED_STAT = "server/aggregator/zeroed_count"
_UNPROTECTED = (GaussianEvent(0.0),)
_CACHED_POPULATIONS = 256


@dataclass(frozen=True)
class Spending:
    """What a population has been charged for, with the standing of its ledger and budget at that moment."""

    standing: Standing
    spent: Spent


@dataclass(frozen=True)
class Overspent:
    """A round that may not be released: it would bring its population to `epsilon`, above the budget."""

    epsilon: float
    standing: Standing

    def __str__(self) -> str:
        return overspending(self.epsilon, self.standing.budget)


@dataclass(frozen=True)
class Round:
    """A round that is about to be released: whose it is and how many devices are in it."""

    key: IterationKey
    report_goal: int
    contributions: int


class Accounts:
    """What populations have been charged for, remembered from round to round, since entries are only ever added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[int, Spent]] = OrderedDict()

    def spending(self, tx: Transaction, population: str) -> Spending:
        """The population's spending at this moment of the database; reads only what was added since the last call."""
        with self._lock:
            last, spent = self._known.pop(population, (0, {}))
            standing = standing_of(tx, population)
            if standing.last_charge < last:
                last, spent = 0, {}
            if standing.last_charge > last:
                for one_round in rounds_of(charged_entries(tx, population, after=last)):
                    spent = charge(spent, one_round)
            self._known[population] = (standing.last_charge, spent)
            while len(self._known) > _CACHED_POPULATIONS:
                self._known.popitem(last=False)
            return Spending(standing, spent)


@dataclass(frozen=True)
class Prospect:
    """What a round of at most `contributions` devices costs at a `standing`, before any of them is looked at.

    `epsilon`: what it brings its population to, at the claim's delta; `refused`: why it may not be released, if so;
    `no_more`: why the round behind it could not be.
    """

    standing: Standing
    contributions: int
    events: tuple[Event, ...]
    epsilon: float
    refused: Overspent | None
    no_more: Overspent | None

    def fits(self, spending: Spending, a_round: Round) -> bool:
        """Whether it is still the prospect of the round, now that it is known how many devices are in it."""
        return self.standing == spending.standing and a_round.contributions <= self.contributions


def prospect(
    spending: Spending, process: Process, a_round: Round, state: Callable[[], Tensors], *, is_last: bool
) -> Prospect:
    """What a round costs; `state` gives the server state that it starts from.

    Formal guarantees: events depend on the plan and on public parts of the state alone, so that a round of no
    contribution, in which no noise is drawn, has those of every other. Without `refused` all releases of the
    population together, this round among them, stay within its budget: epsilon at the budget's delta, under the
    budget's assumption, by a proven upper bound or the exact value.
    """
    limited = spending.standing.budget is not None
    following: tuple[Event, ...] = ()
    if has_noise(process):
        blank = blank_round(process, state())
        events = events_of(process, blank)
        if limited and not is_last:
            following = events_of(process, blank_round(process, blank.state))
    else:
        events = following = _UNPROTECTED if charges(process) else ()
    delta = claim_of(process, a_round.report_goal)["delta"]
    refused = _refused(spending, process, a_round, events)
    epsilon, no_more = 0.0, None
    if events and refused is None:
        epsilon = _cumulative(spending, process, a_round, events, delta)
        if limited and not is_last:
            after = Spending(spending.standing, _after(spending.spent, process, a_round, events))
            key = replace(a_round.key, iteration_id=a_round.key.iteration_id + 1)
            no_more = _refused(after, process, replace(a_round, key=key), following)
    most = max(a_round.report_goal, a_round.contributions)
    return Prospect(spending.standing, most, events, epsilon, refused, no_more)


def has_noise(process: Process) -> bool:
    """Whether a round of the process adds noise to anything, so that its cost is not plain."""
    noised_model = process.kind == Process.TRAINING and mechanism_of(process) != NO_MECHANISM
    return noised_model or process.HasField("metric_noise")


def charges(process: Process) -> bool:
    """Whether rounds of the process are charged for: all that release a model, and those that noise metrics."""
    return process.kind == Process.TRAINING or process.HasField("metric_noise")


def blank_round(process: Process, state: Tensors) -> RoundResult:
    """A round of nobody, without noise: it has the events of every other round that starts from `state`."""
    clip_norm = clip_norm_told(process, client_checkpoint(process, state))
    return round_update(process, state, empty_sum(process, b"", clip_norm), SilentNoise())


def events_of(process: Process, result: RoundResult) -> tuple[Event, ...]:
    """What a round's result is charged for: model and metrics together; a model without noise has no protection."""
    model = result.events or (_UNPROTECTED if process.kind == Process.TRAINING else ())
    return (*model, *result.metric_events)


def entries_of(
    process: Process, a_round: Round, result: RoundResult, clip_norm: float | None, epsilon: float
) -> tuple[Release, ...]:
    """What the ledger says of a round: its model if it has one, its metrics, and how many devices sent zeros.

    `epsilon`: of the whole population after the round.
    """
    claim = claim_of(process, a_round.report_goal)

    def release(what: str, mechanism: str, charges: Sequence[Event], clip: float | None) -> Release:
        return Release(
            population=a_round.key.population,
            task_id=a_round.key.task_id,
            iteration_id=a_round.key.iteration_id,
            released=what,
            mechanism=mechanism,
            event=events_document(charges) if charges else None,
            claim=claim if charges else None,
            clip_norm=None if clip is None else float(clip),
            report_goal=a_round.report_goal,
            contributions=a_round.contributions,
            cumulative_epsilon=epsilon if math.isfinite(epsilon) else None,
            delta=claim["delta"],
        )

    noised = bool(result.metric_events)
    bound = process.metric_noise.clip_norm if noised else None
    name = METRIC_MECHANISM if noised else NO_MECHANISM
    found = [release(METRICS, name, result.metric_events, bound)]
    if _ZEROED_STAT in result.metrics:
        found.append(release(ZEROED_COUNT, name, (), bound))
    if process.kind == Process.TRAINING:
        model = result.events or _UNPROTECTED
        found.insert(0, release(MODEL, mechanism_of(process), model, clip_norm if result.events else None))
    return tuple(found)


def mechanism_of(process: Process) -> str:
    """The ledger's name of what noises the model: the name of the plan's aggregator, NONE if it does not."""
    name = str(process.WhichOneof("aggregator"))
    return NO_MECHANISM if name in ("uniform_mean", "weighted_mean", "None") else name.upper()


def claim_of(process: Process, report_goal: int) -> dict[str, Any]:
    """The claim of a plan as the ledger keeps it; a plan that makes none assumes nothing about its devices."""
    claim = process.privacy_claim
    participation = Participation.NO_AMPLIFICATION
    if claim.participation:
        participation = Participation(claim.participation)
    return claim_document(
        participation,
        claim.estimated_population,
        claim.minimum_separation,
        report_goal,
        claim.delta if 0 < claim.delta < 1 else DEFAULT_DELTA,
    )


def overspending(epsilon: float, budget: Budget | None) -> str:
    """The sentence that operators read."""
    assert budget is not None, "only a budget can be overspent"
    return (
        f"privacy budget spent: the next release would bring the population to epsilon {epsilon:.6g} at delta "
        f"{budget.delta:g} ({budget.assumption.value}), its budget is {budget.epsilon:g}"
    )


def _refused(spending: Spending, process: Process, a_round: Round, events: Sequence[Event]) -> Overspent | None:
    budget = spending.standing.budget
    if budget is None or not events:
        return None
    epsilon = spent_of(budget, releases(_after(spending.spent, process, a_round, events)))
    return None if epsilon <= budget.epsilon else Overspent(epsilon, spending.standing)


def _after(spent: Spent, process: Process, a_round: Round, events: Sequence[Event]) -> Spent:
    claim = claim_of(process, a_round.report_goal)
    assumption = assumption_of(claim, a_round.report_goal, a_round.contributions)
    return charged(spent, a_round.key.task_id, a_round.key.iteration_id, events, assumption)


def _cumulative(spending: Spending, process: Process, a_round: Round, events: Sequence[Event], delta: float) -> float:
    budget = spending.standing.budget
    # The number that is stored is the number that was compared.
    compared = budget is not None and budget.delta == delta and budget.assumption is BudgetAssumption.CLAIMED
    limit = budget.epsilon if budget is not None and compared else math.inf
    return cumulative_epsilon(releases(_after(spending.spent, process, a_round, events)), delta, limit=limit)
