"""Check-ins: which devices get a place in which round (spec/server.md 2.1, 2.4)."""

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select

from fedcompute.storage import schema, transitions
from fedcompute.storage.assignments import CONTRIBUTES_NOTHING, AssignmentRow, assignment_row, chunks
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import IterationRow, get_iteration, iteration_row
from fedcompute.storage.keys import AssignmentKey, IterationKey, TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, STARTED_TASK, AssignmentStatus, IterationStatus, TaskStatus
from fedcompute.storage.tasks import TaskRow, get_task

IDEMPOTENCY_LIFETIME = timedelta(minutes=5)
_PLACE_LIMIT = 99  # the largest status code that holds a place


@dataclass(frozen=True)
class CheckIn:
    """A device that asks for work.

    `idempotency_key`: any text; the caller puts owner, token and request key into it. `token_hash`: what the device's
    reports must match, None where devices need not authenticate. `participant`: who it is across its tokens, None if
    nobody knows; `separations` says for each task that it may join how many rounds lie between two of its
    contributions at least, 0 for any.
    """

    population: str
    client_version: int
    idempotency_key: str | None = None
    correlation_id: str = ""
    token_hash: str | None = field(default=None, repr=False)
    participant: str | None = None
    separations: Mapping[TaskKey, int] = field(default_factory=dict)


class DeclineKind(StrEnum):
    """Why a check-in got no assignment, most hopeful first (spec/server.md 2.1)."""

    ITERATION_FULL = "iteration_full"
    NOT_OPEN = "not_open"
    VERSION_MISMATCH = "version_mismatch"
    NOT_ACTIVE = "not_active"


@dataclass(frozen=True)
class Assigned:
    """A check-in that got a place; `repeated` if an earlier check-in with the same idempotency key had made it."""

    assignment: AssignmentRow
    iteration: IterationRow
    task: TaskRow
    repeated: bool = False


@dataclass(frozen=True)
class Declined:
    """A check-in that got no place."""

    kind: DeclineKind


def assign(tx: Transaction, check_in: CheckIn, now: datetime, *, choose: Callable[[int], int]) -> Assigned | Declined:
    """One check-in; see `assign_all`."""
    return assign_all(tx, [check_in], now, choose=choose)[0]


def assign_all(
    tx: Transaction, check_ins: Sequence[CheckIn], now: datetime, *, choose: Callable[[int], int]
) -> list[Assigned | Declined]:
    """Each finds an iteration with a free place, takes the place and says so; needs a write transaction.

    The answers are those of check-ins that come one after the other in this order; how many questions the database is
    asked does not depend on how many there are, up to some hundred. On PostgreSQL all must be of one population
    (see `lock_population`), else ValueError.

    `choose(n)` draws uniformly from 0..n-1; it is called only if several iterations have room. The chance of each is
    its task's traffic weight; weight 0 is never chosen while a task of another weight is at work, be its round full or
    closed, and all 0 are alike.
    An idempotency key makes a repetition within five minutes return the first answer's assignment, as long as that is
    ASSIGNED and its iteration COLLECTING. An iteration that the participant may not take part in counts as full.

    **Formal guarantees**: for every task in `separations` of a check-in, two assignments of one participant that may
    both count lie at least that many rounds apart; for a task that is not in it the participant gets none. Assumes
    that every check-in of the participant names the same distance or a larger one.
    """
    populations = sorted({one.population for one in check_ins})
    if tx.dialect.name == "postgresql" and len(populations) > 1:
        raise ValueError(f"check-ins of {len(populations)} populations in one transaction")
    for population in populations:
        lock_population(tx, population)
    asking = [_Asking(one) for one in check_ins]
    desk = _Desk(tx, asking, now)
    answers = [desk.standing_answer(one) or desk.give(one, choose) for one in asking]
    desk.write()
    return answers


def standing_answers(tx: Transaction, check_ins: Sequence[CheckIn], now: datetime) -> list[Assigned | Declined | None]:
    """What `assign_all` would answer without writing anything, None for whoever would get a new place; only reads.

    So a population that is full, or has nothing to do, costs no write transaction.
    """
    asking = [_Asking(one) for one in check_ins]
    desk = _Desk(tx, asking, now)
    return [desk.standing_answer(one) for one in asking]


def forget_idempotency(tx: Transaction, now: datetime) -> int:
    """Deletes expired idempotency keys; returns how many."""
    table = schema.idempotency
    return tx.execute(delete(table).where(table.c.expires <= now)).rowcount


def has_room(tx: Transaction, iteration: IterationRow) -> bool:
    """Whether fewer assignments than its maximum hold a place in the iteration."""
    return free_places(tx, iteration) > 0


def free_places(tx: Transaction, iteration: IterationRow) -> int:
    """How many more assignments the iteration takes; not negative."""
    taken = tx.execute(_TAKEN, _iteration_columns(iteration.key)).scalar_one()
    return max(0, iteration.max_aggregation_size - taken)


@dataclass(frozen=True)
class _Candidate:
    """An active iteration of a started task."""

    iteration: IterationRow
    weight: int
    is_open: bool
    is_paused: bool

    def fits(self, client_version: int) -> bool:
        return self.is_open and self.admits(client_version)

    def admits(self, client_version: int) -> bool:
        low, high = int(self.iteration.min_client_version), int(self.iteration.max_client_version)
        return low <= client_version <= high


class _Asking:
    """A check-in and what is worked out about it once."""

    def __init__(self, check_in: CheckIn) -> None:
        self.check_in = check_in
        self.key_hash = None if check_in.idempotency_key is None else _key_hash(check_in)


class _Desk:
    """What one transaction knows about the check-ins before it, and the places that it has given away.

    Asks the database for each thing once, when the first check-in needs it.
    """

    def __init__(self, tx: Transaction, asking: Sequence[_Asking], now: datetime) -> None:
        self._tx = tx
        self._now = now
        self._candidates: dict[str, list[_Candidate]] = {}
        self._fitting: dict[tuple[str, int], list[_Candidate]] = {}
        self._free: dict[IterationKey, int] = {}
        self._closed: dict[str, bool] = {}
        self._tasks: dict[TaskKey, TaskRow] = {}
        self._rows: list[dict[str, Any]] = []
        self._given: dict[str, str] = {}  # idempotency key's hash -> session
        self._repeatable = self._find_repeatable([one.key_hash for one in asking if one.key_hash is not None])
        self._newest = self._find_participations([one.check_in for one in asking])

    def standing_answer(self, asking: _Asking) -> Assigned | Declined | None:
        """The assignment that the check-in repeats, or why there is none for it; None if there is a place."""
        if asking.key_hash is not None and (earlier := self._repeatable.get(asking.key_hash)) is not None:
            return earlier
        one = asking.check_in
        if self._open_to(one):
            return None
        candidates = self._of_population(one.population)
        fitting = any(candidate.fits(one.client_version) for candidate in candidates)
        return Declined(_decline_kind(bool(candidates), self._is_closed(one.population), fitting))

    def give(self, asking: _Asking, choose: Callable[[int], int]) -> Assigned:
        """Gives a place to a check-in for which there is one; `write` stores it."""
        one = asking.check_in
        iteration = _weighted(self._open_to(one), choose)
        key, session_id = iteration.key, str(uuid.uuid4())
        self._free[key] -= 1
        self._rows.append(
            {
                **_iteration_columns(key),
                "session_id": session_id,
                "correlation_id": one.correlation_id,
                "token_hash": one.token_hash,
                "participant": one.participant,
            }
        )
        assignment = AssignmentRow(
            key=AssignmentKey(key, session_id),
            status=AssignmentStatus.ASSIGNED,
            created=self._now,
            entered=self._now,
            correlation_id=one.correlation_id,
            batch_id=None,
            rejection=None,
            token_hash=one.token_hash,
            participant=one.participant,
        )
        task = self._task(key.task)
        if asking.key_hash is not None:
            self._given[asking.key_hash] = session_id
            self._repeatable[asking.key_hash] = Assigned(assignment, iteration, task, repeated=True)
        if one.participant is not None:
            newest = self._newest.get((one.participant, key.task), 0)
            self._newest[one.participant, key.task] = max(key.iteration_id, newest)
        return Assigned(assignment, iteration, task)

    def write(self) -> None:
        """Stores what was given away."""
        if self._rows:
            transitions.enter_all(self._tx, transitions.ASSIGNMENT, self._rows, AssignmentStatus.ASSIGNED, self._now)
        if self._given:
            for chunk in chunks(list(self._given)):
                self._tx.execute(_FORGET, {"hashes": chunk})
            expires = self._now + IDEMPOTENCY_LIFETIME
            remembered = [
                {"key_hash": key_hash, "session_id": session_id, "expires": expires}
                for key_hash, session_id in self._given.items()
            ]
            self._tx.execute(insert(schema.idempotency), remembered)

    def _open_to(self, one: CheckIn) -> list[tuple[IterationRow, int]]:
        """The iterations with a place for this check-in: of rounds of one task that overlap the first only.

        So the task counts once.
        """
        first: dict[TaskKey, tuple[IterationRow, int]] = {}
        for candidate in self._fitting_version(one.population, one.client_version):
            key = candidate.iteration.key
            if key.task not in first and self._places(candidate.iteration) > 0 and self._may_participate(one, key):
                first[key.task] = candidate.iteration, candidate.weight
        return list(first.values())

    def _fitting_version(self, population: str, version: int) -> list[_Candidate]:
        """The candidates for devices of a version, apart from their places.

        Where a task of weight above 0 is at work for such devices, with or without a place, those of weight 0 have
        none.
        """
        if (population, version) not in self._fitting:
            candidates = self._of_population(population)
            weights = [one.weight for one in candidates if not one.is_paused and one.admits(version)]
            least = min(1, max(weights, default=0))
            self._fitting[population, version] = [
                one for one in candidates if one.weight >= least and one.fits(version)
            ]
        return self._fitting[population, version]

    def _places(self, iteration: IterationRow) -> int:
        if iteration.key not in self._free:
            self._free[iteration.key] = free_places(self._tx, iteration)
        return self._free[iteration.key]

    def _may_participate(self, one: CheckIn, key: IterationKey) -> bool:
        if one.participant is None:
            return True
        separation = one.separations.get(key.task)
        if separation is None or separation <= 0:
            return separation == 0
        newest = self._newest.get((one.participant, key.task))
        return newest is None or newest <= key.iteration_id - separation

    def _of_population(self, population: str) -> list[_Candidate]:
        if population not in self._candidates:
            self._candidates[population] = _candidates(self._tx, population)
        return self._candidates[population]

    def _is_closed(self, population: str) -> bool:
        """Whether a task is at work, or could be, without taking devices now: worth asking again."""
        if population not in self._closed:
            candidates = self._of_population(population)
            at_work = {one.iteration.key.task_id for one in candidates}
            self._closed[population] = not all(one.is_open for one in candidates) or not at_work.issuperset(
                _started_tasks(self._tx, population)
            )
        return self._closed[population]

    def _task(self, key: TaskKey) -> TaskRow:
        if key not in self._tasks:
            task = get_task(self._tx, key)
            assert task is not None, "an iteration's foreign key is its task"
            self._tasks[key] = task
        return self._tasks[key]

    def _find_repeatable(self, hashes: Sequence[str]) -> dict[str, Assigned]:
        rows = [
            row
            for chunk in chunks(hashes)
            for row in self._tx.execute(_REPEATABLE, {"hashes": chunk, "now": self._now})
        ]
        found: dict[str, Assigned] = {}
        iterations: dict[IterationKey, IterationRow | None] = {}
        for row in rows:
            assignment = assignment_row(row)
            if assignment.status is not AssignmentStatus.ASSIGNED:
                continue
            key = assignment.key.iteration
            if key not in iterations:
                iterations[key] = get_iteration(self._tx, key)
            iteration = iterations[key]
            assert iteration is not None, "an assignment's foreign key is its iteration"
            task = self._task(key.task)
            if iteration.status is IterationStatus.COLLECTING and task.status in STARTED_TASK:
                found[row.key_hash] = Assigned(assignment, iteration, task, repeated=True)
        return found

    def _find_participations(self, check_ins: Sequence[CheckIn]) -> dict[tuple[str, TaskKey], int]:
        """The newest round of each participant and task in which it may have contributed, or may yet."""
        table = schema.assignment
        found: dict[tuple[str, TaskKey], int] = {}
        for population in sorted({one.population for one in check_ins if one.participant is not None}):
            named = {one.participant for one in check_ins if one.population == population and one.participant}
            for chunk in chunks(sorted(named)):
                query = (
                    select(table.c.participant, table.c.task_id, func.max(table.c.iteration_id).label("newest"))
                    .where(
                        table.c.participant.in_(chunk),
                        table.c.population_name == population,
                        table.c.status.not_in([int(status) for status in CONTRIBUTES_NOTHING]),
                    )
                    .group_by(table.c.participant, table.c.task_id)
                )
                for row in self._tx.execute(query):
                    found[row.participant, TaskKey(population, row.task_id)] = row.newest
        return found


def _candidates(tx: Transaction, population: str) -> list[_Candidate]:
    found = []
    for row in tx.execute(_CANDIDATES, {"population": population}):
        iteration = iteration_row(row)
        is_open = iteration.status is IterationStatus.COLLECTING and row.task_status == TaskStatus.OPEN
        is_paused = row.task_status == TaskStatus.PAUSED
        found.append(_Candidate(iteration, iteration.info.task_info.traffic_weight, is_open, is_paused))
    return found


def _started_tasks(tx: Transaction, population: str) -> set[int]:
    # One without a round is between two, before its start time, or an evaluation that waits for a model.
    return set(tx.execute(_STARTED, {"population": population}).scalars())


def _iteration_columns(key: IterationKey) -> dict[str, Any]:
    return dict(
        zip(schema.ITERATION_COLUMNS, (key.population, key.task_id, key.iteration_id, key.attempt_id), strict=True)
    )


def _decline_kind(any_candidate: bool, any_closed: bool, any_fitting: bool) -> DeclineKind:
    if any_fitting:
        return DeclineKind.ITERATION_FULL
    if any_closed:
        return DeclineKind.NOT_OPEN
    return DeclineKind.VERSION_MISMATCH if any_candidate else DeclineKind.NOT_ACTIVE


def _weighted(free: Sequence[tuple[IterationRow, int]], choose: Callable[[int], int]) -> IterationRow:
    if len(free) == 1:
        return free[0][0]
    total = sum(weight for _, weight in free)
    if total == 0:
        return free[choose(len(free))][0]
    drawn = choose(total)
    for iteration, weight in free:
        if drawn < weight:
            return iteration
        drawn -= weight
    raise ValueError("choose(n) must draw from 0..n-1")


def _key_hash(one: CheckIn) -> str:
    return hashlib.sha256(f"{one.population}/{one.idempotency_key}".encode()).hexdigest()


# Made once: to build a question takes as long as to ask it.
_ITERATION, _TASK, _ASSIGNMENT, _KEYS = schema.iteration.c, schema.task.c, schema.assignment.c, schema.idempotency.c
_STARTED = select(_TASK.task_id).where(
    _TASK.population_name == bindparam("population"), _TASK.status.in_([int(status) for status in STARTED_TASK])
)
_CANDIDATES = (
    select(schema.iteration, _TASK.status.label("task_status"))
    .join(schema.task, (_TASK.population_name == _ITERATION.population_name) & (_TASK.task_id == _ITERATION.task_id))
    .where(
        _ITERATION.population_name == bindparam("population"),
        _ITERATION.status.in_([int(status) for status in ACTIVE_ITERATION]),
        _TASK.status.in_([int(status) for status in STARTED_TASK]),
    )
    .order_by(_ITERATION.task_id, _ITERATION.iteration_id, _ITERATION.attempt_id)
)
_TAKEN = select(func.count()).where(
    *(_ASSIGNMENT[name] == bindparam(name) for name in schema.ITERATION_COLUMNS), _ASSIGNMENT.status <= _PLACE_LIMIT
)
# Of any status: asked for one, PostgreSQL looks through all assignments that have it, as many as a round has devices.
_REPEATABLE = (
    select(schema.assignment, _KEYS.key_hash)
    .join(schema.idempotency, _KEYS.session_id == _ASSIGNMENT.session_id)
    .where(_KEYS.key_hash.in_(bindparam("hashes", expanding=True)), _KEYS.expires > bindparam("now"))
)
_FORGET = delete(schema.idempotency).where(_KEYS.key_hash.in_(bindparam("hashes", expanding=True)))
