"""Secrets at rest: bytes that only the holder of a 256-bit key can read or change."""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcompute.errors import ArtifactInvalid, Reason

KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"


def seal_secret(key: bytes, secret: bytes, context: bytes) -> bytes:
    """Encrypts `secret`; `context` says what it is and must be given again to open it.

    Formal guarantees: AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce from the operating system: confidential
    and authentic, with the context, for up to 2**32 secrets under one key.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return _VERSION + nonce + AESGCM(key).encrypt(nonce, secret, _VERSION + context)


def open_secret(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The secret in `sealed`. Raises ArtifactInvalid (SECRET_UNREADABLE) for another key, context or changed bytes.

    Formal guarantees: returns only what `seal_secret` was given with the same key and context.
    """
    start = len(_VERSION) + _NONCE_BYTES
    if sealed[: len(_VERSION)] != _VERSION:
        raise ArtifactInvalid(Reason.SECRET_UNREADABLE, f"{len(sealed)} bytes of an unknown form")
    try:
        return AESGCM(key).decrypt(sealed[len(_VERSION) : start], sealed[start:], _VERSION + context)
    except (InvalidTag, ValueError) as cause:
        raise ArtifactInvalid(Reason.SECRET_UNREADABLE, f"{len(sealed)} bytes do not open") from cause
