"""Ledgers as JSON files: they come back as they were, and what is no ledger is refused."""

import json
import tracemalloc
from dataclasses import replace

import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.privacy.budget import Budget, BudgetAssumption
from fedcompute.privacy.chain import Release, chained
from fedcompute.privacy.ledger_document import ledger_document, read_ledger

BUDGET = Budget(8.0, 1e-6, BudgetAssumption.NO_AMPLIFICATION)


@pytest.fixture
def entry():
    event = {"class": "GaussianDpEvent", "noise_multiplier": 0.1 + 0.2}
    release = Release("digits", 1, 1, "model", "FIXED_GAUSSIAN", event, None, 1 / 3, 10, 10, None, 1e-6)
    return chained(None, release, "2026-03-01T12:00:00.000000+00:00")


@pytest.fixture
def document(entry):
    return ledger_document("digits", [entry], BUDGET, {"1": {"kind": "TRAINING"}})


def test_a_ledger_comes_back_from_json_bit_for_bit(document, entry):
    found = read_ledger(json.dumps(document).encode())
    assert (found.population, found.entries, found.budget) == ("digits", (entry,), BUDGET)
    assert found.tasks == {"1": {"kind": "TRAINING"}}


def refused(data):
    with pytest.raises(ArtifactInvalid) as caught:
        read_ledger(data if isinstance(data, bytes) else json.dumps(data).encode(), limit=100_000)
    return caught.value.reason


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[]", b"{}", b'{"version": 2}', b"[" * 90_000, b'{"version": 1}', b" " * 100_001]
)
def test_what_is_no_ledger_is_refused(data):
    assert refused(data) is Reason.LEDGER_MALFORMED


@pytest.mark.parametrize(
    "changes",
    [
        {"population": 1},
        {"entries": None},
        {"entries": [1]},
        {"entries": [{}]},
        {"tasks": []},
    ],
)
def test_a_ledger_of_another_form_is_refused(document, changes):
    assert refused({**document, **changes}) is Reason.LEDGER_MALFORMED


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": "1"},
        {"sequence": True},
        {"task_id": 1.5},
        {"contributions": 2**63},
        {"hash": None},
        {"created": "x" * 5000},
        {"clip_norm": "1"},
        {"cumulative_epsilon": True},
        {"delta": None},
        {"event": []},
        {"event": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": 1}}}}}}}}}},
        {"more": 1},
    ],
)
def test_an_entry_of_another_form_is_refused(document, changes):
    document["entries"][0].update(changes)
    assert refused(document) is Reason.LEDGER_MALFORMED


def test_numbers_that_json_does_not_have_are_refused(document):
    text = json.dumps(document).replace("1e-06", "NaN")
    assert refused(text.encode()) is Reason.LEDGER_MALFORMED


def test_a_budget_of_no_sense_is_refused(document):
    for budget in (
        {},
        [],
        {"epsilon": 1},
        {"epsilon": -1, "delta": 0.1},
        {"epsilon": 1, "delta": 0.1, "assumption": "X"},
    ):
        assert refused({**document, "budget": budget}) is Reason.BUDGET_INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"iteration_id": 2**62},
        {"iteration_id": 10**7 + 1},
        {"iteration_id": 0},
        {"sequence": 10**9 + 1},
        {"contributions": -1},
        {"report_goal": 2**62 + 1},
        {"task_id": -1},
        {"delta": 0},
        {"delta": 1},
        {"mechanism": "\x1b[2J"},
        {"event": {"class": "GaussianDpEvent", "noise_multiplier": 10**400}},
        {"event": {"class": "\ud800"}},
    ],
)
def test_numbers_and_texts_beyond_what_a_ledger_can_hold_are_refused(document, changes):
    document["entries"][0].update(changes)
    assert refused(document) is Reason.LEDGER_MALFORMED


def test_a_name_that_is_there_twice_is_refused_at_every_depth(document):
    text = json.dumps(document)
    for name in ('"version": 1', '"sequence": 1', '"class": "GaussianDpEvent"'):
        assert text.count(name) == 1
        assert refused(text.replace(name, f"{name}, {name}").encode()) is Reason.LEDGER_MALFORMED


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("place", ['"clip_norm": 0.3333333333333333', '"noise_multiplier": 0.30000000000000004'])
def test_numbers_that_are_none_are_refused_wherever_they_stand(document, number, place):
    text = json.dumps(document)
    assert text.count(place) == 1
    assert refused(text.replace(place, f"{place.split(':')[0]}: {number}").encode()) is Reason.LEDGER_MALFORMED


def test_a_ledger_cut_off_anywhere_or_with_more_behind_it_is_refused(document):
    text = json.dumps(document).encode()
    assert read_ledger(b" " + text + b"\n").entries
    for end in range(0, len(text), 7):
        assert refused(text[:end]) is Reason.LEDGER_MALFORMED
    assert refused(text + b"1") is Reason.LEDGER_MALFORMED


def test_entries_of_any_size_come_back(document, entry):
    # Beyond the characters that are looked at first, and with every number at the end of such a piece once.
    for length in (*range(3400, 3500), 4096):
        wide = chained(
            None, replace(entry_release(entry), claim={"text": "x" * length, "number": 123456}), entry.created
        )
        found = read_ledger(json.dumps(ledger_document("digits", [wide] * 2, None, {})).encode())
        assert found.entries == (wide, wide)


def entry_release(entry):
    return Release(**{name: getattr(entry, name) for name in Release.__dataclass_fields__})


@pytest.mark.parametrize(
    "hostile",
    [
        b"[" * 50_000_000,
        b'{"version": 1, "population": "p", "entries": [' + b"[]," * 16_000_000,
        b'{"version": 1, "population": "p", "entries": ' + b'{"a":' * 10_000_000,
        b'{"tasks": [' + b"[]," * 16_000_000,
        b'{"version": 1, "population": "' + b"x" * 50_000_000 + b'"}',
    ],
    ids=["brackets", "entries", "objects", "tasks", "text"],
)
def test_a_large_file_of_another_form_takes_no_more_memory_than_its_text(hostile):
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactInvalid):
            read_ledger(hostile)
        assert tracemalloc.get_traced_memory()[1] < len(hostile) + (200 << 20)
    finally:
        tracemalloc.stop()
    with pytest.raises(ArtifactInvalid, match="more than 10 bytes"):
        read_ledger(hostile, limit=10)
