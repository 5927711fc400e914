import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedcompute.crypto.hpke import open_sealed, seal
from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected

KEM_SUITE = b"KEM" + (0x0020).to_bytes(2, "big")
HPKE_SUITE = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x0020, 0x0001, 0x0003))


def extract(salt: bytes, key: bytes) -> bytes:
    mac = hmac.HMAC(salt or bytes(32), hashes.SHA256())
    mac.update(key)
    return mac.finalize()


def labeled_extract(suite, salt, label, key):
    return extract(salt, b"HPKE-v1" + suite + label + key)


def labeled_expand(suite, key, label, info, length):
    labeled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(hashes.SHA256(), length, labeled).derive(key)


def open_by_the_rfc(private: X25519PrivateKey, sealed: bytes, info: bytes) -> bytes:
    """RFC 9180 sections 4.1 and 5.1 from X25519, HKDF and ChaCha20-Poly1305, independent of the library's HPKE."""
    encapsulated, ciphertext = sealed[:32], sealed[32:]
    shared = private.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    context = encapsulated + private.public_key().public_bytes_raw()
    eae = labeled_extract(KEM_SUITE, b"", b"eae_prk", shared)
    secret = labeled_expand(KEM_SUITE, eae, b"shared_secret", context, 32)
    schedule = (
        b"\x00"
        + labeled_extract(HPKE_SUITE, b"", b"psk_id_hash", b"")
        + labeled_extract(HPKE_SUITE, b"", b"info_hash", info)
    )
    key_secret = labeled_extract(HPKE_SUITE, secret, b"secret", b"")
    key = labeled_expand(HPKE_SUITE, key_secret, b"key", schedule, 32)
    nonce = labeled_expand(HPKE_SUITE, key_secret, b"base_nonce", schedule, 12)
    return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, b"")


def test_sealed_bytes_open_by_the_steps_of_the_rfc_with_info_as_associated_data():
    private = X25519PrivateKey.generate()
    sealed = seal(private.public_key().public_bytes_raw(), b"update", b"{}")
    assert open_by_the_rfc(private, sealed, b"{}") == b"update"
    assert open_sealed(private.private_bytes_raw(), sealed, b"{}") == b"update"


@pytest.mark.parametrize("damage", ["info", "key", "bit", "short"])
def test_any_damage_is_a_decryption_failure(damage):
    private = X25519PrivateKey.generate()
    sealed = bytearray(seal(private.public_key().public_bytes_raw(), b"update", b"{}"))
    info = b"" if damage == "info" else b"{}"
    key = X25519PrivateKey.generate() if damage == "key" else private
    if damage == "bit":
        sealed[40] ^= 1
    if damage == "short":
        del sealed[30:]
    with pytest.raises(UploadRejected) as refusal:
        open_sealed(key.private_bytes_raw(), bytes(sealed), info)
    assert refusal.value.reason is Reason.DECRYPTION_FAILED


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), bytes(32)])
def test_an_unusable_public_key_is_refused(key):
    with pytest.raises(ArtifactInvalid) as refusal:
        seal(key, b"update")
    assert refusal.value.reason is Reason.KEY_MALFORMED
