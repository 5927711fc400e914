"""What a device answers to a challenge: a certificate chain, or the MAC of an enrolment (spec/server.md 1.1)."""

import base64
import binascii
import json
from dataclasses import dataclass, field

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.security.certificates import CERTIFICATE_BYTES_LIMIT, CHAIN_LIMIT
from fedcompute.server.security.enrolment import SCHEME, EnrolmentProof

_TEXT_LIMIT = CERTIFICATE_BYTES_LIMIT * 4 // 3 + 4
_HEADER_LIMIT = 64 * 1024
_PART_LIMIT = 64


@dataclass(frozen=True)
class AttestationProof:
    """A certificate chain in DER, leaf first; empty from a device that could not attest."""

    chain: tuple[bytes, ...] = field(repr=False)


Proof = AttestationProof | EnrolmentProof


def read_proof(header: str) -> Proof:
    """The content of `odp-authentication-key`; raises RequestRejected(MALFORMED_REQUEST) if it is neither."""
    try:
        values = json.loads(header) if len(header) <= _HEADER_LIMIT else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise _malformed("is no JSON array of texts")
    if values and values[0].startswith("enrolment:"):
        if values[0] != SCHEME or len(values) != 3:
            raise _malformed(f"begins like an enrolment and is not [{SCHEME!r}, id, proof]")
        if not all(one.isascii() and one.isprintable() and len(one) <= _PART_LIMIT for one in values[1:]):
            raise _malformed(f"holds an id or a proof that is no text of up to {_PART_LIMIT} printable characters")
        return EnrolmentProof(values[1], values[2])
    if len(values) > CHAIN_LIMIT or any(len(one) > _TEXT_LIMIT for one in values):
        raise _malformed(
            f"holds more than {CHAIN_LIMIT} certificates or a longer one than {CERTIFICATE_BYTES_LIMIT} bytes"
        )
    try:
        return AttestationProof(tuple(base64.b64decode(one, validate=True) for one in values))
    except (binascii.Error, ValueError):
        raise _malformed("holds something that is no base64") from None


def _malformed(detail: str) -> RequestRejected:
    return RequestRejected(
        Reason.MALFORMED_REQUEST,
        f"odp-authentication-key {detail}",
        remedy="send a JSON array of base64 certificates, leaf first, or the proof of an enrolment",
    )
