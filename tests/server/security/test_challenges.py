from datetime import UTC, datetime, timedelta

import pytest

from fedcompute.server.security.challenges import challenge_for, is_open, open_challenges

KEY = b"k" * 32
SUBJECT = ("check-in", "digits", "org.example/Worker-00")
NOW = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)


def test_a_challenge_is_open_for_an_hour_at_most_and_for_its_subject_only():
    challenge = challenge_for(KEY, SUBJECT, NOW)
    assert len(challenge) <= 128
    for minutes in (0, 1, 59):
        assert is_open(KEY, SUBJECT, challenge, NOW + timedelta(minutes=minutes))
    assert not is_open(KEY, SUBJECT, challenge, NOW + timedelta(hours=1))
    assert not is_open(b"l" * 32, SUBJECT, challenge, NOW)
    for other in (
        ("report", *SUBJECT[1:]),
        (*SUBJECT[:2], "org.example/Worker"),
        ("check-in", "digit", "s" + SUBJECT[2]),
    ):
        assert not is_open(KEY, other, challenge, NOW)


def test_a_challenge_that_was_changed_or_is_from_the_future_is_not_open():
    challenge = challenge_for(KEY, SUBJECT, NOW)
    for place in range(len(challenge)):
        changed = bytearray(challenge)
        changed[place] ^= 1
        assert not is_open(KEY, SUBJECT, bytes(changed), NOW)
    for other in (b"", challenge[:-1], challenge + b"\0", bytes(40), b"\xff" * 40):
        assert not is_open(KEY, SUBJECT, other, NOW)
    assert not is_open(KEY, SUBJECT, challenge_for(KEY, SUBJECT, NOW + timedelta(minutes=3)), NOW)


@pytest.mark.parametrize("second", [0, 1, 29, 59])
def test_the_challenges_that_are_open_are_those_that_were_made_in_the_last_hour(second):
    now = NOW.replace(second=second)
    made = {challenge_for(KEY, SUBJECT, now - timedelta(seconds=back)) for back in range(0, 3600)}
    found = list(open_challenges(KEY, SUBJECT, now))
    assert len(found) <= 61
    assert {one for one in made if is_open(KEY, SUBJECT, one, now)} <= set(found)
    assert all(is_open(KEY, SUBJECT, one, now) for one in found)


def test_the_three_attempts_of_a_request_get_one_challenge_unless_a_minute_ends_between_them():
    first = challenge_for(KEY, SUBJECT, NOW)
    assert challenge_for(KEY, SUBJECT, NOW + timedelta(seconds=20)) == first
    second = challenge_for(KEY, SUBJECT, NOW + timedelta(seconds=40))
    assert second != first
    assert is_open(KEY, SUBJECT, first, NOW + timedelta(seconds=40))
