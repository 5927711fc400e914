"""The chained ledger: what tampering it shows, and that its epsilons are recomputed from events and claims alone."""

import hashlib
import json
import math
import time
import tracemalloc
from dataclasses import asdict, replace

import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.privacy import bounds
from fedcompute.privacy.accounting import gaussian_epsilon, poisson_epsilon
from fedcompute.privacy.budget import cumulative_epsilon
from fedcompute.privacy.chain import (
    GENESIS,
    Entry,
    Release,
    chained,
    entry_hash,
    head,
    tasks_of,
    verify_chain,
    verify_epsilons,
    verify_events,
)
from fedcompute.privacy.charges import Charges, Run, assumption_of, charged, releases
from fedcompute.privacy.composition import epsilon
from fedcompute.privacy.ledger import BandedEvent, GaussianEvent, TreeEvent, events_document, read_events
from fedcompute.privacy.mechanisms import mechanisms_of
from fedcompute.privacy.participation import Assumption, Participation

DELTA = 1e-6
POISSON = {
    "participation": "POISSON",
    "estimated_population": 1000,
    "minimum_separation": 0,
    "report_goal": 10,
    "delta": DELTA,
}
GAUSSIAN = (GaussianEvent(2.0),)
ALWAYS = {**POISSON, "participation": "NO_AMPLIFICATION"}


def release(task_id, iteration_id, epsilon, *, released="model", events=GAUSSIAN, claim=ALWAYS, **changes):
    fields = {
        "population": "digits",
        "task_id": task_id,
        "iteration_id": iteration_id,
        "released": released,
        "mechanism": "FIXED_GAUSSIAN" if events else "NONE",
        "event": events_document(events) if events else None,
        "claim": claim if events else None,
        "clip_norm": 0.3 if events else None,
        "report_goal": 10,
        "contributions": 10,
        "cumulative_epsilon": epsilon,
        "delta": DELTA,
    }
    return Release(**{**fields, **changes})


def chain_of(all_releases):
    entries: list[Entry] = []
    for number, one in enumerate(all_releases):
        entries.append(chained(entries[-1] if entries else None, one, f"2026-03-01T12:00:{number:02}.000000+00:00"))
    return entries


def rechained(entries):
    """The same releases under hashes that fit: what a patient forger writes."""
    fresh: list[Entry] = []
    for entry in entries:
        fields = {name: value for name, value in asdict(entry).items() if name in Release.__dataclass_fields__}
        fresh.append(chained(fresh[-1] if fresh else None, Release(**fields), entry.created))
    return fresh


def epsilon_after(rounds):
    return gaussian_epsilon(2.0 / math.sqrt(rounds), DELTA)


@pytest.fixture
def entries():
    """Three rounds of one task, each a model and its metrics, then a round of an evaluation."""
    found = []
    for number in (1, 2, 3):
        found.append(release(1, number, epsilon_after(number)))
        found.append(release(1, number, epsilon_after(number), released="metrics", events=()))
    found.append(release(2, 1, epsilon_after(3), released="metrics", events=()))
    return chain_of(found)


def test_a_whole_ledger_has_no_findings(entries):
    assert verify_chain(entries) == verify_events(entries) == verify_epsilons(entries) == []
    assert verify_chain(entries, noted=entries[3].hash) == []
    assert verify_chain(entries, noted=GENESIS) == []
    assert (head(entries), head([])) == (entries[-1].hash, GENESIS)
    assert verify_chain([]) == verify_epsilons([]) == []


def test_the_hash_is_sha256_over_canonical_json_and_needs_no_code_of_ours(entries):
    fields = asdict(entries[1])
    claimed = fields.pop("hash")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == claimed == entry_hash(entries[1])
    assert entries[0].previous_hash == "0" * 64
    assert entries[1].previous_hash == entries[0].hash


@pytest.mark.parametrize(
    "changes",
    [
        {"contributions": 11},
        {"event": {"class": "GaussianDpEvent", "noise_multiplier": 20.0}},
        {"claim": POISSON},
        {"cumulative_epsilon": 0.1},
        {"delta": 1e-3},
        {"clip_norm": 0.2},
        {"created": "2026-03-02T12:00:00.000000+00:00"},
        {"task_id": 9},
        {"mechanism": "NONE"},
    ],
)
def test_any_change_of_an_entry_is_named(entries, changes):
    entries[2] = replace(entries[2], **changes)
    assert verify_chain(entries)[0].startswith("entry 3 was changed")


def test_a_changed_entry_with_a_hash_that_fits_breaks_the_one_behind_it(entries):
    changed = replace(entries[2], contributions=11)
    entries[2] = replace(changed, hash=entry_hash(changed))
    assert verify_chain(entries) == ["entry 4 does not follow entry 3: it names another hash before it"]


def test_removed_entries_are_named(entries):
    assert verify_chain(entries[:2] + entries[3:]) == ["entry 3 is missing before entry 4"]
    assert verify_chain(entries[:1] + entries[4:]) == ["entries 2 to 4 are missing before entry 5"]
    assert verify_chain(entries[1:]) == ["entry 1 is missing before entry 2"]


def test_an_end_that_was_cut_off_is_seen_by_whoever_noted_the_head(entries):
    assert verify_chain(entries[:-1]) == []
    assert "noted head" in verify_chain(entries[:-1], noted=head(entries))[0]


def test_moved_and_doubled_entries_are_named(entries):
    moved = [*entries[:2], entries[3], entries[2], *entries[4:]]
    assert "entry 3 is missing before entry 4" in verify_chain(moved)
    assert "entry 3 stands after entry 4: it was moved or is there twice" in verify_chain(moved)
    doubled = [*entries[:3], entries[2], *entries[3:]]
    assert any("is there twice" in problem for problem in verify_chain(doubled))


def test_one_thing_released_twice_is_named_though_the_chain_is_whole(entries):
    again = rechained([*entries, entries[2]])
    assert verify_chain(again) == ["round 2 of task 1 has two entries for its model: 3 and 8"]


def test_a_chain_made_anew_has_no_noted_head(entries):
    forged = rechained([entry for entry in entries if entry.iteration_id != 2])
    assert verify_chain(forged) == []
    assert verify_chain(forged, noted=head(entries)) != []


def test_an_entry_of_another_population_is_named(entries):
    entries[1] = replace(entries[1], population="letters")
    assert "entry 2 belongs to population letters" in verify_chain(entries)


@pytest.mark.parametrize("factor", [0.5, 0.999, 1.5])
def test_an_epsilon_that_its_events_do_not_give_is_named(entries, factor):
    for place in (2, 3):
        entries[place] = replace(entries[place], cumulative_epsilon=factor * epsilon_after(2))
    (problem,) = verify_epsilons(rechained(entries))
    assert problem.startswith("entry 3 says epsilon")


def test_an_epsilon_is_never_taken_for_infinite_or_for_nothing(entries):
    for place in (2, 3):
        entries[place] = replace(entries[place], cumulative_epsilon=None)
    assert verify_epsilons(entries)[0].startswith("entry 3 says epsilon inf")
    entries[6] = replace(entries[6], cumulative_epsilon=0.0)
    assert "entry 7 charges nothing and yet changes epsilon" in verify_epsilons(entries)


def test_entries_of_one_round_that_disagree_are_named(entries):
    entries[3] = replace(entries[3], cumulative_epsilon=1.0)
    assert verify_epsilons(entries)[0] == "entries 3 to 4 are one round and disagree on epsilon"


def test_a_sampled_ledger_may_hold_the_exact_value_or_the_bound_above_it():
    exact = poisson_epsilon(2.0, 1, 0.01, DELTA)
    for value, right in ((exact, True), (1.005 * exact, True), (1.1 * exact, False), (0.9999 * exact, False)):
        found = verify_epsilons(chain_of([release(1, 1, value, claim=POISSON)]))
        assert (found == []) is right, value


def test_a_release_without_noise_makes_epsilon_infinite_from_there_on():
    bare = (GaussianEvent(0.0),)
    entries = chain_of(
        [
            release(1, 1, epsilon_after(1)),
            release(2, 1, None, events=bare, mechanism="NONE"),
            release(1, 2, None),
        ]
    )
    assert verify_events(entries) == verify_epsilons(entries) == []
    entries[2] = replace(entries[2], cumulative_epsilon=5.0)
    assert len(verify_epsilons(entries)) == 1


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"event": None, "claim": None}, "is not charged for"),
        ({"event": {"class": "LaplaceDpEvent", "noise_multiplier": 1.0}}, "cannot be read"),
        ({"event": {"class": "ComposedDpEvent", "events": []}}, "charges nothing"),
        ({"claim": {"participation": "SOMETIMES"}}, "cannot be read"),
        ({"mechanism": "NONE"}, "names no mechanism"),
        ({"released": "gradient"}, "of no known kind"),
    ],
)
def test_an_entry_that_does_not_make_sense_is_named_whoever_chained_it(changes, finding):
    (problem,) = verify_events(chain_of([release(1, 1, 1.0, **changes)]))
    assert finding in problem


def test_a_noised_metric_is_charged_with_its_round():
    both = chain_of(
        [
            release(1, 1, gaussian_epsilon(2.0, DELTA)),
            release(1, 1, gaussian_epsilon(2.0, DELTA), released="metrics", mechanism="METRIC_GAUSSIAN"),
        ]
    )
    assert len(verify_epsilons(both)) == 1
    right = gaussian_epsilon(2.0 / math.sqrt(2), DELTA)
    assert verify_epsilons([replace(entry, cumulative_epsilon=right) for entry in both]) == []
    assert list(tasks_of(both)[0].rounds) == [(GaussianEvent(2.0), GaussianEvent(2.0))]


def test_tasks_are_read_from_the_entries_with_their_own_assumptions():
    entries = chain_of(
        [
            release(1, 1, 1.0, events=(TreeEvent(3.0, 1),), claim=POISSON),
            release(2, 1, 1.0, events=(GaussianEvent(5.0),), claim=ALWAYS),
            release(1, 2, 1.0, events=(TreeEvent(3.0, 2),), claim=POISSON),
            release(1, 4, 1.0, events=(TreeEvent(3.0, 3),), claim=POISSON),
        ]
    )
    first, second = tasks_of(entries)
    assert list(first.rounds) == [(TreeEvent(3.0, 1),), (TreeEvent(3.0, 2),), (), (TreeEvent(3.0, 3),)]
    assert first.assumption == Assumption(Participation.POISSON, 1000, 10)
    assert second.assumption.participation is Participation.NO_AMPLIFICATION


def test_a_task_is_believed_no_more_than_its_weakest_entry():
    with_and_without = [release(1, 1, None, claim=POISSON), release(1, 2, None, claim=None)]
    (task,) = tasks_of(chain_of(with_and_without))
    assert task.assumption.participation is Participation.NO_AMPLIFICATION
    crowded = [release(1, 1, None, claim=POISSON), release(1, 2, None, claim=POISSON, contributions=50)]
    (task,) = tasks_of(chain_of(crowded))
    assert task.assumption == Assumption(Participation.POISSON, 1000, 50)
    assert assumption_of(POISSON, 10, 5000).population == 5000


def test_many_alike_rounds_take_one_run_and_come_back_as_they_were():
    assumption = Assumption(Participation.MIN_SEPARATION, 100, 10, 5)
    rounds = [(GaussianEvent(1.0), GaussianEvent(9.0))] * 500
    rounds += [(TreeEvent(2.0, step), TreeEvent(4.0, step)) for step in range(1, 200)] * 2
    rounds += [(BandedEvent(2.0, 5, step),) for step in range(1, 300)]
    spent: dict[int, Charges] = {}
    for number, events in enumerate(rounds, 1):
        spent = charged(spent, 7, number, events, assumption)
    assert len(spent[7].runs) == 4
    assert spent[7].runs[1] == Run((TreeEvent(2.0, 1), TreeEvent(4.0, 1)), 199)
    (task,) = releases(spent)
    assert list(task.rounds) == rounds


def test_claims_of_no_known_form_are_refused():
    for claim in ({}, {**POISSON, "delta": 2}, {**POISSON, "report_goal": -1}, {**POISSON, "report_goal": None}):
        with pytest.raises(ArtifactInvalid) as caught:
            assumption_of(claim, 10, 10)
        assert caught.value.reason is Reason.LEDGER_MALFORMED


def test_a_gap_of_millions_of_rounds_costs_no_memory_and_no_time():
    entries = chain_of([release(1, 1, 1.0), release(1, 10**7, 1.0), release(2, 10**7, 1.0)])
    tracemalloc.start()
    first, second = tasks_of(entries)
    found = [epsilon([first, second], DELTA), epsilon([first], DELTA)]
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert found == pytest.approx([epsilon_after(3), epsilon_after(2)])
    assert (len(first.rounds), first.rounds[0], first.rounds[5]) == (10**7, GAUSSIAN, ())
    assert first.rounds[-1] == second.rounds[10**7 - 1] == GAUSSIAN
    assert list(first.rounds[:2]) == [GAUSSIAN, ()]
    with pytest.raises(IndexError):
        first.rounds[10**7]


def test_rounds_kept_in_spans_are_the_mechanisms_of_rounds_written_out():
    assumption = Assumption(Participation.MIN_SEPARATION, 100, 10, 5)
    spent: dict[int, Charges] = {}
    for number in (*range(1, 30), *range(40, 60), 70):
        step = number if number < 25 else number - 24
        events = (TreeEvent(3.0, step), GaussianEvent(2.0)) if number % 20 else (GaussianEvent(4.0),)
        spent = charged(spent, 1, number, events, assumption)
        spent = charged(spent, 2, number, (BandedEvent(3.0, 4, step),), assumption)
    for task in releases(spent):
        assert mechanisms_of(task.rounds) == mechanisms_of(list(task.rounds))
        assert mechanisms_of(task.rounds[:41]) == mechanisms_of(list(task.rounds)[:41])


@pytest.mark.parametrize(
    "event",
    [
        {"class": "GaussianDpEvent", "noise_multiplier": 1e31},
        {"class": "GaussianDpEvent", "noise_multiplier": "nan"},
        {"class": "TreeAggregationStep", "noise_multiplier": 1.0, "step": 10**10},
        {"class": "TreeAggregationStep", "noise_multiplier": 1.0, "step": 0},
        {"class": "TreeAggregationStep", "noise_multiplier": 1.0, "step": math.inf},
        {"class": "BandedMatrixFactorizationStep", "noise_multiplier": 1.0, "bands": 10**10, "step": 1},
        {"class": "ComposedDpEvent", "events": 100 * [{"class": "GaussianDpEvent", "noise_multiplier": 1.0}]},
        {"class": "ComposedDpEvent", "events": [{"class": "ComposedDpEvent", "events": []}]},
        {"class": []},
    ],
)
def test_events_beyond_all_limits_cannot_be_read(event):
    with pytest.raises(ArtifactInvalid):
        read_events(event)


def test_claims_beyond_all_limits_cannot_be_read():
    for name in ("estimated_population", "minimum_separation", "report_goal"):
        for value in (2**63, 10**400, math.inf, "x", []):
            with pytest.raises(ArtifactInvalid):
                assumption_of({**POISSON, name: value}, 10, 10)


def test_a_ledger_of_many_sampled_rounds_is_verified_in_milliseconds_each():
    spent: dict[int, Charges] = {}
    found = []
    for number in range(1, 101):
        spent = charged(spent, 1, number, GAUSSIAN, Assumption(Participation.POISSON, 1000, 10))
        found.append(release(1, number, cumulative_epsilon(releases(spent), DELTA), claim=POISSON))
    entries = chain_of(found)
    bounds.parts_upper.cache_clear()
    begun = time.process_time()
    assert verify_epsilons(entries) == []
    assert time.process_time() - begun < 4, "it takes half a second where nothing else runs"
