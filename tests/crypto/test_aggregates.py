import base64
import gzip
import json
from datetime import UTC, datetime, timedelta

import pytest

from fedcompute.crypto.aggregates import open_aggregate, seal_aggregate
from fedcompute.crypto.hpke import open_sealed
from fedcompute.crypto.keys import generate_key_pair
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason

SUM = b"\x0a\x03abc" * 1000
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def pair():
    return generate_key_pair(datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=1))


def test_an_encrypted_sum_is_layered_as_an_upload_with_empty_associated_data(pair):
    stored = seal_aggregate(SUM, pair.published)
    wrapper = json.loads(gzip.decompress(stored))
    assert wrapper["keyId"] == pair.id
    assert wrapper["associatedData"] == ""
    sealed = base64.b64decode(wrapper["encryptedPayload"])
    assert gzip.decompress(open_sealed(pair.private_key, sealed, b"")) == SUM


def test_sums_open_however_they_were_stored(pair):
    keys = {pair.id: pair.private_key}
    for key in (pair.published, None):
        assert open_aggregate(seal_aggregate(SUM, key), keys, limit=LIMIT) == SUM
    # As the reference writes them: without the outer gzip in plain, and with escapes in the JSON text.
    assert open_aggregate(SUM, {}, limit=LIMIT) == SUM
    escaped = gzip.decompress(seal_aggregate(SUM, pair.published)).replace(b"=", b"\\u003d")
    assert open_aggregate(gzip.compress(escaped), keys, limit=LIMIT) == SUM


def test_a_sum_that_does_not_open_is_malformed(pair):
    stored = seal_aggregate(SUM, pair.published)
    for data, keys, limit in (
        (stored, {}, LIMIT),
        (stored, {pair.id: bytes(range(32))}, LIMIT),
        (stored, {pair.id: pair.private_key}, 100),
        (stored[:-9], {pair.id: pair.private_key}, LIMIT),
        (seal_aggregate(SUM, None), {}, 100),
    ):
        with pytest.raises(ArtifactInvalid) as raised:
            open_aggregate(data, keys, limit=limit)
        assert raised.value.reason is Reason.PARTIAL_SUM_MALFORMED


def test_a_key_service_that_does_not_answer_is_no_fault_of_the_sum(pair):
    class Down(dict):
        def get(self, key, default=None):
            raise OperationFailed(Reason.KEY_SERVICE_FAILED, "down")

    with pytest.raises(OperationFailed):
        open_aggregate(seal_aggregate(SUM, pair.published), Down(), limit=LIMIT)
