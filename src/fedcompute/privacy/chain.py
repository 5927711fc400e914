"""The ledger of a population: one entry per thing released, each chained by its hash to the one before.

Whoever has noted a head (the last hash) can tell later whether any entry up to it was changed, removed, added or moved.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from fedcompute.errors import ArtifactInvalid
from fedcompute.privacy import budget
from fedcompute.privacy.charges import Spent, assumption_of, charged, releases, unprotected
from fedcompute.privacy.composition import TaskReleases
from fedcompute.privacy.ledger import Event, read_events

GENESIS = 64 * "0"
"""The head of a ledger without entries, and `previous_hash` of the first one."""

MODEL, METRICS, ZEROED_COUNT = "model", "metrics", "zeroed_count"
RELEASED = (MODEL, METRICS, ZEROED_COUNT)
NO_MECHANISM, METRIC_MECHANISM = "NONE", "METRIC_GAUSSIAN"


@dataclass(frozen=True)
class Release:
    """One thing that a round released about its devices.

    `released`: one of `RELEASED`; `mechanism`: NONE, or what made the noise; `event`: what an accountant is told, a
    document of `privacy.ledger`, None where nothing is charged (a mechanism NONE that is outside epsilon, or a part of
    what another entry of the round is charged for); `claim`: how devices were said to come, a document with
    participation, estimated_population, minimum_separation, report_goal, delta, or None; `clip_norm`: L2, None where
    nothing is clipped; `report_goal`, `contributions`: devices. `cumulative_epsilon`: of the whole population at
    `delta`, after all that the round releases, None where it is infinite or was not computed.
    """

    population: str
    task_id: int
    iteration_id: int
    released: str
    mechanism: str
    event: Mapping[str, Any] | None
    claim: Mapping[str, Any] | None
    clip_norm: float | None
    report_goal: int
    contributions: int
    cumulative_epsilon: float | None
    delta: float


@dataclass(frozen=True)
class Entry(Release):
    """A release in its place of the chain; `created` is ISO 8601 text in UTC, hashes are SHA-256 in hex."""

    sequence: int
    created: str
    previous_hash: str
    hash: str


def chained(previous: Entry | None, release: Release, created: str) -> Entry:
    """The entry of `release` after `previous` (None: the first one).

    Formal guarantees: see `entry_hash`.
    """
    fields = {
        **release.__dict__,
        "sequence": 1 if previous is None else previous.sequence + 1,
        "created": created,
        "previous_hash": GENESIS if previous is None else previous.hash,
    }
    return Entry(**fields, hash=_digest(fields))


def entry_hash(entry: Entry) -> str:
    """SHA-256, in hex, over all fields but `hash` as canonical JSON: ASCII, sorted names, no spaces, shortest numbers.

    Formal guarantees: under collision resistance of SHA-256 two entries have one hash only if they are equal, and, as
    each holds the hash before it, only if all entries before them are equal too.
    """
    fields = asdict(entry)
    del fields["hash"]
    return _digest(fields)


def head(entries: Sequence[Entry]) -> str:
    """The hash to note down: it stands for every entry so far.

    Formal guarantees: two ledgers have one head only if they are equal (collision resistance of SHA-256).
    """
    return entries[-1].hash if entries else GENESIS


def verify_chain(entries: Sequence[Entry], *, noted: str | None = None, after: Entry | None = None) -> list[str]:
    """What is wrong with a population's ledger, one plain sentence per finding; empty if the chain is whole.

    `noted`: a head that was seen earlier, which must still be in the chain. `after`: the entry before the first of
    `entries`, where these are a part of the ledger; it is believed.

    Formal guarantees: without findings the entries are, up to the noted head, those of the moment when it was noted
    (collision resistance of SHA-256), and those behind `after` follow from it. Entries cut off behind the noted head,
    or a chain made anew from the start when no head was noted, cannot be told from the ledger alone.
    """
    problems: list[str] = []
    before = after
    seen: dict[tuple[int, int, str], int] = {}
    for entry in entries:
        problems += _position(before, entry)
        if entry.hash != entry_hash(entry):
            problems.append(f"entry {entry.sequence} was changed: its content does not have the hash that it carries")
        name = (entry.task_id, entry.iteration_id, entry.released)
        if name in seen:
            problems.append(
                f"round {entry.iteration_id} of task {entry.task_id} has two entries for its {entry.released}: "
                f"{seen[name]} and {entry.sequence}"
            )
        seen.setdefault(name, entry.sequence)
        if entry.population != entries[0].population:
            problems.append(f"entry {entry.sequence} belongs to population {entry.population}")
        before = entry
    if noted is not None and noted != GENESIS and all(entry.hash != noted for entry in entries):
        problems.append(f"the noted head {noted} is not in the chain: entries were cut off, changed or replaced")
    return problems


def rounds_of(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """The entries of one round after the other; a round is released at once, so that its entries stand together.

    Formal guarantees: every entry is in one of the groups, in its place.
    """
    for _, group in groupby(entries, key=lambda entry: (entry.task_id, entry.iteration_id)):
        yield list(group)


def charge(spent: Spent, round_entries: Sequence[Entry]) -> Spent:
    """`spent` after one more round of the ledger; raises ArtifactInvalid for entries that cannot be read.

    Formal guarantees: all events of the round are charged, as one round of one task; see `charges.charged`.
    """
    events: list[Event] = []
    for entry in round_entries:
        if entry.event is not None:
            events += read_events(entry.event)
    if not events:
        return spent
    first = next(entry for entry in round_entries if entry.event is not None)
    assumption = assumption_of(first.claim, first.report_goal, max(one.contributions for one in round_entries))
    return charged(spent, first.task_id, first.iteration_id, events, assumption)


def tasks_of(entries: Iterable[Entry]) -> list[TaskReleases]:
    """What the entries charge, task by task, as accountants take it.

    Raises ArtifactInvalid (STATE_MISMATCH | LEDGER_MALFORMED) for an event or a claim of no known form.

    Formal guarantees: every entry with an event is in the result. A task of which an entry has no claim is taken to
    assume nothing about its devices.
    """
    spent: Spent = {}
    for one_round in rounds_of(entries):
        spent = charge(spent, one_round)
    return releases(spent)


def verify_events(entries: Sequence[Entry]) -> list[str]:
    """The entries whose mechanism, event and claim do not fit together or cannot be read, one sentence for each.

    Formal guarantees: without findings every model is charged for, and so is every noised metric.
    """
    problems: list[str] = []
    for one_round in rounds_of(entries):
        for entry in one_round:
            problems += _event_problems(entry, one_round)
    return problems


def verify_epsilons(entries: Sequence[Entry], progress: Callable[[int], None] = lambda entries: None) -> list[str]:
    """Recomputes every cumulative epsilon from the events and claims alone; one plain sentence per wrong one.

    A stored value is right if it is not below the exact value of what the population has released up to and with its
    round, to 1e-6 of it, and not more than 1 % above the proven upper bound (see `budget.is_cumulative`); None stands
    for infinite, and in a round without a claim for not computed. A round that charges nothing repeats the value
    before it. `progress` is told how many entries are done, round by round: each takes a fraction of a second.

    Formal guarantees: without findings every stored value is at least the epsilon, under the claims, of all releases
    up to its round, at the entry's delta, but for 1e-6 of it; adjacency as in `composition.epsilon`.
    """
    problems: list[str] = []
    spent: Spent = {}
    before: Entry | None = None
    for one_round in rounds_of(entries):
        try:
            after = charge(spent, one_round)
        except ArtifactInvalid as error:
            return [*problems, f"entry {one_round[0].sequence} cannot be accounted for: {error.detail}"]
        last = one_round[-1]
        stored = {(entry.cumulative_epsilon, entry.delta) for entry in one_round}
        if len(stored) > 1:
            problems.append(f"entries {one_round[0].sequence} to {last.sequence} are one round and disagree on epsilon")
        elif after is not spent:
            charging = next(entry for entry in one_round if entry.event is not None)
            problems += _wrong_epsilon(charging, releases(after))
        elif stored != {(before.cumulative_epsilon if before else 0.0, before.delta if before else last.delta)}:
            problems.append(f"entry {last.sequence} charges nothing and yet changes epsilon")
        spent, before = after, last
        progress(len(one_round))
    return problems


def _event_problems(entry: Entry, one_round: Sequence[Entry]) -> list[str]:
    what = f"entry {entry.sequence} ({entry.released} of round {entry.iteration_id} of task {entry.task_id})"
    if entry.released not in RELEASED:
        return [f"{what} is of no known kind"]
    try:
        events = [] if entry.event is None else read_events(entry.event)
        assumption_of(entry.claim, entry.report_goal, entry.contributions)
    except ArtifactInvalid as error:
        return [f"{what} cannot be read: {error.detail}"]
    if entry.event is not None and not events:
        return [f"{what} has an event that charges nothing"]
    if entry.released == MODEL and entry.event is None:
        return [f"{what} is not charged for"]
    if entry.mechanism == NO_MECHANISM and entry.event is not None and not unprotected(events):
        return [f"{what} is charged for noise, but names no mechanism"]
    charged_beside = any(one.event is not None for one in one_round if one.released == METRICS)
    if entry.mechanism == METRIC_MECHANISM and not charged_beside:
        return [f"{what} names a mechanism, but nothing is charged for it"]
    return []


def _wrong_epsilon(entry: Entry, tasks: Sequence[TaskReleases]) -> list[str]:
    if entry.cumulative_epsilon is None and entry.claim is None:
        return []
    stored = math.inf if entry.cumulative_epsilon is None else entry.cumulative_epsilon
    right, value = budget.is_cumulative(stored, tasks, entry.delta)
    if right:
        return []
    return [
        f"entry {entry.sequence} says epsilon {stored:.6g} at delta {entry.delta:g}, but what was released up to its "
        f"round comes to {value:.6g}"
    ]


def _position(before: Entry | None, entry: Entry) -> list[str]:
    expected = 1 if before is None else before.sequence + 1
    if entry.sequence > expected:
        what = (
            f"entry {expected} is"
            if entry.sequence == expected + 1
            else f"entries {expected} to {entry.sequence - 1} are"
        )
        return [f"{what} missing before entry {entry.sequence}"]
    if entry.sequence < expected:
        return [f"entry {entry.sequence} stands after entry {expected - 1}: it was moved or is there twice"]
    if entry.previous_hash != (GENESIS if before is None else before.hash):
        place = "the beginning" if before is None else f"entry {before.sequence}"
        return [f"entry {entry.sequence} does not follow {place}: it names another hash before it"]
    return []


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
