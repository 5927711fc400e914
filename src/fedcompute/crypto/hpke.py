"""Hybrid public-key encryption of device updates: RFC 9180, base mode, single shot (spec/server.md 7.1).

KEM DHKEM(X25519, HKDF-SHA256), KDF HKDF-SHA256, AEAD ChaCha20-Poly1305. What the protocol calls associated data
is HPKE's `info`; the AEAD's own associated data is empty.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected

KEY_BYTES = 32
# Encapsulated key and authentication tag.
OVERHEAD_BYTES = 32 + 16
# What devices send as associated data.
DEVICE_INFO = b"{}"

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def seal(public_key: bytes, plaintext: bytes, info: bytes = DEVICE_INFO) -> bytes:
    """Encrypts `plaintext` to a raw 32-byte X25519 public key; returns encapsulated key, ciphertext and tag joined.

    Raises ArtifactInvalid (KEY_MALFORMED) for a key of another length or a low-order point.

    Formal guarantees: IND-CCA2 for the holder of the private key (RFC 9180 section 9.1); the sender is not
    authenticated, so a sealed update says nothing about who sent it. Ephemeral keys come from the operating system.
    """
    if len(public_key) != KEY_BYTES:
        raise ArtifactInvalid(Reason.KEY_MALFORMED, f"X25519 keys have {KEY_BYTES} bytes, not {len(public_key)}")
    try:
        return _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info=info)
    except ValueError as cause:
        raise ArtifactInvalid(Reason.KEY_MALFORMED, "the X25519 public key is not usable") from cause


def open_sealed(private_key: bytes, sealed: bytes, info: bytes = DEVICE_INFO) -> bytes:
    """Decrypts what `seal` made for the public half of a raw 32-byte X25519 `private_key`.

    Raises UploadRejected (DECRYPTION_FAILED) if anything of key, info or ciphertext does not fit.

    Formal guarantees: returns the plaintext that was sealed under this key and `info`, or raises; no partial
    plaintext leaves this function (ChaCha20-Poly1305 is verified before release).
    """
    if len(sealed) < OVERHEAD_BYTES:
        raise UploadRejected(
            Reason.DECRYPTION_FAILED, f"a sealed update has at least {OVERHEAD_BYTES} bytes, not {len(sealed)}"
        )
    try:
        return _SUITE.decrypt(sealed, X25519PrivateKey.from_private_bytes(private_key), info=info)
    except (InvalidTag, ValueError) as cause:
        raise UploadRejected(Reason.DECRYPTION_FAILED, f"{len(sealed)} sealed bytes do not decrypt") from cause
