"""Partial sums on their way from the job that makes them to the one that uses them (spec/server.md 7.3)."""

from collections.abc import Mapping

from fedcompute.crypto.envelope import gzip_bytes, open_update, seal_update
from fedcompute.crypto.keys import PublicKey
from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected


def seal_aggregate(aggregate: bytes, key: PublicKey | None) -> bytes:
    """The object to store: encrypted to `key` as an upload is, but with empty associated data; in plain without one.

    Raises ArtifactInvalid(KEY_MALFORMED).

    Formal guarantees: with a key as `hpke.seal`, so storage learns no more than the sum's compressed length; without
    one none. The same sum gives the same bytes only without a key.
    """
    return gzip_bytes(aggregate if key is None else seal_update(aggregate, key, info=b""))


def open_aggregate(stored: bytes, private_keys: Mapping[str, bytes], *, limit: int) -> bytes:
    """The sum inside a stored object, of at most `limit` bytes: what is no JSON object was stored in plain.

    Raises ArtifactInvalid(PARTIAL_SUM_MALFORMED), and whatever a look-up in `private_keys` raises but KeyError.

    Formal guarantees: none against whoever can write to the store: HPKE's base mode authenticates no sender.
    """
    try:
        return open_update(stored, private_keys, allow_plaintext=True, limit=limit)
    except UploadRejected as error:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"a partial sum does not open: {error.detail}") from error
