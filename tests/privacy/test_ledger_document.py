"""Ledgers as JSON files: they come back as they were, and what is no ledger is refused."""

import json

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
