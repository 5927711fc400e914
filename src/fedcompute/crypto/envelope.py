"""The envelope around a device's update: gzip(JSON(HPKE(gzip(checkpoint)))).

Source: spec/server.md 7.1, spec/device.md 2.4.
"""

import base64
import json
import re
from collections.abc import Mapping
from typing import TypeVar

import pybase64
from isal import igzip, isal_zlib

from fedcompute.crypto.hpke import DEVICE_INFO, open_sealed, seal
from fedcompute.crypto.keys import PublicKey
from fedcompute.errors import Reason, UploadRejected

Body = TypeVar("Body", bytes, memoryview)

GZIP_MAGIC = b"\x1f\x8b"
_GZIP_LEVEL = 1  # of igzip: on floats and lattice sums the higher ones gain nothing, and 0 loses a quarter
_GZIP_FLAGS = 0x1F  # those that RFC 1952 defines
_DAMAGED: type[Exception] = isal_zlib.error  # type: ignore[assignment] # the package declares an instance
_JSON_SPACE = b" \t\r\n"
_OBJECT = re.compile(rb"[ \t\r\n]*\{")
_MEMBERS = (b"keyId", b"encryptedPayload", b"associatedData")
_MARKS = [b"{", b":", b",", b":", b",", b":", b"}"]  # what stands between the strings of such an object
_QUOTES = 4 * len(_MEMBERS)
_MOST_PARTS = 256  # quotes, members, nested values; devices send three members


def gzip_bytes(data: bytes) -> bytes:
    """Gzip without a time stamp, so equal input gives equal bytes on one machine."""
    packed: bytes = igzip.compress(data, compresslevel=_GZIP_LEVEL, mtime=0)
    return packed


def gunzip(data: bytes | memoryview, limit: int) -> bytes:
    """Decompresses one gzip stream to at most `limit` bytes.

    Raises UploadRejected: UPLOAD_TOO_LARGE when it would be longer, UPLOAD_TRUNCATED when the stream is damaged,
    ends early or is followed by other bytes.
    """
    stream = isal_zlib.decompressobj(wbits=31)
    try:
        # The decompressor overlooks flags that no gzip file has.
        plain = b"" if len(data) > 3 and data[3] > _GZIP_FLAGS else stream.decompress(data, limit + 1)
    except _DAMAGED as cause:
        raise UploadRejected(Reason.UPLOAD_TRUNCATED, f"{len(data)} bytes are not a gzip stream") from cause
    if len(plain) > limit:
        raise UploadRejected(Reason.UPLOAD_TOO_LARGE, f"more than {limit} bytes after decompression")
    if not stream.eof or stream.unused_data:
        raise UploadRejected(
            Reason.UPLOAD_TRUNCATED, f"the gzip stream in {len(data)} bytes ends too early or too late"
        )
    return plain


def seal_update(checkpoint: bytes, key: PublicKey, info: bytes = DEVICE_INFO) -> bytes:
    """The JSON body that carries `checkpoint` to the holder of `key`; the caller adds the outer gzip.

    Formal guarantees: as `hpke.seal`. The length of the body reveals the compressed length of the update.
    """
    sealed = seal(key.key, gzip_bytes(checkpoint), info)
    return json.dumps(
        {
            "keyId": key.id,
            "encryptedPayload": pybase64.b64encode(sealed).decode(),
            "associatedData": pybase64.b64encode(info).decode(),
        }
    ).encode()


def open_update(body: Body, private_keys: Mapping[str, bytes], *, allow_plaintext: bool, limit: int) -> bytes | Body:
    """The checkpoint inside a stored upload, of at most `limit` bytes.

    `body` is the object as stored (with or without the outer gzip); `private_keys` maps key ids to raw private keys.
    A body that is no JSON object is a plaintext checkpoint, which counts only if `allow_plaintext`; one without gzip is
    returned itself. Raises UploadRejected with the reason; nothing else escapes.

    Formal guarantees: with `allow_plaintext` false every returned byte was encrypted to one of `private_keys`.
    """
    # JSON and base64 add a third to the sealed bytes; the sealed bytes may be incompressible.
    envelope = gunzip(body, 2 * limit + 4096) if body[:2] == GZIP_MAGIC else body
    opened = None
    if _OBJECT.match(envelope):
        text = bytes(envelope)
        opened = _plain_fields(text) or _parsed_fields(text)
    if opened is None:
        if not allow_plaintext:
            raise UploadRejected(Reason.UPLOAD_NOT_ENCRYPTED, f"{len(envelope)} bytes are no encrypted envelope")
        if len(envelope) > limit:
            raise UploadRejected(Reason.UPLOAD_TOO_LARGE, f"{len(envelope)} bytes, over {limit}")
        return envelope
    key_id, sealed, info = opened
    private_key = private_keys.get(key_id)
    if private_key is None:
        raise UploadRejected(Reason.UNKNOWN_KEY, f"no private key {key_id[:64]!r}")
    return gunzip(open_sealed(private_key, sealed, info), limit)


def _plain_fields(data: bytes) -> tuple[str, bytes, bytes] | None:
    """Key id, sealed bytes and info of an envelope of three members in any order, with nothing to unescape.

    None for any other bytes, which are the parser's to judge; it copies the payload several times.
    """
    quotes: list[int] = []
    at = data.find(b'"')
    while at >= 0 and len(quotes) <= _QUOTES:
        quotes.append(at)
        at = data.find(b'"', at + 1)
    if len(quotes) != _QUOTES or b"\\" in data:
        return None
    # Strings lie between the marks: `{ "" : "" , "" : "" , "" : "" }`.
    starts, ends = [0, *(quote + 1 for quote in quotes)], [*quotes, len(data)]
    view = memoryview(data)
    pieces = [view[start:end] for start, end in zip(starts, ends, strict=True)]
    if [bytes(piece).strip(_JSON_SPACE) for piece in pieces[::2]] != _MARKS:
        return None
    strings = pieces[1::2]
    members = {bytes(name): value for name, value in zip(strings[::2], strings[1::2], strict=True)}
    if members.keys() != set(_MEMBERS):
        return None
    key_id, payload, info = (members[name] for name in _MEMBERS)
    try:
        text = str(key_id, "ascii")
        sealed, info_bytes = pybase64.b64decode(payload, validate=True), pybase64.b64decode(info, validate=True)
    except ValueError:
        return None
    return (text, sealed, info_bytes) if text.isprintable() else None


def _parsed_fields(data: bytes) -> tuple[str, bytes, bytes] | None:
    """As `_plain_fields`, of any JSON object; None if `data`, which begins like one, is none.

    Raises UploadRejected (DECRYPTION_FAILED) for an object that is no envelope.
    """
    if any(data.count(mark) > _MOST_PARTS for mark in (b'"', b",", b"[", b"{")):
        # Parsed, many small values take a hundred times the space.
        raise UploadRejected(Reason.DECRYPTION_FAILED, f"the envelope has more than {_MOST_PARTS} parts")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    key_id, payload, info = fields.get("keyId"), fields.get("encryptedPayload"), fields.get("associatedData", "")
    if not isinstance(key_id, str) or not isinstance(payload, str) or not isinstance(info, str):
        raise UploadRejected(Reason.DECRYPTION_FAILED, "the envelope lacks keyId, encryptedPayload or associatedData")
    try:
        return key_id, base64.b64decode(payload, validate=True), base64.b64decode(info, validate=True)
    except ValueError as cause:
        raise UploadRejected(Reason.DECRYPTION_FAILED, "the envelope's fields are not standard base64") from cause
