"""Encryption keys of the embedded key service and their published form (spec/device.md 2.1)."""

import base64
import binascii
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcompute.crypto.hpke import KEY_BYTES
from fedcompute.errors import ArtifactInvalid, Reason

KEY_LIST_BYTES_LIMIT = 1 << 20
DEFAULT_LIFETIME = 1_209_600  # seconds, 14 days


@dataclass(frozen=True)
class PublicKey:
    """A published key: its id, which devices echo, and 32 raw X25519 bytes."""

    id: str
    key: bytes


@dataclass(frozen=True)
class KeyPair:
    """A key of this server. The private half never leaves the process except into the key table."""

    id: str
    public_key: bytes
    private_key: bytes = field(repr=False)
    created: datetime
    expires: datetime

    @property
    def published(self) -> PublicKey:
        return PublicKey(self.id, self.public_key)


def generate_key_pair(now: datetime, lifetime: timedelta) -> KeyPair:
    """A fresh pair with a random id, from the operating system's generator.

    Formal guarantees: the private key is uniform over X25519 scalars (RFC 7748); id and key are independent.
    """
    private = X25519PrivateKey.generate()
    return KeyPair(
        id=str(uuid.uuid4()),
        public_key=private.public_key().public_bytes_raw(),
        private_key=private.private_bytes_raw(),
        created=now,
        expires=now + lifetime,
    )


def public_keys_json(keys: Iterable[PublicKey]) -> bytes:
    """The body of `/.well-known/odp/v1/public-keys`."""
    entries = [{"id": key.id, "key": base64.b64encode(key.key).decode()} for key in keys]
    return json.dumps({"keys": entries}).encode()


def parse_public_keys(data: bytes) -> list[PublicKey]:
    """The keys of a key service's answer, all or none.

    Raises ArtifactInvalid (KEY_MALFORMED) for anything but a list of entries with an id and 32 base64 bytes.
    """
    if len(data) > KEY_LIST_BYTES_LIMIT:
        raise ArtifactInvalid(Reason.KEY_MALFORMED, f"the key list has {len(data)} bytes, over {KEY_LIST_BYTES_LIMIT}")
    try:
        entries = json.loads(data)["keys"]
        keys = [PublicKey(str(entry["id"]), base64.b64decode(entry["key"], validate=True)) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as cause:
        raise ArtifactInvalid(Reason.KEY_MALFORMED, "the key list is not the JSON of a key service") from cause
    for key in keys:
        if len(key.key) != KEY_BYTES:
            raise ArtifactInvalid(Reason.KEY_MALFORMED, f"key {key.id!r} has {len(key.key)} bytes, not {KEY_BYTES}")
    return keys


def key_lifetime(headers: Mapping[str, str]) -> int:
    """Seconds that keys may be kept: the last `max-age` of Cache-Control minus Age; 14 days if that is not positive.

    `headers`: names in lower case. Source: spec/device.md 2.2.

    **Formal guarantees**: none; whoever published the keys decides how long devices use them.
    """
    max_age: int | None = None
    for part in headers.get("cache-control", "").lower().split(","):
        name, _, value = part.strip().partition("=")
        if name == "max-age":
            max_age = int(value) if _is_number(value) else None
    age = headers.get("age", "0").strip()
    if max_age is None or not _is_number(age):
        return DEFAULT_LIFETIME
    remaining = max_age - int(age)
    return remaining if remaining > 0 else DEFAULT_LIFETIME


def _is_number(text: str) -> bool:
    # A few digits are more seconds than anybody waits; thousands of them are an error of int().
    return text.isascii() and text.isdigit() and len(text) <= 18
