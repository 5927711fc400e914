import gzip
import itertools
import json
import zlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcompute.crypto import envelope
from fedcompute.crypto.envelope import gunzip, gzip_bytes, open_update, seal_update
from fedcompute.crypto.keys import generate_key_pair, parse_public_keys, public_keys_json
from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected

KEY = generate_key_pair(datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=14))
PRIVATE = {KEY.id: KEY.private_key}
LIMIT = 1 << 20


def reason_of(body, **options):
    with pytest.raises(UploadRejected) as refusal:
        open_update(body, PRIVATE, **{"allow_plaintext": False, "limit": LIMIT, **options})
    return refusal.value.reason


@pytest.mark.parametrize("outer", [gzip_bytes, bytes])
def test_what_a_device_seals_opens_with_or_without_the_outer_gzip(outer):
    body = outer(seal_update(b"checkpoint", KEY.published))
    assert open_update(body, PRIVATE, allow_plaintext=False, limit=LIMIT) == b"checkpoint"


def test_a_device_envelope_has_the_three_fields_and_escaped_slashes_are_read():
    fields = json.loads(seal_update(b"checkpoint", KEY.published))
    assert fields["keyId"] == KEY.id
    assert fields["associatedData"] == "e30="
    escaped = json.dumps(fields).replace("/", "\\/").replace("=", "\\u003d").encode()
    assert open_update(escaped, PRIVATE, allow_plaintext=False, limit=LIMIT) == b"checkpoint"


def test_plaintext_counts_only_where_the_operator_allows_it():
    assert reason_of(gzip_bytes(b"checkpoint")) is Reason.UPLOAD_NOT_ENCRYPTED
    assert open_update(gzip_bytes(b"checkpoint"), PRIVATE, allow_plaintext=True, limit=LIMIT) == b"checkpoint"


def test_each_fault_has_its_reason():
    sealed = json.loads(seal_update(b"checkpoint", KEY.published))
    good = gzip_bytes(json.dumps(sealed).encode())
    assert reason_of(good[:-4]) is Reason.UPLOAD_TRUNCATED
    assert reason_of(good + b"tail") is Reason.UPLOAD_TRUNCATED
    assert reason_of(json.dumps({**sealed, "keyId": "other"}).encode()) is Reason.UNKNOWN_KEY
    assert reason_of(json.dumps({**sealed, "encryptedPayload": "!"}).encode()) is Reason.DECRYPTION_FAILED
    assert reason_of(json.dumps({**sealed, "associatedData": ""}).encode()) is Reason.DECRYPTION_FAILED
    assert reason_of(b'{"keyId": 3}') is Reason.DECRYPTION_FAILED
    assert reason_of(b"") is Reason.UPLOAD_NOT_ENCRYPTED
    assert reason_of(b"{" * 50) is Reason.UPLOAD_NOT_ENCRYPTED
    # Too many parts to find out at bearable cost whether it is a JSON object.
    assert reason_of(b"{" * 100_000) is Reason.DECRYPTION_FAILED


def test_a_bomb_stops_at_the_limit_in_either_layer():
    assert reason_of(gzip.compress(bytes(50 << 20)), limit=1 << 16) is Reason.UPLOAD_TOO_LARGE
    inner = seal_update(bytes(1 << 20), KEY.published)
    assert reason_of(gzip_bytes(inner), limit=1 << 16) is Reason.UPLOAD_TOO_LARGE


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise_anything_but_a_rejection(body):
    for candidate in (body, gzip_bytes(body), b'{"keyId":"' + body):
        reason_of(candidate)


def test_gzip_is_deterministic_and_bounded():
    assert gzip_bytes(b"a" * 100) == gzip_bytes(b"a" * 100)
    assert gunzip(gzip_bytes(b"a" * 100), 100) == b"a" * 100


def test_a_key_list_survives_publication_and_garbage_is_refused():
    assert parse_public_keys(public_keys_json([KEY.published])) == [KEY.published]
    assert KEY.private_key.hex() not in repr(KEY)
    for data in (b"", b"[]", b'{"keys":[{"id":"a"}]}', b'{"keys":[{"id":"a","key":"YQ=="}]}', b"{" * 9999):
        with pytest.raises(ArtifactInvalid):
            parse_public_keys(data)


SEALED = json.loads(seal_update(b"checkpoint", KEY.published))


def opened(body, **options):
    try:
        return open_update(body, PRIVATE, **{"allow_plaintext": True, "limit": LIMIT, **options})
    except UploadRejected as refusal:
        return refusal.reason


def in_order(names, fields, space=""):
    members = ",".join(f'{space}"{name}"{space}:{space}{json.dumps(fields[name])}{space}' for name in names)
    return f"{space}{{{members}}}{space}".encode()


@pytest.mark.parametrize("space", ["", " ", "\r\n\t "])
def test_an_envelope_opens_whatever_the_order_and_spacing_of_its_members(space):
    for names in itertools.permutations(SEALED):
        assert opened(in_order(names, SEALED, space)) == b"checkpoint"


@settings(max_examples=300)
@given(st.data())
def test_an_envelope_found_without_a_parser_is_read_as_a_parser_reads_it(data):
    body = bytearray(in_order(data.draw(st.permutations(list(SEALED))), SEALED, data.draw(st.sampled_from(["", " "]))))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(body)))
        new = data.draw(st.sampled_from([b"", b'"', b"\\", b"=", b"==", b"\n", b" ", b",", b"}", b"\xff", b"\0", b"A"]))
        body[at : at + data.draw(st.integers(0, 2))] = new
    with pytest.MonkeyPatch.context() as patch:
        found = opened(bytes(body))
        patch.setattr(envelope, "_plain_fields", lambda _: None)
        assert found == opened(bytes(body))


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_gzip_stream_is_refused_or_reads_as_zlib_reads_it(data):
    plain = data.draw(st.binary(max_size=400) | st.integers(0, 5000).map(bytes))
    packed = bytearray(gzip.compress(plain, data.draw(st.sampled_from([0, 1, 6])), mtime=0))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(packed)))
        packed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    stream = zlib.decompressobj(wbits=31)
    try:
        expected = stream.decompress(bytes(packed), LIMIT)
        expected = expected if stream.eof and not stream.unused_data else None
    except zlib.error:
        expected = None
    try:
        assert gunzip(bytes(packed), LIMIT) == expected
    except UploadRejected as refusal:
        assert (expected, refusal.reason) == (None, Reason.UPLOAD_TRUNCATED)


def test_what_we_pack_any_gunzip_reads():
    for plain in (b"", b"a", bytes(100_000), KEY.public_key * 1000):
        assert gzip.decompress(gzip_bytes(plain)) == plain
