"""Secrets at rest under one operator secret: what a copied database reveals is nothing without it.

Every value is sealed for one place, its table and name, so that it opens nowhere else.
"""

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcompute.crypto.secret_box import KEY_BYTES, open_secret, seal_secret
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason

SECRET_BYTES_MIN = 32
SECRET_BYTES_LIMIT = 4096
ONE_SECRET = "give every server of one database the same secret: --secret-file or FEDCOMPUTE_SECRET"
_ID_BYTES = 8
_PLACEHOLDER = b"CHANGE"
_INFO = b"fedcompute: secrets at rest, version 1"


@dataclass(frozen=True)
class Sealer:
    """Seals and opens under one operator secret. `id` names the secret wherever a sealed value is stored.

    Formal guarantees: key and id are separate outputs of HKDF-SHA256 (RFC 5869), so the id tells nothing about the
    key. Values are confidential and authentic, with their place, as `secret_box.seal_secret` states.
    """

    id: str
    key: bytes = field(repr=False)

    def seal(self, context: str, value: bytes) -> tuple[bytes, str]:
        """The sealed value, and the id to store beside it. `context`: see `place`.

        Formal guarantees: as the class; two seals of one value differ.
        """
        return seal_secret(self.key, value, context.encode()), self.id

    def open(self, context: str, value: bytes, sealed_with: str | None) -> bytes:
        """The value that was sealed for `context`.

        Raises ArtifactInvalid(SECRET_UNREADABLE) for a value in plain, under another secret (both ids are named), of
        another place, or changed.

        Formal guarantees: returns only what a holder of this secret sealed for this very place.
        """
        if sealed_with is None:
            raise ArtifactInvalid(Reason.SECRET_UNREADABLE, f"{context} is stored in plain")
        if sealed_with != self.id:
            raise ArtifactInvalid(
                Reason.SECRET_UNREADABLE,
                f"{context} is sealed with operator secret {sealed_with}, this process has {self.id}",
                remedy=ONE_SECRET,
            )
        try:
            return open_secret(self.key, value, context.encode())
        except ArtifactInvalid as error:
            raise ArtifactInvalid(Reason.SECRET_UNREADABLE, f"{context}: {error.detail}") from None


def sealer_of(secret: bytes) -> Sealer:
    """The sealer of an operator secret, which must be random: 32 bytes or more, as a file or variable holds them.

    White space around it does not count. Raises OperationFailed(SETTINGS_INVALID) for a secret of another length.

    Formal guarantees: HKDF-SHA256 keeps the entropy that `secret` has and adds none: 32 random bytes give AES-256 its
    full strength, a password does not.
    """
    secret = secret.strip()
    if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_LIMIT:
        detail = f"the operator secret has {len(secret)} bytes, not {SECRET_BYTES_MIN} to {SECRET_BYTES_LIMIT}"
        raise OperationFailed(
            Reason.SETTINGS_INVALID, detail, remedy="make one with: openssl rand -base64 32, and keep a copy of it"
        )
    if secret.upper().startswith(_PLACEHOLDER):
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            "the operator secret is the placeholder of an example",
            remedy="make one with: openssl rand -base64 32, and keep a copy of it",
        )
    material = HKDF(SHA256(), KEY_BYTES + _ID_BYTES, salt=None, info=_INFO).derive(secret)
    return Sealer(material[KEY_BYTES:].hex(), material[:KEY_BYTES])


def place(table: str, name: str) -> str:
    """The context of a row's secret: its table and what the row is found by."""
    return f"{table}/{name}"
