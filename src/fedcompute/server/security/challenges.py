"""Challenges that prove by themselves who was asked and when, so that none is stored (spec/server.md 3.4).

A device asks up to three times at once and answers the last challenge it saw, and several servers may share one
database. So a challenge is computed, not remembered: an expiry, and a MAC of expiry and subject under a secret of the
server. Who knows the secret can tell every challenge that is still open for a subject.

Challenges are not single-use, and need not be: an enrolment's proof covers the token beside it, so a copy earns nothing
that its owner does not have; of an attestation the server remembers the certificate (`storage.tokens`), so one
attestation earns one token, however often and with whatever token it is shown.
"""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from datetime import datetime

LIFE_S = 3600
# Attempts of one request within a minute mostly get the same challenge, and few are open for one subject.
_STEP_S = 60
_EXPIRY_BYTES = 8
_LABEL = b"fedcompute device challenge 1"
Subject = Sequence[str]


def challenge_for(key: bytes, subject: Subject, now: datetime) -> bytes:
    """The challenge (40 bytes) for `subject` now: valid for 59 to 60 minutes.

    `subject`: what the challenge is for, and what its answer will be known by: the owner that checks in, the session
    that reports. `key`: 32 random bytes, the server's secret.

    Formal guarantees: HMAC-SHA256 over an unambiguous encoding of expiry and subject, so nobody without `key` can
    predict a challenge or make one for another subject or time.
    """
    return _challenge(key, subject, int(now.timestamp()) // _STEP_S * _STEP_S + LIFE_S)


def is_open(key: bytes, subject: Subject, challenge: bytes, now: datetime) -> bool:
    """Whether `challenge` was made for `subject` with `key` and has not expired.

    Formal guarantees: true only for bytes that `challenge_for` returned for this key and subject less than an hour ago;
    the comparison takes the same time for every wrong challenge of the right length.
    """
    expiry = int.from_bytes(challenge[:_EXPIRY_BYTES], "big")
    if not now.timestamp() < expiry < now.timestamp() + LIFE_S + _STEP_S:
        return False
    return hmac.compare_digest(challenge, _challenge(key, subject, expiry))


def open_challenges(key: bytes, subject: Subject, now: datetime) -> Iterator[bytes]:
    """Every challenge for `subject` that is open now, at most 61.

    Formal guarantees: exactly the challenges for which `is_open` is true.
    """
    first = int(now.timestamp()) // _STEP_S * _STEP_S + _STEP_S
    for expiry in range(first, int(now.timestamp()) + LIFE_S + _STEP_S + 1, _STEP_S):
        if now.timestamp() < expiry < now.timestamp() + LIFE_S + _STEP_S:
            yield _challenge(key, subject, expiry)


def _challenge(key: bytes, subject: Subject, expiry: int) -> bytes:
    head = expiry.to_bytes(_EXPIRY_BYTES, "big")
    parts = [_LABEL, head, *(part.encode("utf-8", "surrogateescape") for part in subject)]
    # Length prefixes keep two different lists of parts from giving the same bytes.
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return head + hmac.new(key, message, hashlib.sha256).digest()
