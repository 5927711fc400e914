import gzip
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert reason_of(b"{" * 100_000) is Reason.UPLOAD_NOT_ENCRYPTED


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
