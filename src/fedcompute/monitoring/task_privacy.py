"""What one task released about devices and what it spent, put together from its population's ledger."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.privacy import chain
from fedcompute.privacy.bounds import Bounds, epsilon_bounds
from fedcompute.privacy.budget import Budget, spent_of
from fedcompute.privacy.chain import METRICS, MODEL, NO_MECHANISM, Entry
from fedcompute.privacy.charges import Spent, releases
from fedcompute.privacy.composition import TaskReleases, unamplified_epsilon
from fedcompute.privacy.ledger import BandedEvent, Event, GaussianEvent, composed_noise_multiplier, read_events
from fedcompute.privacy.ledger_document import Ledger, budget_document
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.report import PrivacyReport, epsilon_series, privacy_report
from fedcompute.privacy.report import Spent as Point

# What entries without a task's claim are taken for.
_DEFAULT_DELTA = 1e-6
# The highest number of a round that is believed; each one up to it takes memory.
_MOST_ROUNDS = 10_000_000
# Points of a curve that costs little; more would not be seen.
_POINTS = 100


@dataclass(frozen=True)
class PlanFacts:
    """What a task's plan says and its ledger does not; what is unknown has its default.

    `known`: whether the plan was read. It promises `promised_epsilon` after `promised_rounds` rounds. `column_norm`: of
    a banded factorization's matrix. `metric_names`: by task id, what the entries "metrics" stand for. `most_devices`:
    that a round may hold. `has_graphs`: whether its server half is graphs, whose noise nothing here counts.
    """

    known: bool = False
    promised_epsilon: float | None = None
    promised_rounds: int | None = None
    column_norm: float | None = None
    metric_names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    most_devices: int | None = None
    has_graphs: bool = False


@dataclass(frozen=True)
class RoundSpending:
    """One round: `clip_norm` and `deviation` of the sum's noise in model units, None where there is none.

    `events`: what was charged for the model and for its metrics. `epsilon`: of the whole population after the round,
    as the ledger has it at `delta`; None if infinite or not computed. `sequence`, `hash`: of the round's last entry.
    """

    iteration_id: int
    contributions: int
    mechanism: str
    clip_norm: float | None
    noise_multiplier: float | None
    deviation: float | None
    epsilon: float | None
    delta: float
    sequence: int
    hash: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Unprotected:
    """Releases without noise: of what (see `chain.RELEASED`), how often, and what they are called, if known."""

    task_id: int
    kind: str
    released: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class TaskSpending:
    """A task of the population; `bounds`: what its releases come to alone, under its own claim."""

    task_id: int
    kind: str
    status: str
    rounds: int
    mechanisms: tuple[str, ...]
    participation: str
    bounds: Bounds


@dataclass(frozen=True)
class MetricNoise:
    """Noise on the sums of metrics: clip norm in their units, deviation over it, rounds that have it."""

    clip_norm: float | None
    noise_multiplier: float
    rounds: int


@dataclass(frozen=True)
class TaskPrivacy:
    """A task's privacy: what it released, what that spent under which assumption, and whether the ledger is whole.

    `report`: epsilons of this task alone. `goal`: the report goal that sums are divided by, while the assumption's is
    at least the largest round. `series`: both epsilons by round; `recomputed` unless its claims are those that the
    ledger has. `tasks`: all of the population; `population_bounds` and `budget_spent`: epsilon of all
    of them together, at the report's delta and at the budget's. `asked`: what the reader put in place of the claim.
    `problems`: of the chain and its events. `as_of`: time of the newest entry.
    """

    population: str
    task_id: int
    kind: str
    status: str
    reason: str | None
    mechanism: str
    report: PrivacyReport
    releases: TaskReleases
    rounds: tuple[RoundSpending, ...]
    series: tuple[Point, ...]
    recomputed: bool
    goal: int
    metrics: MetricNoise | None
    unprotected: tuple[Unprotected, ...]
    tasks: tuple[TaskSpending, ...]
    population_bounds: Bounds
    budget: Budget | None
    budget_spent: float | None
    asked: tuple[str, ...]
    problems: tuple[str, ...]
    head: str
    entries: int
    as_of: str | None
    facts: PlanFacts


def task_privacy(
    ledger: Ledger,
    task_id: int,
    *,
    facts: PlanFacts | None = None,
    delta: float | None = None,
    devices: int | None = None,
) -> TaskPrivacy:
    """Recomputes a task's privacy from the ledger of its population; with little noise that takes up to a minute.

    `delta`, `devices` (in the population) replace what the task claims. The chain and its events are judged; stored
    epsilons are shown as they are, `chain.verify_epsilons` judges them. Raises ArtifactInvalid (LEDGER_MALFORMED |
    STATE_MISMATCH) for events or claims that cannot be read, OperationFailed (SETTINGS_INVALID) for fewer devices than
    a round had.
    """
    facts = facts or PlanFacts()
    described = _described(ledger)
    own = [entry for entry in ledger.entries if entry.task_id == task_id]
    if not all(1 <= entry.iteration_id <= _MOST_ROUNDS for entry in ledger.entries):
        raise ArtifactInvalid(Reason.LEDGER_MALFORMED, "the ledger cannot be read: no task has so many rounds")
    charged = _charged(ledger.entries)
    claimed = charged.get(task_id) or TaskReleases([], _unclaimed(own))
    task, asked = _asked(claimed, _delta(own), devices, delta)
    if task_id in charged:
        charged[task_id] = task
    at = delta or _delta(own)
    if not 0 < at < 1:
        raise ArtifactInvalid(Reason.LEDGER_MALFORMED, f"the ledger cannot be read: delta is {at:g}")
    rounds = tuple(_rounds(own, facts))
    unprotected = tuple(_unprotected(ledger.entries, described, facts))
    report = privacy_report(
        task.rounds,
        task.assumption,
        clip_norm=max((one.clip_norm for one in rounds if one.clip_norm is not None), default=0.0),
        delta=at,
        claimed_epsilon=facts.promised_epsilon,
        unprotected={one.released: one.count for one in unprotected if one.task_id == task_id},
    )
    own_bounds = Bounds(report.epsilon, report.epsilon)
    alone = not charged.keys() - {task_id}
    stored = _stored_series(rounds, task, at) if alone and not asked else None
    return TaskPrivacy(
        population=ledger.population,
        task_id=task_id,
        kind=_text(described, task_id, "kind"),
        status=_text(described, task_id, "status"),
        reason=_text(described, task_id, "reason") or None,
        mechanism=_mechanism(own),
        report=report,
        releases=task,
        rounds=rounds,
        series=stored or epsilon_series(task, at),
        recomputed=stored is None,
        goal=max((entry.report_goal for entry in own), default=0),
        metrics=_metric_noise(own),
        unprotected=unprotected,
        tasks=tuple(_tasks(ledger.entries, charged, described, at, {task_id: own_bounds})),
        population_bounds=own_bounds if alone else epsilon_bounds(list(charged.values()), at),
        budget=ledger.budget,
        budget_spent=None if ledger.budget is None else spent_of(ledger.budget, list(charged.values())),
        asked=asked,
        problems=tuple(chain.verify_chain(ledger.entries) + chain.verify_events(ledger.entries)),
        head=chain.head(ledger.entries),
        entries=len(ledger.entries),
        as_of=ledger.entries[-1].created if ledger.entries else None,
        facts=facts,
    )


def document(found: TaskPrivacy) -> dict[str, Any]:
    """The report for programs: always the same names; null for what is infinite or unknown.

    `epsilon`: under the assumption; `separated_epsilon`: for a device that comes whenever the minimum separation lets
    it; `unamplified_epsilon`: for one in every round.
    """
    report, assumption = found.report, found.report.assumption
    separated = report.unamplified_epsilon if report.separated_epsilon is None else report.separated_epsilon
    return {
        "population": found.population,
        "task_id": found.task_id,
        "kind": found.kind or None,
        "status": found.status or None,
        "mechanism": found.mechanism,
        "releases": report.rounds,
        "noise_multiplier": _finite(report.noise_multiplier),
        "clip_norm": report.clip_norm or None,
        "delta": report.delta,
        "participation": assumption.participation.name,
        "devices": assumption.population,
        "report_goal": found.goal,
        "minimum_separation": assumption.minimum_separation,
        "participations": report.participations,
        "promised_epsilon": _finite(found.facts.promised_epsilon),
        "promised_rounds": found.facts.promised_rounds,
        "epsilon": _finite(report.epsilon),
        "separated_epsilon": _finite(separated),
        "unamplified_epsilon": _finite(report.unamplified_epsilon),
        "warning": report.warning,
        "asked": list(found.asked),
        "rounds": [_round_document(one) for one in found.rounds],
        "metric_noise": None if found.metrics is None else asdict(found.metrics),
        "unprotected": [asdict(one) for one in found.unprotected],
        "tasks": [{**asdict(one), "bounds": _bounds(one.bounds)} for one in found.tasks],
        "population_bounds": _bounds(found.population_bounds),
        "budget": None if found.budget is None else budget_document(found.budget),
        "budget_spent": _finite(found.budget_spent),
        "problems": list(found.problems),
        "head": found.head,
        "entries": found.entries,
        "as_of": found.as_of,
    }


def _described(ledger: Ledger) -> dict[int, Mapping[str, Any]]:
    return {
        int(name): value
        for name, value in (ledger.tasks or {}).items()
        if str(name).isdecimal() and isinstance(value, Mapping)
    }


def _charged(entries: Sequence[Entry]) -> dict[int, TaskReleases]:
    spent: Spent = {}
    for one_round in chain.rounds_of(entries):
        spent = chain.charge(spent, one_round)
    return dict(zip(spent, releases(spent), strict=True))


def _unclaimed(own: Sequence[Entry]) -> Assumption:
    most = max((max(entry.report_goal, entry.contributions) for entry in own), default=1)
    return Assumption(Participation.NO_AMPLIFICATION, max(1, most), max(1, most))


def _asked(
    task: TaskReleases, claimed_delta: float, devices: int | None, delta: float | None
) -> tuple[TaskReleases, tuple[str, ...]]:
    old, asked = task.assumption, []
    if delta is not None and delta != claimed_delta:
        asked.append(f"delta {delta:g} instead of the task's {claimed_delta:g}")
    if devices is not None and devices != old.population:
        if devices < old.report_goal:
            raise OperationFailed(
                Reason.SETTINGS_INVALID,
                f"{devices} devices are fewer than the {old.report_goal} of a round",
                remedy="leave the number of devices out to keep to what the task claims",
            )
        asked.append(f"{devices:,} devices instead of the task's {old.population:,}")
        task = replace(task, assumption=replace(old, population=devices))
    return task, tuple(asked)


def _delta(own: Sequence[Entry]) -> float:
    """Of the newest claim, else of the newest entry."""
    claims = [entry.claim for entry in own if entry.claim is not None]
    return float(claims[-1]["delta"]) if claims else own[-1].delta if own else _DEFAULT_DELTA


def _mechanism(own: Sequence[Entry]) -> str:
    models = [entry.mechanism for entry in own if entry.released == MODEL]
    return models[-1] if models else own[-1].mechanism if own else NO_MECHANISM


def _rounds(own: Sequence[Entry], facts: PlanFacts) -> Iterator[RoundSpending]:
    for entries in chain.rounds_of(own):
        model = next((entry for entry in entries if entry.released == MODEL), entries[0])
        events = tuple(event for entry in entries for event in _events(entry))
        yield RoundSpending(
            iteration_id=model.iteration_id,
            contributions=max(entry.contributions for entry in entries),
            mechanism=model.mechanism,
            clip_norm=model.clip_norm,
            noise_multiplier=_together(_events(model)),
            deviation=_deviation(model, facts),
            epsilon=entries[-1].cumulative_epsilon,
            delta=entries[-1].delta,
            sequence=entries[-1].sequence,
            hash=entries[-1].hash,
            events=events,
        )


def _events(entry: Entry) -> list[Event]:
    return [] if entry.event is None else read_events(entry.event)


def _together(events: Sequence[Event]) -> float | None:
    if len(events) == 1:
        return events[0].noise_multiplier
    return composed_noise_multiplier(GaussianEvent(one.noise_multiplier) for one in events) if events else None


def _deviation(model: Entry, facts: PlanFacts) -> float | None:
    """Of the noise on the sum, or on each node of its tree; an adaptive mechanism's first event is that of the sum."""
    events = _events(model)
    if model.clip_norm is None or not events:
        return None
    scale = events[0].noise_multiplier * model.clip_norm
    if isinstance(events[0], BandedEvent):
        return None if facts.column_norm is None else scale * facts.column_norm
    return scale


def _metric_noise(own: Sequence[Entry]) -> MetricNoise | None:
    noised = [entry for entry in own if entry.released == METRICS and entry.event is not None]
    if not noised:
        return None
    weakest = min(event.noise_multiplier for entry in noised for event in _events(entry))
    return MetricNoise(noised[-1].clip_norm, weakest, len(noised))


def _unprotected(
    entries: Sequence[Entry], described: Mapping[int, Mapping[str, Any]], facts: PlanFacts
) -> Iterator[Unprotected]:
    counts: dict[tuple[int, str], int] = {}
    for entry in entries:
        if entry.mechanism == NO_MECHANISM:
            counts[entry.task_id, entry.released] = counts.get((entry.task_id, entry.released), 0) + 1
    for (task_id, released), count in sorted(
        counts.items(), key=lambda one: (one[0][0], one[0][1] != MODEL, one[0][1])
    ):
        names = facts.metric_names.get(task_id, ()) if released == METRICS else ()
        yield Unprotected(task_id, _text(described, task_id, "kind"), released, count, tuple(names))


def _tasks(
    entries: Sequence[Entry],
    charged: Mapping[int, TaskReleases],
    described: Mapping[int, Mapping[str, Any]],
    delta: float,
    known: Mapping[int, Bounds],
) -> Iterator[TaskSpending]:
    rounds: dict[int, set[int]] = {}
    mechanisms: dict[int, set[str]] = {}
    for entry in entries:
        rounds.setdefault(entry.task_id, set()).add(entry.iteration_id)
        mechanisms.setdefault(entry.task_id, set()).add(entry.mechanism)
    for task_id in sorted(rounds.keys() | described.keys()):
        task = charged.get(task_id)
        yield TaskSpending(
            task_id=task_id,
            kind=_text(described, task_id, "kind"),
            status=_text(described, task_id, "status"),
            rounds=len(rounds.get(task_id, ())),
            mechanisms=tuple(sorted(mechanisms.get(task_id, ()))),
            participation=task.assumption.participation.name if task else "",
            bounds=_bounds_alone(task, delta) if task_id not in known else known[task_id],
        )


def _bounds_alone(task: TaskReleases | None, delta: float) -> Bounds:
    return Bounds(0.0, 0.0) if task is None else epsilon_bounds([task], delta)


def _stored_series(rounds: Sequence[RoundSpending], task: TaskReleases, delta: float) -> tuple[Point, ...] | None:
    """The ledger's own epsilons as a curve; None where it lacks one, or has it at another delta."""
    charged = [one for one in rounds if one.events]
    if any(one.epsilon is None or one.delta != delta for one in charged):
        return None
    step = max(1, -(-len(charged) // _POINTS))
    return tuple(
        Point(
            one.iteration_id,
            one.epsilon or 0.0,
            unamplified_epsilon([TaskReleases(task.rounds[: one.iteration_id], task.assumption)], delta),
        )
        for one in charged[::-1][::step][::-1]
    )


def _text(described: Mapping[int, Mapping[str, Any]], task_id: int, name: str) -> str:
    return str(described.get(task_id, {}).get(name) or "")


def _round_document(one: RoundSpending) -> dict[str, Any]:
    names = ("iteration_id", "contributions", "mechanism", "clip_norm", "noise_multiplier", "deviation", "epsilon")
    return {name: _finite(getattr(one, name)) for name in (*names, "delta", "sequence", "hash")}


def _bounds(bounds: Bounds) -> list[float | None]:
    return [_finite(bounds.lower), _finite(bounds.upper)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
