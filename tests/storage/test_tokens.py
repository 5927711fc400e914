from dataclasses import replace
from datetime import timedelta

import pytest

from fedcompute.crypto.sealing import sealer_of
from fedcompute.storage.enrolments import NewEnrolment, create_enrolment, revoke_enrolment
from fedcompute.storage.tokens import TokenRow, find_token, forget_tokens, grant_token, live_token

WEEK = timedelta(days=7)
SEALER = sealer_of(b"x" * 32)


@pytest.fixture
def token(now):
    return TokenRow("a" * 64, "owner", None, "proof", now, now + WEEK)


@pytest.fixture
def grant(database, now):
    def run(row, at=now):
        with database.write() as tx:
            return grant_token(tx, row, at)

    return run


@pytest.fixture
def live(database):
    def run(token_hash, at):
        with database.read() as tx:
            return live_token(tx, token_hash, at)

    return run


def test_a_token_lives_until_it_expires(token, grant, live, database, now):
    assert grant(token)
    assert live(token.token_hash, now + WEEK - timedelta(microseconds=1)) == token
    assert live(token.token_hash, now + WEEK) is None
    assert live("b" * 64, now) is None
    with database.read() as tx:
        assert find_token(tx, token.token_hash) == token


def test_a_token_that_is_granted_again_is_granted_and_lives_no_longer(token, grant, live, now):
    grant(token)
    later = now + timedelta(days=1)
    assert grant(replace(token, created=later, expires=later + WEEK), later)
    assert live(token.token_hash, now) == token


@pytest.mark.parametrize(
    "change", [{"owner_hash": "other"}, {"participant": "p"}, {"token_hash": "b" * 64}], ids=lambda one: next(iter(one))
)
def test_a_token_of_another_and_a_proof_that_has_earned_a_token_grant_nothing(token, grant, live, now, change):
    grant(token)
    assert not grant(replace(token, **change))
    assert live(token.token_hash, now) == token
    assert live("b" * 64, now) is None


def test_an_expired_token_may_be_earned_anew(token, grant, live, now):
    grant(token)
    later = now + WEEK
    fresh = replace(token, owner_hash="other", proof_hash="another proof", created=later, expires=later + WEEK)
    assert grant(fresh, later)
    assert live(token.token_hash, later) == fresh


def test_revoking_an_enrolment_ends_its_tokens_and_no_others(token, grant, live, database, now):
    for identifier in ("one", "two"):
        with database.write() as tx:
            create_enrolment(tx, SEALER, NewEnrolment(identifier, "label", b"s" * 32), now)
        row = replace(token, token_hash=identifier, participant=identifier, proof_hash=identifier)
        assert grant(row)
    grant(token)
    with database.write() as tx:
        assert revoke_enrolment(tx, "one", now)
        assert not revoke_enrolment(tx, "one", now)
        assert not revoke_enrolment(tx, "three", now)
    assert live("one", now) is None
    assert live("two", now).participant == "two"
    assert live(token.token_hash, now) == token


def test_expired_tokens_are_forgotten_and_no_others(token, grant, database, now):
    grant(token)
    grant(replace(token, token_hash="b" * 64, proof_hash="b", expires=now + WEEK + timedelta(seconds=1)))
    with database.write() as tx:
        assert forget_tokens(tx, now + WEEK) == 1
        assert find_token(tx, token.token_hash) is None
        assert find_token(tx, "b" * 64) is not None


def test_of_many_that_show_one_proof_at_once_one_is_granted_a_token(token, race, database_url, now):
    def show(opened, index):
        with opened.write() as tx:
            return grant_token(tx, replace(token, token_hash=f"{index}"), now)

    assert race(6, show).count(True) == 1


def test_one_token_that_is_granted_many_times_at_once_is_granted_each_time(token, race, now):
    def show(opened, _):
        with opened.write() as tx:
            return grant_token(tx, token, now)

    assert race(6, show) == [True] * 6


def test_the_representation_of_a_token_does_not_hold_its_hash(token):
    assert token.token_hash not in repr(token)
