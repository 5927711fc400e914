"""The envelope around a device's update: gzip(JSON(HPKE(gzip(checkpoint)))).

Source: spec/server.md 7.1, spec/device.md 2.4.
"""

import base64
import binascii
import gzip
import json
import zlib
from collections.abc import Mapping

from fedcompute.crypto.hpke import DEVICE_INFO, open_sealed, seal
from fedcompute.crypto.keys import PublicKey
from fedcompute.errors import Reason, UploadRejected

GZIP_MAGIC = b"\x1f\x8b"
# Float updates hardly compress: the lowest level costs a fifth of the default's time for the same size.
_GZIP_LEVEL = 1


def gzip_bytes(data: bytes) -> bytes:
    """Gzip without a time stamp, so equal input gives equal bytes."""
    return gzip.compress(data, compresslevel=_GZIP_LEVEL, mtime=0)


def gunzip(data: bytes, limit: int) -> bytes:
    """Decompresses one gzip stream to at most `limit` bytes.

    Raises UploadRejected: UPLOAD_TOO_LARGE when it would be longer, UPLOAD_TRUNCATED when the stream is damaged,
    ends early or is followed by other bytes.
    """
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as cause:
        raise UploadRejected(Reason.UPLOAD_TRUNCATED, f"{len(data)} bytes are not a gzip stream") from cause
    if len(plain) > limit:
        raise UploadRejected(Reason.UPLOAD_TOO_LARGE, f"more than {limit} bytes after decompression")
    if not stream.eof or stream.unused_data:
        raise UploadRejected(
            Reason.UPLOAD_TRUNCATED, f"the gzip stream in {len(data)} bytes ends too early or too late"
        )
    return plain


def seal_update(checkpoint: bytes, key: PublicKey) -> bytes:
    """The JSON body that carries `checkpoint` to the holder of `key`; the caller adds the outer gzip.

    Formal guarantees: as `hpke.seal`. The length of the body reveals the compressed length of the update.
    """
    sealed = seal(key.key, gzip_bytes(checkpoint), DEVICE_INFO)
    return json.dumps(
        {
            "keyId": key.id,
            "encryptedPayload": base64.b64encode(sealed).decode(),
            "associatedData": base64.b64encode(DEVICE_INFO).decode(),
        }
    ).encode()


def open_update(body: bytes, private_keys: Mapping[str, bytes], *, allow_plaintext: bool, limit: int) -> bytes:
    """The checkpoint inside a stored upload, of at most `limit` bytes.

    `body` is the object as stored (with or without the outer gzip); `private_keys` maps key ids to raw private keys.
    A body that is no JSON object is a plaintext checkpoint, which counts only if `allow_plaintext`. Raises
    UploadRejected with the reason; nothing else escapes.

    Formal guarantees: with `allow_plaintext` false every returned byte was encrypted to one of `private_keys`.
    """
    # JSON and base64 add a third to the sealed bytes; the sealed bytes may be incompressible.
    envelope = gunzip(body, 2 * limit + 4096) if body[:2] == GZIP_MAGIC else body
    fields = _json_object(envelope)
    if fields is None:
        if not allow_plaintext:
            raise UploadRejected(Reason.UPLOAD_NOT_ENCRYPTED, f"{len(envelope)} bytes are no encrypted envelope")
        if len(envelope) > limit:
            raise UploadRejected(Reason.UPLOAD_TOO_LARGE, f"{len(envelope)} bytes, over {limit}")
        return envelope
    key_id, sealed, info = _envelope_fields(fields)
    private_key = private_keys.get(key_id)
    if private_key is None:
        raise UploadRejected(Reason.UNKNOWN_KEY, f"no private key {key_id[:64]!r}")
    return gunzip(open_sealed(private_key, sealed, info), limit)


def _json_object(data: bytes) -> dict[str, object] | None:
    if data.lstrip(b" \t\r\n")[:1] != b"{":
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _envelope_fields(fields: Mapping[str, object]) -> tuple[str, bytes, bytes]:
    key_id = fields.get("keyId")
    payload = fields.get("encryptedPayload")
    info = fields.get("associatedData", "")
    if not isinstance(key_id, str) or not isinstance(payload, str) or not isinstance(info, str):
        raise UploadRejected(Reason.DECRYPTION_FAILED, "the envelope lacks keyId, encryptedPayload or associatedData")
    try:
        return key_id, base64.b64decode(payload, validate=True), base64.b64decode(info, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise UploadRejected(Reason.DECRYPTION_FAILED, "the envelope's fields are not standard base64") from cause
