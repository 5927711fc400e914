import base64
import hmac
import os
import time

import pytest

from fedcompute.errors import RequestRejected
from fedcompute.server.security import enrolment, tokens
from fedcompute.server.security.enrolment import EnrolmentProof, enrolment_line, new_enrolment, proof_mac, proves

SECRET, TOKEN = b"s" * 32, "0f1e2d3c-0000-4000-8000-000000000000"
CHALLENGES = [bytes([index]) * 40 for index in range(60)]


def proof_of(secret=SECRET, challenge=CHALLENGES[-1], token=TOKEN):
    return EnrolmentProof("id", base64.b64encode(proof_mac(secret, challenge, token)).decode())


def test_a_proof_holds_for_any_open_challenge_and_for_its_token_only():
    assert proves(SECRET, proof_of(challenge=CHALLENGES[0]), CHALLENGES, TOKEN)
    assert proves(SECRET, proof_of(), CHALLENGES, TOKEN)
    assert not proves(SECRET, proof_of(challenge=b"old" * 13 + b"!"), CHALLENGES, TOKEN)
    assert not proves(SECRET, proof_of(), CHALLENGES, TOKEN[::-1])
    assert not proves(b"t" * 32, proof_of(), CHALLENGES, TOKEN)
    assert not proves(None, proof_of(), CHALLENGES, TOKEN)
    assert not proves(SECRET, proof_of(), [], TOKEN)


@pytest.mark.parametrize("mac", ["", "%%%", "AAAA", "é", "A" * 10_000])
def test_something_that_is_no_proof_proves_nothing(mac):
    assert not proves(SECRET, EnrolmentProof("id", mac), CHALLENGES, TOKEN)


def test_nobody_proves_anything_with_what_stands_for_a_missing_secret():
    assert not proves(None, proof_of(secret=enrolment._NOBODY), CHALLENGES, TOKEN)


def test_every_secret_is_compared_in_constant_time(monkeypatch):
    """Counts the comparisons, whose own constancy is the standard library's promise: all are made, whatever matches."""
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(1) or one == other)
    numbers = []
    for secret, challenge in ((SECRET, CHALLENGES[0]), (SECRET, CHALLENGES[-1]), (b"t" * 32, b""), (None, b"")):
        compared.clear()
        proves(secret, proof_of(challenge=challenge), CHALLENGES, TOKEN)
        numbers.append(len(compared))
    assert numbers == [len(CHALLENGES)] * 4


def test_a_refusal_takes_as_long_for_an_unknown_enrolment_as_for_a_wrong_proof():
    """Of many medians the ratio stays near 1; an early exit would make it 0."""

    def median(secret):
        seconds = []
        for _ in range(50):
            proof = EnrolmentProof("id", base64.b64encode(os.urandom(32)).decode())
            start = time.perf_counter()
            proves(secret, proof, CHALLENGES, TOKEN)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[25]

    ratios = sorted(median(None) / median(SECRET) for _ in range(5))
    assert 0.5 < ratios[2] < 2


def test_enrolments_are_random_and_their_line_is_what_a_device_needs():
    first, second = new_enrolment("label"), new_enrolment("label")
    assert first.id != second.id
    assert first.secret != second.secret
    assert len(first.secret) == 32
    assert enrolment_line(first) == f"{first.id}:{base64.b64encode(first.secret).decode()}"
    for label in ("", "x" * 41, "a\nb"):
        with pytest.raises(RequestRejected):
            new_enrolment(label)


def test_a_token_has_16_to_64_printable_characters():
    assert tokens.is_token(TOKEN)
    for text in ("", "x" * 15, "x" * 65, "é" * 20, "x" * 20 + "\n"):
        assert not tokens.is_token(text)
