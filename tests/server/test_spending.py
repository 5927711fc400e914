"""What the server remembers of ledgers between rounds, and what a round is expected to cost."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from fedcompute.learning.process import round_update
from fedcompute.learning.specification import initial_state
from fedcompute.privacy.budget import Budget
from fedcompute.privacy.chain import Release
from fedcompute.privacy.charges import releases
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.protos import learning_pb2
from fedcompute.server.rounds.spending import Accounts, Round, Spending, claim_of, events_of, prospect
from fedcompute.storage.budgets import set_budget
from fedcompute.storage.database import Database
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import Standing, append_releases, standing_of

NOW = datetime(2026, 3, 1, tzinfo=UTC)
KEY = IterationKey("digits", 1, 1)


@pytest.fixture
def database(tmp_path):
    opened = Database.open(f"sqlite:///{tmp_path}/spending.db")
    yield opened
    opened.close()


def release(key, noise):
    event = None if noise is None else {"class": "GaussianDpEvent", "noise_multiplier": noise}
    return Release("digits", key.task_id, key.iteration_id, "model", "X", event, None, 1.0, 2, 2, 1.0, 1e-6)


def enter(database, task_id, iteration_id, noise):
    key = IterationKey("digits", task_id, iteration_id)
    with database.write() as tx:
        append_releases(tx, key, [release(key, noise)], standing_of(tx, "digits"), NOW)


def rounds_of(spending):
    return [list(task.rounds) for task in releases(spending.spent)]


def test_accounts_grow_with_the_ledger_and_agree_with_a_fresh_look(database):
    accounts = Accounts()
    with database.read() as tx:
        assert accounts.spending(tx, "digits") == Spending(Standing(0, None), {})
    for number, noise in ((1, 1.0), (2, 1.0), (3, None), (4, 2.0)):
        enter(database, 1, number, noise)
        enter(database, 2, number, 5.0)
        with database.read() as tx:
            known = accounts.spending(tx, "digits")
            assert known == Accounts().spending(tx, "digits")
    assert rounds_of(known) == [
        [(GaussianEvent(1.0),), (GaussianEvent(1.0),), (), (GaussianEvent(2.0),)],
        [(GaussianEvent(5.0),)] * 4,
    ]
    assert known.standing == Standing(8, None)


def test_a_new_budget_is_a_new_standing(database):
    accounts = Accounts()
    enter(database, 1, 1, 1.0)
    with database.write() as tx:
        before = accounts.spending(tx, "digits")
        set_budget(tx, "digits", Budget(1.0, 1e-6), NOW)
        after = accounts.spending(tx, "digits")
    assert before.spent == after.spent
    assert (before.standing.budget, after.standing.budget) == (None, Budget(1.0, 1e-6))


def private(hand_made):
    return hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=2.0, report_goal=3))


def look(process, a_round, hand_made, budget=None, is_last=False):
    state = initial_state(process, hand_made.initial, ())
    return prospect(Spending(Standing(0, budget), {}), process, a_round, lambda: state, is_last=is_last)


def test_a_prospect_holds_until_ledger_budget_or_the_number_of_devices_say_otherwise(hand_made):
    a_round = Round(KEY, 3, 3)
    ahead = look(private(hand_made), a_round, hand_made)
    spending = Spending(Standing(0, None), {})
    assert ahead.events == (GaussianEvent(2.0),)
    assert ahead.fits(spending, a_round)
    assert ahead.fits(spending, replace(a_round, contributions=2))
    assert not ahead.fits(spending, replace(a_round, contributions=4))
    assert not ahead.fits(Spending(Standing(7, None), {}), a_round)
    assert not ahead.fits(Spending(Standing(0, Budget(1.0, 1e-6)), {}), a_round)


def test_a_prospect_says_what_is_refused_now_and_what_would_be_next(hand_made):
    process, a_round = private(hand_made), Round(KEY, 3, 3)
    once = look(process, a_round, hand_made).epsilon
    assert once > 0
    tight = look(process, a_round, hand_made, Budget(1.1 * once, 1e-6))
    assert (tight.refused, tight.no_more is None) == (None, False)
    assert look(process, a_round, hand_made, Budget(1.1 * once, 1e-6), is_last=True).no_more is None
    spent = look(process, a_round, hand_made, Budget(0.9 * once, 1e-6))
    assert "privacy budget spent" in str(spent.refused)
    wide = look(process, a_round, hand_made, Budget(10 * once, 1e-6))
    assert (wide.refused, wide.no_more) == (None, None)


def test_a_prospect_draws_no_noise_and_leaves_the_state_alone(hand_made):
    class Never:
        def gaussian(self, deviation, count):
            raise AssertionError("noise was drawn")

    process = private(hand_made)
    state = initial_state(process, hand_made.initial, ())
    copies = {name: np.copy(value) for name, value in state.items()}
    spending = Spending(Standing(0, Budget(100.0, 1e-6)), {})
    prospect(spending, process, Round(KEY, 3, 3), lambda: state, is_last=False)
    assert state.keys() == copies.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, copies[name])
    plain = hand_made.process_of()
    with pytest.raises(AssertionError, match="drawn"):
        # The guard itself works.
        round_update(process, state, _one(process, state), Never())
    assert events_of(plain, round_update(plain, initial_state(plain, hand_made.initial, ()), _one(plain), Never())) == (
        GaussianEvent(0.0),
    )


def _one(process, state=None):
    from fedcompute.learning.contribution import clip_norm_told, empty_sum
    from fedcompute.learning.process import client_checkpoint

    return empty_sum(
        process, b"", None if state is None else clip_norm_told(process, client_checkpoint(process, state))
    )


def test_a_plan_without_a_claim_assumes_nothing(hand_made):
    claim = claim_of(private(hand_made), 3)
    assert (claim["participation"], claim["delta"], claim["report_goal"]) == ("NO_AMPLIFICATION", 1e-6, 3)
