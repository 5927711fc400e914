"""Tokens that devices choose for themselves and show at every visit (spec/server.md 3.2, 3.3)."""

import hashlib
from datetime import timedelta

from fedcompute.errors import Reason, RequestRejected

TOKEN_LIFE = timedelta(days=7)
# An expired token still says whose a session is; sessions end within the time that a device has to compute.
TOKEN_MEMORY = timedelta(days=1)
_SHORTEST, _LONGEST = 16, 64
OWNER_LIMIT = 1024


def token_hash(token: str) -> str:
    """What is stored of a token: its SHA-256 in lower-case hex.

    Formal guarantees: the stored value admits nobody, because a request must carry the token itself; to find the token
    from it takes a search of SHA-256 preimages, hopeless for the random UUIDs that devices send.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def owner_hash(owner_digest: str) -> str:
    """What is stored of an owner's digest.

    Formal guarantees: two owners share it only if SHA-256 collides.
    """
    return hashlib.sha256(owner_digest.encode("utf-8", "surrogateescape")).hexdigest()


def is_token(text: str) -> bool:
    """Whether a text can be a token: 16 to 64 printable ASCII characters; shorter ones could be guessed."""
    return _SHORTEST <= len(text) <= _LONGEST and text.isascii() and text.isprintable()


def check_owner(owner_digest: str | None) -> str:
    """Returns the owner's digest; raises RequestRejected(MALFORMED_REQUEST) for none, an empty or an endless one."""
    if not owner_digest or len(owner_digest) > OWNER_LIMIT:
        raise RequestRejected(
            Reason.MALFORMED_REQUEST,
            f"fcp-owner-id-digest needs 1 to {OWNER_LIMIT} characters, not {len(owner_digest or '')}",
            remedy="send the digest of the component that the device computes for",
        )
    return owner_digest
