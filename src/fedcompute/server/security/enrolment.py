"""Proofs of enrolled devices: an HMAC under a secret that the device was given once."""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedcompute.errors import Reason, RequestRejected
from fedcompute.storage.enrolments import NewEnrolment

SCHEME = "enrolment:v1"
SECRET_BYTES = 32
LABEL_LIMIT = 40
MOST_AT_ONCE = 10_000
_ID_BYTES = 8
# Stands for the secret of an enrolment that does not exist, so that its refusal takes as long as any other.
_NOBODY = secrets.token_bytes(SECRET_BYTES)


@dataclass(frozen=True)
class EnrolmentProof:
    """The answer of an enrolled device to a challenge: whose secret it claims to have, and the MAC as it came."""

    enrolment_id: str
    mac: str = field(repr=False)


def new_enrolment(label: str) -> NewEnrolment:
    """An enrolment with a random id and secret; raises RequestRejected(MALFORMED_REQUEST) for an unusable label.

    Formal guarantees: 256 random bits from the operating system; nobody can answer for the device without them.
    """
    if not 0 < len(label) <= LABEL_LIMIT or not label.isprintable():
        detail = f"a label has 1 to {LABEL_LIMIT} printable characters"
        raise RequestRejected(Reason.MALFORMED_REQUEST, detail, remedy="shorten the label")
    return NewEnrolment(secrets.token_hex(_ID_BYTES), label, secrets.token_bytes(SECRET_BYTES))


def enrolment_line(new: NewEnrolment) -> str:
    """The line that a device is given: `ID:SECRET`, the secret in base64."""
    return f"{new.id}:{base64.b64encode(new.secret).decode()}"


def proof_mac(secret: bytes, challenge: bytes, token: str) -> bytes:
    """What a device answers: HMAC-SHA256 over challenge and token.

    Formal guarantees: only a holder of `secret` can make it; it holds for this token alone. Challenges have one length,
    so no other pair gives the same message.
    """
    return hmac.new(secret, challenge + token.encode(), hashlib.sha256).digest()


def proves(secret: bytes | None, proof: EnrolmentProof, challenges: Iterable[bytes], token: str) -> bool:
    """Whether `proof` answers one of `challenges` with `secret`, which is None for an unknown or revoked enrolment.

    Formal guarantees: true only if the MAC was made with `secret` for one of the challenges and this token. The time
    depends neither on the secret nor on which challenge was answered, and is the same for an unknown enrolment.
    """
    try:
        given = base64.b64decode(proof.mac, validate=True)
    except (binascii.Error, ValueError):
        given = b""
    fits = False
    for challenge in challenges:
        fits |= hmac.compare_digest(given, proof_mac(secret or _NOBODY, challenge, token))
    return fits and secret is not None
