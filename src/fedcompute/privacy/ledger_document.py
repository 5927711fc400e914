"""A population's ledger as JSON: what the server hands out, a reviewer keeps and `fedcompute privacy verify` reads."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.privacy.budget import Budget, BudgetAssumption
from fedcompute.privacy.chain import Entry

VERSION = 1
BYTES_LIMIT = 1 << 28
ENTRIES_LIMIT = 1_000_000
TEXT_LIMIT = 4096
# Characters of one entry, first as it nearly always is, and of what stands beside the entries.
_ENTRY_SIZES, _BESIDE_SIZES = (1 << 12, 1 << 17), (1 << 12, 1 << 22)
_NESTING = 8
_TEXTS = ("population", "released", "mechanism", "created", "previous_hash", "hash")
# The least and the greatest of each: a database's columns hold no more, and no task has so many rounds.
_NUMBERS = {
    "sequence": (1, 10**9),
    "task_id": (0, 2**62),
    "iteration_id": (1, 10**7),
    "report_goal": (0, 2**62),
    "contributions": (0, 2**62),
}
_MOST = 1e300
_SPACE = " \t\n\r"
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

    Entries are read one by one, so that a file of another form is refused before it takes more memory than its text.
    Raises ArtifactInvalid (LEDGER_MALFORMED | BUDGET_INVALID) for anything else.

    Formal guarantees: none; a ledger counts for what `chain.verify_chain` and `chain.verify_epsilons` say of it.
    """
    if len(data) > limit:
        raise _malformed(f"it has more than {limit} bytes")
    try:
        document = _Reader(data.decode()).document()
    except (ValueError, RecursionError):
        raise _malformed("it is no JSON text of a ledger") from None
    return ledger_from(document)


def ledger_from(document: Mapping[str, Any]) -> Ledger:
    """Reads a parsed document, as `read_ledger`.

    Formal guarantees: as `read_ledger`.
    """
    if document.get("version") != VERSION:
        raise _malformed(f"its version is not {VERSION}")
    population, entries, tasks = document.get("population"), document.get("entries"), document.get("tasks")
    if not isinstance(population, str) or not _is_text(population):
        raise _malformed("it names no population")
    if not isinstance(entries, list) or len(entries) > ENTRIES_LIMIT:
        raise _malformed(f"it holds no list of at most {ENTRIES_LIMIT} entries")
    if not isinstance(tasks, (dict, type(None))):
        raise _malformed("its tasks are no object")
    budget = document.get("budget")
    return Ledger(
        population=population,
        entries=tuple(
            entry if isinstance(entry, Entry) else _entry(place, entry) for place, entry in enumerate(entries, 1)
        ),
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
            if not _is_text(document[name]):
                raise ValueError(name)
        for name, (least, most) in _NUMBERS.items():
            number = document[name]
            if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
                raise ValueError(name)
        for name in ("clip_norm", "cumulative_epsilon"):
            if document[name] is not None:
                _number(document[name])
        if not 0 < _number(document["delta"]) < 1:
            raise ValueError("delta")
        for name in ("event", "claim"):
            if document[name] is not None and not isinstance(document[name], dict):
                raise ValueError(name)
            _check_nesting(document[name], _NESTING)
    except ValueError as cause:
        raise _malformed(f"entry {place} in its list has no proper {cause}") from cause
    return Entry(**document)


class _Reader:
    """A cursor over the text of a ledger's file. Methods raise ValueError where it is no JSON or too large."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._decoder = json.JSONDecoder(
            parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded, object_pairs_hook=_once_each
        )

    def document(self) -> dict[str, Any]:
        """The whole file; its entries as `Entry`."""
        found: dict[str, Any] = {}
        self._expect("{")
        while True:
            name = self._value(_BESIDE_SIZES)
            if not isinstance(name, str) or name in found:
                raise ValueError("name")
            self._expect(":")
            found[name] = self._entries() if name == "entries" else self._value(_BESIDE_SIZES)
            if self._expect(",}") == "}":
                break
        if self._next():
            raise ValueError("more text")
        return found

    def _entries(self) -> Any:
        if self._next() != "[":
            return self._value(_BESIDE_SIZES)
        self._expect("[")
        entries: list[Entry] = []
        if self._next() == "]":
            self._expect("]")
            return entries
        while len(entries) < ENTRIES_LIMIT:
            entries.append(_entry(len(entries) + 1, self._value(_ENTRY_SIZES)))
            if self._expect(",]") == "]":
                return entries
        raise _malformed(f"it holds no list of at most {ENTRIES_LIMIT} entries")

    def _next(self) -> str:
        while self._at < len(self._text) and self._text[self._at] in _SPACE:
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _expect(self, characters: str) -> str:
        found = self._next()
        if not found or found not in characters:
            raise ValueError(found)
        self._at += 1
        return found

    def _value(self, sizes: tuple[int, int]) -> Any:
        self._next()
        for size in sizes:
            piece = self._text[self._at : self._at + size]
            try:
                value, length = self._decoder.raw_decode(piece)
            except json.JSONDecodeError:
                continue
            # A number at the end of the piece may go on behind it.
            if length < len(piece) or self._at + length == len(self._text):
                self._at += length
                return value
        raise ValueError("value")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST:
        raise ValueError("number")
    return float(value)


def _is_text(value: Any) -> bool:
    """Whether it may be printed: no control characters, no halves of characters."""
    return isinstance(value, str) and len(value) <= TEXT_LIMIT and value.isprintable()


def _check_nesting(value: Any, left: int) -> None:
    if left == 0:
        raise ValueError("nesting")
    if isinstance(value, (int, float)) and not abs(value) <= _MOST:
        raise ValueError("number")
    if isinstance(value, str) and not _is_text(value):
        raise ValueError("text")
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nesting(part, left - 1)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _finite(text: str) -> float:
    return _number(float(text))


def _bounded(text: str) -> int:
    if len(text) > 20:
        raise ValueError("number")
    return int(text)


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.LEDGER_MALFORMED, f"the ledger cannot be read: {detail}")
