"""Private keys that two coordinators hold together: XOR shares of a cleartext Tink keyset (spec/server.md 7.2)."""

import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError

from fedcompute.crypto.hpke import KEY_BYTES
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import keyset_pb2

# A keyset of one key has about 150 bytes.
KEYSET_BYTES_LIMIT = 64 * 1024
_TYPE_URL = "type.googleapis.com/google.crypto.tink.HpkePrivateKey"
_SUITE = keyset_pb2.HpkeParams(
    kem=keyset_pb2.HpkeParams.DHKEM_X25519_HKDF_SHA256,
    kdf=keyset_pb2.HpkeParams.HKDF_SHA256,
    aead=keyset_pb2.HpkeParams.CHACHA20_POLY1305,
)


def join_shares(first: bytes, second: bytes) -> bytes:
    """The bytes that were split into two shares of equal length; raises ArtifactInvalid(KEY_MALFORMED).

    Formal guarantees: a one-time pad. If the shares were drawn as `random` and `random XOR secret`, either alone is
    uniform and independent of the secret. Nothing here authenticates a share: what comes out must be checked.
    """
    if not first or len(first) != len(second) or len(first) > KEYSET_BYTES_LIMIT:
        raise ArtifactInvalid(
            Reason.KEY_MALFORMED, f"shares of {len(first)} and {len(second)} bytes; they must be equally long"
        )
    return bytes(one ^ other for one, other in zip(first, second, strict=True))


def hpke_private_key(keyset: bytes) -> bytes:
    """The raw X25519 private key of a keyset's primary key, of the suite and prefix that devices use.

    Raises ArtifactInvalid(KEY_MALFORMED) for anything else; messages hold none of the bytes.

    Formal guarantees: the key fits the public half in the same keyset, so shares that do not belong together are
    refused.
    """
    if len(keyset) > KEYSET_BYTES_LIMIT:
        raise _malformed(f"{len(keyset)} bytes, over {KEYSET_BYTES_LIMIT}")
    try:
        parsed = keyset_pb2.Keyset.FromString(keyset)
        primary = [one for one in parsed.key if one.key_id == parsed.primary_key_id]
        private = keyset_pb2.HpkePrivateKey.FromString(primary[0].key_data.value) if len(primary) == 1 else None
    except DecodeError:
        raise _malformed("it is no keyset; the shares may not belong together") from None
    if private is None:
        raise _malformed(f"{len(primary)} of {len(parsed.key)} keys are primary, not one")
    key = primary[0]
    rules = {
        "it is not enabled": key.status == keyset_pb2.Keyset.ENABLED,
        "its prefix is not RAW": key.output_prefix_type == keyset_pb2.Keyset.RAW,
        "it is no HPKE private key": key.key_data.type_url == _TYPE_URL
        and key.key_data.key_material_type == keyset_pb2.KeyData.ASYMMETRIC_PRIVATE,
        "its version is not 0": private.version == 0 and private.public_key.version == 0,
        "its suite is not X25519, HKDF-SHA256, ChaCha20-Poly1305": private.public_key.params == _SUITE,
        f"it has not {KEY_BYTES} bytes": len(private.private_key) == KEY_BYTES,
    }
    for complaint, holds in rules.items():
        if not holds:
            raise _malformed(complaint)
    public = X25519PrivateKey.from_private_bytes(private.private_key).public_key().public_bytes_raw()
    if not hmac.compare_digest(public, private.public_key.public_key):
        raise _malformed("it does not fit the public key beside it")
    return private.private_key


def _malformed(complaint: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.KEY_MALFORMED, f"the key coordinators' keyset cannot be used: {complaint}")
