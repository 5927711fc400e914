"""What secure hardware says of a key it made: the attestation extension of a certificate (spec/server.md 3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat import asn1

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.security.certificates import MALFORMED

ATTESTATION_OID = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.1.17")
_ROOT_OF_TRUST = b"\xbf\x85\x40"  # the DER tag [704], explicit
_APPLICATION = b"\xbf\x85\x45"  # the DER tag [709], explicit
_ENUMERATED = b"\x0a"

T = TypeVar("T")


class SecurityLevel(IntEnum):
    """What holds a key, or made a statement about one."""

    SOFTWARE = 0
    TRUSTED_ENVIRONMENT = 1
    STRONG_BOX = 2


class BootState(IntEnum):
    """How the device's system was verified when it started."""

    VERIFIED = 0
    SELF_SIGNED = 1
    UNVERIFIED = 2
    FAILED = 3


@dataclass(frozen=True)
class KeyDescription:
    """The parts that decide: `boot_state` and `locked` as the hardware says, packages and digests as the system says.

    `boot_state` and `locked` are None if the hardware does not say. `digests`: SHA-256 of the packages' signing
    certificates, lower-case hex.
    """

    attestation_level: int
    key_level: int
    challenge: bytes
    boot_state: int | None
    locked: bool | None
    packages: tuple[str, ...]
    digests: frozenset[str]


@asn1.sequence
class _Description:
    attestation_version: int
    attestation_level: asn1.TLV
    key_version: int
    key_level: asn1.TLV
    challenge: bytes
    unique_id: bytes
    software: list[asn1.TLV]
    hardware: list[asn1.TLV]


@asn1.sequence
class _RootOfTrust:
    boot_key: bytes
    locked: bool
    state: asn1.TLV
    boot_hash: bytes | None


@asn1.sequence
class _Package:
    name: bytes
    version: int


@asn1.sequence
class _Application:
    packages: asn1.SetOf[_Package]
    digests: asn1.SetOf[bytes]


def describe_key(chain: Sequence[x509.Certificate]) -> KeyDescription:
    """What the chain (leaf first) says of the attested key; raises RequestRejected(ATTESTATION_MALFORMED).

    Formal guarantees: it is what `described_certificate` of the chain says.
    """
    return _described(chain)[1]


def described_certificate(chain: Sequence[x509.Certificate]) -> x509.Certificate:
    """The certificate of the chain (leaf first) that describes its key; raises RequestRejected(ATTESTATION_MALFORMED).

    Formal guarantees: of several certificates with the extension it is the one nearest the root. An attested key can
    sign certificates of its holder's making, all of which stand further from the root.
    """
    return _described(chain)[0]


def _described(chain: Sequence[x509.Certificate]) -> tuple[x509.Certificate, KeyDescription]:
    for certificate in reversed(chain):
        try:
            extensions = certificate.extensions
        except MALFORMED:
            raise _malformed("a certificate's extensions cannot be read") from None
        for extension in extensions:
            if extension.oid == ATTESTATION_OID and isinstance(extension.value, x509.UnrecognizedExtension):
                try:
                    return certificate, _read(extension.value.value)
                except (ValueError, TypeError, OverflowError):
                    raise _malformed("its description of the key cannot be read") from None
    raise _malformed("no certificate describes the key")


def _read(data: bytes) -> KeyDescription:
    description = asn1.decode_der(_Description, data)
    root = _entry(description.hardware, _ROOT_OF_TRUST)
    trust = None if root is None else asn1.decode_der(_RootOfTrust, root)
    wrapped = _entry(description.software, _APPLICATION)
    packages: tuple[str, ...] = ()
    digests: frozenset[str] = frozenset()
    if wrapped is not None:
        application = asn1.decode_der(_Application, asn1.decode_der(bytes, wrapped))
        packages = tuple(one.name.decode("ascii") for one in application.packages.as_list())
        digests = frozenset(one.hex() for one in application.digests.as_list())
    return KeyDescription(
        attestation_level=_enumerated(description.attestation_level),
        key_level=_enumerated(description.key_level),
        challenge=description.challenge,
        boot_state=None if trust is None else _enumerated(trust.state),
        locked=None if trust is None else trust.locked,
        packages=packages,
        digests=digests,
    )


def _entry(entries: Sequence[asn1.TLV], tag: bytes) -> bytes | None:
    found = [bytes(entry.data) for entry in entries if entry.tag_bytes == tag]
    if len(found) > 1:
        raise ValueError("an entry comes twice")
    return found[0] if found else None


def _enumerated(value: asn1.TLV) -> int:
    data = bytes(value.data)
    if value.tag_bytes != _ENUMERATED or len(data) != 1:
        raise ValueError("no small ENUMERATED")
    return data[0]


def _malformed(detail: str) -> RequestRejected:
    return RequestRejected(Reason.ATTESTATION_MALFORMED, f"the attestation: {detail}")
