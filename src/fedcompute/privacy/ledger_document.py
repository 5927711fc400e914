"""A population's ledger as JSON: what the server hands out, a reviewer keeps and `fedcompute privacy verify` reads."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.privacy.budget import Budget, BudgetAssumption
from fedcompute.privacy.chain import Entry

VERSION = 1
BYTES_LIMIT = 1 << 30
ENTRIES_LIMIT = 1_000_000
TEXT_LIMIT = 4096
_NESTING = 8
_TEXTS = ("population", "released", "mechanism", "created", "previous_hash", "hash")
_NUMBERS = ("sequence", "task_id", "iteration_id", "report_goal", "contributions")
_NAMES = frozenset(field.name for field in fields(Entry))


@dataclass(frozen=True)
class Ledger:
    """A population's entries in their order, its present budget, and what is known of its tasks (by id, as text)."""

    population: str
    entries: tuple[Entry, ...]
    budget: Budget | None = None
    tasks: Mapping[str, Any] | None = None


def ledger_document(
    population: str, entries: Iterable[Entry], budget: Budget | None, tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of a ledger, or of a page of it.

    Formal guarantees: it holds what `chain.entry_hash` hashes, number for number, and nothing about single devices.
    """
    return {
        "version": VERSION,
        "population": population,
        "entries": [entry_document(entry) for entry in entries],
        "budget": None if budget is None else budget_document(budget),
        "tasks": dict(tasks),
    }


def entry_document(entry: Entry) -> dict[str, Any]:
    """One entry; names are those of `Entry`, an infinite epsilon is null.

    Formal guarantees: reading it back gives an equal entry, hence the same hash.
    """
    return asdict(entry)


def budget_document(budget: Budget) -> dict[str, Any]:
    """A budget; names are those of `Budget`.

    Formal guarantees: none; a budget is a limit, and `server` keeps to it.
    """
    return {"epsilon": budget.epsilon, "delta": budget.delta, "assumption": budget.assumption.value}


def read_ledger(data: bytes, *, limit: int = BYTES_LIMIT) -> Ledger:
    """Reads a ledger document of at most `limit` bytes; judges its form, not its chain.

    Raises ArtifactInvalid (LEDGER_MALFORMED | BUDGET_INVALID) for anything else.

    Formal guarantees: none before `chain.verify_chain` and `chain.verify_epsilons` had no findings.
    """
    if len(data) > limit:
        raise _malformed(f"it has {len(data)} bytes, at most {limit} are read")
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _malformed("it is no JSON text") from None
    if not isinstance(document, dict):
        raise _malformed("it is no JSON object")
    return ledger_from(document)


def ledger_from(document: Mapping[str, Any]) -> Ledger:
    """Reads a parsed document, as `read_ledger`.

    Formal guarantees: as `read_ledger`.
    """
    if document.get("version") != VERSION:
        raise _malformed(f"version {document.get('version')!r} is not {VERSION}")
    population, entries, tasks = document.get("population"), document.get("entries"), document.get("tasks")
    if not isinstance(population, str) or len(population) > TEXT_LIMIT:
        raise _malformed("it names no population")
    if not isinstance(entries, list) or len(entries) > ENTRIES_LIMIT:
        raise _malformed(f"it holds no list of at most {ENTRIES_LIMIT} entries")
    if not isinstance(tasks, (dict, type(None))):
        raise _malformed("its tasks are no object")
    budget = document.get("budget")
    return Ledger(
        population=population,
        entries=tuple(_entry(place, entry) for place, entry in enumerate(entries, 1)),
        budget=None if budget is None else budget_from(budget),
        tasks=tasks,
    )


def budget_from(document: Any) -> Budget:
    """Reads `budget_document`; a missing assumption is CLAIMED.

    Raises ArtifactInvalid (BUDGET_INVALID) for another form and for numbers that are no budget.

    Formal guarantees: epsilon is positive and finite, delta lies between 0 and 1.
    """
    try:
        budget = Budget(
            _number(document["epsilon"]),
            _number(document["delta"]),
            BudgetAssumption(document.get("assumption", BudgetAssumption.CLAIMED.value)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise ArtifactInvalid(
            Reason.BUDGET_INVALID, "a budget has two numbers, epsilon and delta, and CLAIMED or NO_AMPLIFICATION"
        ) from cause
    if problems := budget.problems():
        raise ArtifactInvalid(Reason.BUDGET_INVALID, "; ".join(problems))
    return budget


def _entry(place: int, document: Any) -> Entry:
    if not isinstance(document, dict) or document.keys() != _NAMES:
        raise _malformed(f"entry {place} in its list does not have the fields of an entry")
    try:
        for name in _TEXTS:
            if not isinstance(document[name], str) or len(document[name]) > TEXT_LIMIT:
                raise ValueError(name)
        for name in _NUMBERS:
            if not isinstance(document[name], int) or isinstance(document[name], bool) or abs(document[name]) >= 2**63:
                raise ValueError(name)
        for name in ("clip_norm", "cumulative_epsilon"):
            if document[name] is not None:
                _number(document[name])
        _number(document["delta"])
        for name in ("event", "claim"):
            if document[name] is not None and not isinstance(document[name], dict):
                raise ValueError(name)
            _check_nesting(document[name], _NESTING)
    except ValueError as cause:
        raise _malformed(f"entry {place} in its list has no proper {cause}") from cause
    return Entry(**document)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("number")
    return float(value)


def _check_nesting(value: Any, left: int) -> None:
    if left == 0:
        raise ValueError("nesting")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nesting(part, left - 1)


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.LEDGER_MALFORMED, f"the ledger cannot be read: {detail}")
