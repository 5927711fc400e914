"""Keysets as Tink writes them, here put together byte by byte from the published message numbers."""

import base64
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcompute.crypto.hpke import open_sealed, seal
from fedcompute.crypto.keyset import KEYSET_BYTES_LIMIT, hpke_private_key, join_shares
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import keyset_pb2

# Made once with Tink itself (tink 1.16.1, template DHKEM_X25519_HKDF_SHA256_HKDF_SHA256_CHACHA20_POLY1305_RAW): a
# serialized keyset for this test only, and what its public half encrypted with two context infos.
TINK_KEYSET = base64.b64decode(
    "CL/+o8gBEpYBCokBCjV0eXBlLmdvb2dsZWFwaXMuY29tL2dvb2dsZS5jcnlwdG8udGluay5IcGtlUHJpdmF0ZUtleRJOEioSBggBEAEYAxoglldN7AJj"
    "jl7Dmn/Ts7U5t8zTV3d0Rr1HXi/+Jk2zax4aIFf1JyvbINKikCum7bGPvI4FmJvwykLV1R8hQq18XAOkGAIQARi//qPIASAD"
)
TINK_SEALED = {
    b"{}": "A9gNnPspwsX+OJCfGCi2TH2ysShc8ACz6XPuI1g0HienSqvcKgBfBZIQ3+zz3ed0lXjgsuEFcqQcdzeDWtuD+QxSWU3rV+i5pyAiEMQJ",
    b"": "EVoy11XRuwU2KGI6eeiROhlP8L/RwnKzEhg8OmwvN0laet43s2FosyK5nJ/OPtxxFkkhu8lhcIp0ch73MyacXNd2X+35sg/oYoE7FCWf",
}
TYPE_URL = b"type.googleapis.com/google.crypto.tink.HpkePrivateKey"


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number, value):
    """One protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def keyset(private, *, public=None, suite=(1, 1, 3), status=1, prefix=3, url=TYPE_URL, material=2, key_id=0xFEDC0DE5):
    public = private.public_key().public_bytes_raw() if public is None else public
    params = b"".join(field(number, value) for number, value in enumerate(suite, 1))
    value = field(2, field(2, params) + field(3, public)) + field(3, private.private_bytes_raw())
    data = field(1, url) + field(2, value) + field(3, material)
    key = field(1, data) + field(2, status) + field(3, key_id) + field(4, prefix)
    return field(1, key_id) + field(2, key)


@pytest.fixture
def private():
    return X25519PrivateKey.generate()


def test_a_keyset_gives_the_raw_key_that_opens_what_was_sealed_to_its_public_half(private):
    raw = hpke_private_key(keyset(private))
    assert raw == private.private_bytes_raw()
    assert open_sealed(raw, seal(private.public_key().public_bytes_raw(), b"update")) == b"update"


@pytest.mark.parametrize("info", [b"{}", b""])
def test_what_tink_wrote_and_encrypted_opens(info):
    sealed = base64.b64decode(TINK_SEALED[info])
    assert open_sealed(hpke_private_key(TINK_KEYSET), sealed, info) == b"an update, as Tink encrypts it"


def test_two_shares_join_to_the_keyset_and_one_alone_is_no_keyset(private):
    whole = keyset(private)
    first = secrets.token_bytes(len(whole))
    second = bytes(one ^ other for one, other in zip(first, whole, strict=True))
    assert join_shares(first, second) == join_shares(second, first) == whole
    for share in (first, second):
        with pytest.raises(ArtifactInvalid):
            hpke_private_key(share)


@pytest.mark.parametrize(("first", "second"), [(b"", b""), (b"ab", b"a"), (b"a" * (KEYSET_BYTES_LIMIT + 1),) * 2])
def test_shares_that_cannot_belong_together_are_refused(first, second):
    with pytest.raises(ArtifactInvalid) as raised:
        join_shares(first, second)
    assert raised.value.reason is Reason.KEY_MALFORMED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suite": (1, 1, 2)}, "suite"),
        ({"suite": (1, 1)}, "suite"),
        ({"suite": (2, 1, 3)}, "suite"),
        ({"status": 2}, "enabled"),
        ({"prefix": 1}, "RAW"),
        ({"url": TYPE_URL.replace(b"Private", b"Public")}, "private"),
        ({"material": 3}, "private"),
        ({"public": bytes(32)}, "public"),
        ({"public": b""}, "public"),
    ],
)
def test_a_keyset_of_another_kind_is_refused_with_the_reason(private, change, words):
    with pytest.raises(ArtifactInvalid) as raised:
        hpke_private_key(keyset(private, **change))
    assert raised.value.reason is Reason.KEY_MALFORMED
    assert words in raised.value.detail


def test_the_primary_key_counts_and_there_is_exactly_one(private):
    other = X25519PrivateKey.generate()
    both = keyset_pb2.Keyset.FromString(keyset(private))
    both.key.extend(keyset_pb2.Keyset.FromString(keyset(other, key_id=7)).key)
    assert hpke_private_key(both.SerializeToString()) == private.private_bytes_raw()
    both.primary_key_id = 7
    assert hpke_private_key(both.SerializeToString()) == other.private_bytes_raw()
    both.primary_key_id = 8
    with pytest.raises(ArtifactInvalid):
        hpke_private_key(both.SerializeToString())


def test_no_error_shows_a_byte_of_the_key(private):
    broken = keyset(private, public=bytes(32))
    for data in (broken, broken[:-1], broken[:40], secrets.token_bytes(200), b"", broken + b"\xff"):
        with pytest.raises(ArtifactInvalid) as raised:
            hpke_private_key(data)
        assert raised.value.__cause__ is None
        assert private.private_bytes_raw().hex() not in str(raised.value)
        assert repr(private.private_bytes_raw())[2:12] not in str(raised.value)
