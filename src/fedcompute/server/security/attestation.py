"""Android key attestation: whether a chain proves an untampered device with a known client (spec/server.md 3.4)."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.server.security.certificates import MALFORMED, check_chain, read_chain
from fedcompute.server.security.key_description import (
    BootState,
    KeyDescription,
    SecurityLevel,
    describe_key,
    described_certificate,
)
from fedcompute.server.security.revocation import RevocationList

_HARDWARE = (SecurityLevel.TRUSTED_ENVIRONMENT, SecurityLevel.STRONG_BOX)
_PEM_LIMIT = 1024 * 1024
_PACKAGE = re.compile(r"(?P<name>[A-Za-z0-9_.]{1,256})=(?P<digests>[0-9A-Fa-f]{64}(\+[0-9A-Fa-f]{64})*)")


@dataclass(frozen=True)
class DevicePolicy:
    """What an attested device must be. `packages`: allowed package -> SHA-256 digests of its signing certificates."""

    packages: Mapping[str, frozenset[str]]
    allow_rooted: bool = False

    def check(self, description: KeyDescription) -> None:
        """Raises RequestRejected: ATTESTATION_DEVICE, ATTESTATION_PACKAGE.

        Formal guarantees: on return secure hardware holds the key and made the statement; unless rooted devices are
        allowed, the hardware says that the device started a verified system and its boot loader is locked; every
        package that the system names as the key's owner is allowed, and so is every certificate that signed it. What
        the system says is worth as much as that system: nothing on a rooted device.
        """
        if description.attestation_level not in _HARDWARE or description.key_level not in _HARDWARE:
            raise RequestRejected(Reason.ATTESTATION_DEVICE, "no secure hardware holds the attested key")
        if not self.allow_rooted and description.boot_state != BootState.VERIFIED:
            raise RequestRejected(Reason.ATTESTATION_DEVICE, "the device did not start a verified system")
        if not self.allow_rooted and description.locked is not True:
            raise RequestRejected(Reason.ATTESTATION_DEVICE, "the device's boot loader is not locked")
        if not description.packages or not description.digests:
            raise RequestRejected(Reason.ATTESTATION_PACKAGE, "the attestation names no package or no signature")
        for package in description.packages:
            allowed = self.packages.get(package)
            if allowed is None:
                raise RequestRejected(Reason.ATTESTATION_PACKAGE, "the attested package is not on the list")
            if not description.digests <= allowed:
                raise RequestRejected(Reason.ATTESTATION_PACKAGE, "the attested package has another signature")


@dataclass(frozen=True)
class LocalVerifier:
    """Verifies attestations without any service: trusted roots, revoked serial numbers, a policy."""

    roots: Sequence[x509.Certificate] = field(repr=False)
    revoked: RevocationList | None
    policy: DevicePolicy

    def verify(self, chain: Sequence[bytes], is_open: Callable[[bytes], bool], now: datetime) -> str:
        """Returns the name of the attestation: one is one, however it is encoded. `chain`: DER, leaf first.

        `is_open(challenge)` says whether the server asked with it and still waits for the answer. Raises
        RequestRejected: ATTESTATION_MALFORMED, _UNTRUSTED, _REVOKED, _STALE, _DEVICE, _PACKAGE.

        Formal guarantees: on return the chain is as `check_chain` says, none of its certificates is revoked, and the
        description nearest the root carries an open challenge and satisfies the policy; so hardware that a trusted
        root vouches for made the key after the challenge was. Assumes honest hardware with unextracted keys.
        """
        certificates = read_chain(chain)
        check_chain(certificates, self.roots, now)
        if self.revoked is not None and self.revoked.holds(certificates):
            raise RequestRejected(Reason.ATTESTATION_REVOKED, "a certificate of the attestation is revoked")
        description = describe_key(certificates)
        if not is_open(description.challenge):
            raise RequestRejected(Reason.ATTESTATION_STALE, "the attestation answers no open challenge")
        self.policy.check(description)
        return attestation_name(certificates)


def attestation_name(chain: Sequence[x509.Certificate]) -> str:
    """SHA-256, in hex, of what the issuer of the described key signed; `chain`: leaf first.

    Formal guarantees: two encodings of a signature give one name, and so do all keys that one attested key vouches for;
    two attestations give two, as each has its own key.
    """
    return hashlib.sha256(described_certificate(chain).tbs_certificate_bytes).hexdigest()


def read_roots(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file; raises OperationFailed(SETTINGS_INVALID)."""
    try:
        with path.open("rb") as file:
            return x509.load_pem_x509_certificates(file.read(_PEM_LIMIT))
    except (OSError, *MALFORMED) as error:
        why = error.strerror if isinstance(error, OSError) else "no certificates in PEM"
        raise OperationFailed(Reason.SETTINGS_INVALID, f"setting attestation_roots: {why}") from None


def read_packages(entries: Sequence[str]) -> dict[str, frozenset[str]]:
    """Allowed packages from `NAME=DIGEST` or `NAME=DIGEST+DIGEST`; raises ValueError."""
    packages: dict[str, frozenset[str]] = {}
    for entry in entries:
        match = _PACKAGE.fullmatch(entry.strip())
        if match is None:
            raise ValueError(f"{entry[:100]!r} is no package=SHA-256 of its signing certificate in hex")
        packages[match["name"]] = packages.get(match["name"], frozenset()) | set(match["digests"].lower().split("+"))
    return packages
