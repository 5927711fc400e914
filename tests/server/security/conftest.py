"""Devices that prove themselves: phones with certificate chains of a maker of their own, and enrolled programs."""

import base64
import hashlib
import hmac
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedcompute.protos import task_assignments_pb2

PACKAGE = "com.android.federatedcompute.services"
DIGEST = "ab" * 32
_OID = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.1.17")
_USAGE = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


def der(tag, *parts):
    """One DER element; `tag` as its bytes."""
    body = b"".join(sorted(parts) if tag == b"\x31" else parts)  # the elements of a SET stand in order
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    length = bytes([len(body)]) if len(body) < 128 else bytes([0x80 | len(size)]) + size
    return tag + length + body


def integer(value):
    return der(b"\x02", value.to_bytes(value.bit_length() // 8 + 1, "big"))


def octets(value):
    return der(b"\x04", value)


def enumerated(value):
    return der(b"\x0a", bytes([value]))


@dataclass
class Claims:
    """What the hardware and the system of a phone say."""

    challenge: bytes = b""
    attestation_level: int = 1
    key_level: int = 1
    boot_state: int = 0
    locked: bool = True
    has_root_of_trust: bool = True
    packages: tuple[str, ...] = (PACKAGE,)
    digests: tuple[str, ...] = (DIGEST,)

    def extension(self) -> bytes:
        trust = der(
            b"\x30",
            octets(b"k" * 32),
            der(b"\x01", b"\xff" if self.locked else b"\x00"),
            enumerated(self.boot_state),
            octets(b"h" * 32),
        )
        names = der(b"\x31", *(der(b"\x30", octets(name.encode()), integer(3)) for name in self.packages))
        application = der(b"\x30", names, der(b"\x31", *(octets(bytes.fromhex(one)) for one in self.digests)))
        # Purposes, algorithm and the like stand before what is looked for, as on every real phone.
        other = [der(b"\xa1", der(b"\x31", integer(2))), der(b"\xa2", integer(3))]
        hardware = [*other, *([der(b"\xbf\x85\x40", trust)] if self.has_root_of_trust else [])]
        return der(
            b"\x30",
            integer(200),
            enumerated(self.attestation_level),
            integer(200),
            enumerated(self.key_level),
            octets(self.challenge),
            octets(b""),
            der(b"\x30", der(b"\xbf\x85\x3d", integer(1_700_000_000_000)), der(b"\xbf\x85\x45", octets(application))),
            der(b"\x30", *hardware),
        )


def name_of(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Signer:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: object
    chain: list = field(default_factory=list)  # of the certificates above it, nearest first


class Maker:
    """Makes certificates: a root, intermediates, and the leaves of attested keys."""

    def __init__(self) -> None:
        self.root = self.certificate("Root", None, ca=True)

    def certificate(
        self,
        name,
        issuer,
        *,
        ca=False,
        path_length=None,
        usage=True,
        extension=None,
        key=None,
        algorithm=None,
        start=None,
        end=None,
        critical=None,
        issuer_name=None,
    ) -> Signer:
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(name))
            .issuer_name(issuer_name or (issuer.certificate.subject if issuer else name_of(name)))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start or now - timedelta(days=1))
            .not_valid_after(end or now + timedelta(days=365))
        )
        if ca:
            builder = builder.add_extension(x509.BasicConstraints(True, path_length), critical=True)
        if usage:
            bits = _USAGE | {"key_cert_sign" if ca else "digital_signature": True}
            builder = builder.add_extension(x509.KeyUsage(**bits), critical=True)
        if extension is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(_OID, extension), critical=False)
        if critical is not None:
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(critical), b"\x05\x00")
            builder = builder.add_extension(unknown, critical=True)
        made = builder.sign(issuer.key if issuer else key, algorithm or hashes.SHA256())
        return Signer(made, key, [issuer.certificate, *issuer.chain] if issuer else [])

    def pem(self) -> bytes:
        return self.root.certificate.public_bytes(Encoding.PEM)

    def intermediate(self, **changes) -> Signer:
        return self.certificate("Batch", changes.pop("issuer", self.root), ca=changes.pop("ca", True), **changes)

    def attest(self, challenge, *, issuer=None, leaf=None, **claims) -> list[bytes]:
        """The chain of a fresh key, leaf first, root last; `leaf`: changes to its certificate."""
        issuer = issuer or self.intermediate()
        made = self.certificate("Key", issuer, extension=Claims(challenge, **claims).extension(), **(leaf or {}))
        return chain_of(made)


def chain_of(signer) -> list[bytes]:
    return [one.public_bytes(Encoding.DER) for one in (signer.certificate, *signer.chain)]


def header_of(chain) -> str:
    # As phones write it: slashes escaped.
    return json.dumps([base64.b64encode(one).decode() for one in chain]).replace("/", "\\/")


class Phone:
    """A device as the platform's client is: one token for all, stored before anybody has accepted it."""

    def __init__(self, api, owner="org.example/org.example.Worker-00") -> None:
        self.api, self.owner, self.token = api, owner, None

    def prove(self, challenge, token) -> str:
        raise NotImplementedError

    def headers(self, proof=None):
        headers = {} if self.token is None else {"odp-authorization-key": self.token}
        return headers if proof is None else {**headers, "odp-authentication-key": proof}

    def check_in(self, population, proof=None, attempts=1):
        """One check-in with its immediate repetitions; the last answer."""
        headers = {
            **self.headers(proof),
            "fcp-owner-id-digest": self.owner,
            "odp-idempotency-key": f"1 - {uuid.uuid4()}",
        }
        for _ in range(attempts):
            response = self.api.check_in(population, headers=headers)
            if response.status_code in (200, 201):
                break
        return response

    def answer(self, response, message=task_assignments_pb2.CreateTaskAssignmentResponse) -> str:
        """The proof for a challenge, with a new token."""
        challenge = challenge_in(response, message)
        self.token = str(uuid.uuid4())
        return self.prove(challenge, self.token)

    def take_part(self, population, seconds=60):
        """Checks in, with the dance if there is one, until it has an assignment."""

        def got():
            response = self.check_in(population, attempts=3)
            if response.status_code == 401:
                response = self.check_in(population, self.answer(response), attempts=3)
            assert response.status_code in (200, 201), response.content
            return assignment_in(response) if response.status_code == 201 else None

        return self.api.wait(got, seconds)

    def report(self, assignment, result=task_assignments_pb2.ReportResultRequest.COMPLETED, proof=None):
        return self.api.http.put(
            f"{self.api.url}/taskassignment/v1{assignment.self_uri}:report-result",
            content=task_assignments_pb2.ReportResultRequest(result=result).SerializeToString(),
            headers={"content-type": "application/x-protobuf", **self.headers(proof)},
        )


class AttestedPhone(Phone):
    def __init__(self, api, maker, **options) -> None:
        super().__init__(api, **options)
        self.maker, self.claims = maker, {}

    def prove(self, challenge, token):
        return header_of(self.maker.attest(challenge, **self.claims))


class EnrolledDevice(Phone):
    def __init__(self, api, enrolment_id, secret, **options) -> None:
        super().__init__(api, **options)
        self.id, self.secret = enrolment_id, secret

    def prove(self, challenge, token):
        mac = hmac.new(self.secret, challenge + token.encode(), hashlib.sha256).digest()
        return json.dumps(["enrolment:v1", self.id, base64.b64encode(mac).decode()])


def challenge_in(response, message=task_assignments_pb2.CreateTaskAssignmentResponse) -> bytes:
    assert response.status_code == 401, response.content
    challenge = message.FromString(response.content).rejection_info.auth_metadata.key_attestation_metadata.challenge
    assert 0 < len(challenge) <= 128
    return challenge


def assignment_in(response):
    return task_assignments_pb2.CreateTaskAssignmentResponse.FromString(response.content).task_assignment


@pytest.fixture(scope="session")
def maker():
    """A maker of phones whose root the servers of the tests trust."""
    return Maker()


@pytest.fixture(scope="session")
def stranger():
    """A maker whom nobody trusts."""
    return Maker()


@pytest.fixture(scope="session")
def weak_key():
    return rsa.generate_private_key(65537, 1024)


@pytest.fixture
def roots_file(tmp_path, maker):
    path = tmp_path / "roots.pem"
    path.write_bytes(maker.pem())
    return path


@pytest.fixture
def devices():
    """The kinds of device and what is read from answers to them."""
    return Devices()


class Devices:
    attested = AttestedPhone
    enrolled = EnrolledDevice
    challenge_in = staticmethod(challenge_in)
    assignment_in = staticmethod(assignment_in)
    header_of = staticmethod(header_of)
    chain_of = staticmethod(chain_of)
    claims = Claims
    package, digest = PACKAGE, DIGEST
