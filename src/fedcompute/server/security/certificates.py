"""Chains of X.509 certificates up to a root that the operator trusts (spec/server.md 3.4)."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedcompute.errors import Reason, RequestRejected

E = TypeVar("E", bound=x509.ExtensionType)

CHAIN_LIMIT = 10
CERTIFICATE_BYTES_LIMIT = 16 * 1024
_HASHES = ("sha256", "sha384", "sha512")
_RSA_BITS = 2048
_CURVE_BITS = 256
# A critical extension that nobody here reads could say that the certificate is not for this.
_READ_HERE = (x509.oid.ExtensionOID.BASIC_CONSTRAINTS, x509.oid.ExtensionOID.KEY_USAGE)
# What a certificate that is not as it should be makes the library raise.
MALFORMED = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)


def read_chain(chain: Sequence[bytes]) -> list[x509.Certificate]:
    """The certificates of a chain in DER, leaf first; raises RequestRejected(ATTESTATION_MALFORMED)."""
    if not 1 <= len(chain) <= CHAIN_LIMIT:
        raise _malformed(f"{len(chain)} certificates; 1 to {CHAIN_LIMIT} are taken")
    if any(len(one) > CERTIFICATE_BYTES_LIMIT for one in chain):
        raise _malformed(f"a certificate has more than {CERTIFICATE_BYTES_LIMIT} bytes")
    try:
        return [x509.load_der_x509_certificate(one) for one in chain]
    except MALFORMED:
        raise _malformed("something in the chain is no certificate") from None


def check_chain(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: datetime) -> None:
    """Raises RequestRejected(ATTESTATION_UNTRUSTED) unless a trusted root vouches for every certificate, leaf first.

    The chain may end with the root or with a certificate that the root issued.

    Formal guarantees: on return one of `roots` signed the last certificate or is it (same name and key); every
    certificate is signed by the one after it; every issuer is valid at `now`, is a CA that may sign certificates, and
    its path length allows what stands below it; no signature uses a hash weaker than SHA-256, an RSA key below 2048
    bits, a curve below 256, or a key of another kind; no critical extension was left unread. These are the checks of
    RFC 5280, section 6.1, that apply to chains without policies and name constraints, which critical extensions would
    announce, with two differences: a certificate that an issuer makes for its own name counts towards its path length
    like any other, and the dates of the leaf, which the device writes by its own clock, say nothing; how fresh it is
    its challenge tells.
    """
    try:
        # The root as the operator has it: of a copy that the device sends nobody has checked the signature.
        same = [root for root in roots if _same(chain[-1], root)]
        issuers = [root for root in roots if _issued(chain[-1], root)]
        if not same and not issuers:
            raise _untrusted("it does not lead to a trusted root")
        anchored = [*chain[:-1], same[0]] if same else [*chain, issuers[0]]
        for depth, certificate in enumerate(anchored):
            _check_certificate(certificate, now, is_issuer=depth > 0, below=depth - 1)
        for subject, issuer in pairwise(anchored):
            if not _issued(subject, issuer):
                raise _untrusted("a certificate is not signed by the next one")
    except MALFORMED:
        raise _untrusted("a certificate cannot be read") from None


def _check_certificate(certificate: x509.Certificate, now: datetime, *, is_issuer: bool, below: int) -> None:
    if any(one.critical and one.oid not in _READ_HERE for one in certificate.extensions):
        raise _untrusted("a certificate has a critical extension that is not known here")
    key, signed_with = certificate.public_key(), certificate.signature_hash_algorithm
    is_short = isinstance(key, rsa.RSAPublicKey) and key.key_size < _RSA_BITS
    is_weak = is_short or (isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < _CURVE_BITS)
    # Attested keys may be for anything; issuers sign.
    is_other = is_issuer and not isinstance(key, (rsa.RSAPublicKey, ec.EllipticCurvePublicKey))
    if is_weak or is_other or signed_with is None or signed_with.name not in _HASHES:
        raise _untrusted("a certificate uses weak cryptography")
    if not is_issuer:
        return
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise _untrusted("an issuer is not valid now")
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise _untrusted("a certificate was issued by one that is no CA")
    if constraints.path_length is not None and below > constraints.path_length:
        raise _untrusted("the chain is longer than one of its issuers allows")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise _untrusted("a certificate was issued by one that may not sign certificates")


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _issued(subject: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        subject.verify_directly_issued_by(issuer)
    except (InvalidSignature, *MALFORMED):
        return False
    return True


def _same(one: x509.Certificate, root: x509.Certificate) -> bool:
    return one.subject == root.subject and _key(one) == _key(root)


def _key(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _malformed(detail: str) -> RequestRejected:
    return RequestRejected(Reason.ATTESTATION_MALFORMED, f"the attestation: {detail}")


def _untrusted(detail: str) -> RequestRejected:
    return RequestRejected(Reason.ATTESTATION_UNTRUSTED, f"the attestation's chain: {detail}")
