import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.server.security.attestation import DevicePolicy, LocalVerifier, read_packages, read_roots
from fedcompute.server.security.revocation import RevocationList

CHALLENGE = b"c" * 40


@pytest.fixture
def verify(maker, devices):
    """Verifies a chain as a server does that trusts the maker and waits for `CHALLENGE`."""

    def run(chain, *, allow_rooted=False, revoked=None, now=None, packages=None):
        policy = DevicePolicy(packages or {devices.package: frozenset({devices.digest})}, allow_rooted)
        verifier = LocalVerifier([maker.root.certificate], revoked, policy)
        return verifier.verify(chain, lambda challenge: challenge == CHALLENGE, now or datetime.now(UTC))

    return run


@pytest.fixture
def refuses(verify):
    def check(reason, chain, **options):
        with pytest.raises(RequestRejected) as refusal:
            verify(chain, **options)
        assert refusal.value.reason is reason, refusal.value

    return check


def test_a_genuine_phone_passes_with_and_without_the_root_at_the_end_of_its_chain(maker, verify):
    chain = maker.attest(CHALLENGE)
    assert len(chain) == 3
    assert verify(chain) == verify(chain[:-1])


@pytest.mark.parametrize("level", [1, 2])
def test_a_key_in_a_trusted_environment_or_a_strong_box_passes(maker, verify, level):
    assert verify(maker.attest(CHALLENGE, attestation_level=level, key_level=level))


def test_a_chain_with_several_intermediates_and_elliptic_curves_of_other_sizes_passes(maker, verify):
    first = maker.intermediate(key=ec.generate_private_key(ec.SECP384R1()), algorithm=hashes.SHA384())
    second = maker.intermediate(issuer=first, algorithm=hashes.SHA512())
    assert verify(maker.attest(CHALLENGE, issuer=second))


def test_two_attestations_have_two_names_and_one_has_one(maker, verify):
    first, second = maker.attest(CHALLENGE), maker.attest(CHALLENGE)
    assert verify(first) == verify(first) != verify(second)


def test_a_chain_of_another_maker_is_refused(stranger, refuses):
    refuses(Reason.ATTESTATION_UNTRUSTED, stranger.attest(CHALLENGE))
    refuses(Reason.ATTESTATION_UNTRUSTED, stranger.attest(CHALLENGE)[:-1])


def test_a_root_that_only_has_the_name_of_a_trusted_one_is_refused(maker, refuses):
    fake = type(maker)()
    assert fake.root.certificate.subject == maker.root.certificate.subject
    refuses(Reason.ATTESTATION_UNTRUSTED, fake.attest(CHALLENGE))


def test_a_copy_of_the_root_with_other_contents_changes_nothing(maker, stranger, verify, refuses):
    # Same name and key, signed by somebody else, and long past its end: what counts is the operator's own copy.
    past = datetime.now(UTC) - timedelta(days=10)
    copy = stranger.certificate(
        "Root", stranger.root, key=maker.root.key, start=past - timedelta(days=1), end=past, ca=False
    )
    chain = maker.attest(CHALLENGE)
    assert verify([*chain[:-1], copy.certificate.public_bytes(Encoding.DER)]) == verify(chain)


def test_a_certificate_that_the_next_one_did_not_sign_is_refused(maker, stranger, refuses):
    chain, other = maker.attest(CHALLENGE), maker.attest(CHALLENGE)
    refuses(Reason.ATTESTATION_UNTRUSTED, [chain[0], other[1], other[2]])
    refuses(Reason.ATTESTATION_UNTRUSTED, [chain[0], chain[2]])
    refuses(Reason.ATTESTATION_UNTRUSTED, [*reversed(chain)])
    refuses(Reason.ATTESTATION_UNTRUSTED, [*chain, stranger.attest(CHALLENGE)[-1]])


@pytest.mark.parametrize("days", [(-10, -5), (5, 10)])
def test_an_issuer_that_is_not_valid_now_is_refused_and_the_clock_of_a_phone_does_not_matter(
    maker, verify, refuses, days
):
    now = datetime.now(UTC)
    span = {"start": now + timedelta(days=days[0]), "end": now + timedelta(days=days[1])}
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, issuer=maker.intermediate(**span)))
    assert verify(maker.attest(CHALLENGE, leaf=span))


def test_a_root_that_has_ended_vouches_for_nobody(maker, refuses):
    later = datetime.now(UTC) + timedelta(days=400)
    leaf = {"end": later + timedelta(days=1)}
    issuer = maker.intermediate(end=later + timedelta(days=1))
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, issuer=issuer, leaf=leaf), now=later)


@pytest.mark.parametrize("changes", [{"ca": False}, {"ca": False, "usage": False}])
def test_a_certificate_issued_by_one_that_is_no_ca_is_refused(maker, refuses, changes):
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, issuer=maker.intermediate(**changes)))


def test_an_attested_key_cannot_vouch_for_another_key(maker, refuses, devices):
    # The holder of a genuine key signs a certificate with a description of its own making.
    genuine = maker.certificate("Key", maker.intermediate(), extension=devices.claims(b"old").extension())
    forged = maker.certificate("Forged", genuine, extension=devices.claims(CHALLENGE).extension())
    refuses(Reason.ATTESTATION_UNTRUSTED, devices.chain_of(forged))


def test_of_several_descriptions_the_one_nearest_the_root_is_believed(maker, refuses, verify, devices):
    inner = maker.intermediate(extension=devices.claims(b"old").extension())
    refuses(Reason.ATTESTATION_STALE, maker.attest(CHALLENGE, issuer=inner))
    inner = maker.intermediate(extension=devices.claims(CHALLENGE).extension())
    assert verify(maker.attest(b"whatever the leaf says", issuer=inner, boot_state=2))


def test_all_keys_that_one_attested_key_vouches_for_are_one_attestation(maker, verify, devices):
    # Keys made to attest others may be CAs; their holder has as many of those as it likes.
    attesting = maker.intermediate(extension=devices.claims(CHALLENGE).extension())
    others = [maker.attest(b"", issuer=attesting) for _ in range(2)]
    plain = devices.chain_of(maker.certificate("Key", attesting))
    assert len({verify(one) for one in [*others, plain]}) == 1


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP192R1()), dsa.generate_private_key(1024)], ids=["curve", "kind"]
)
def test_an_issuer_with_a_weak_key_or_one_of_another_kind_is_refused(maker, refuses, key):
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, issuer=maker.intermediate(key=key)))


def test_a_chain_longer_than_an_issuer_allows_is_refused(maker, verify, refuses):
    last = maker.intermediate(path_length=0)
    assert verify(maker.attest(CHALLENGE, issuer=last))
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, issuer=maker.intermediate(issuer=last)))


def test_weak_keys_and_unknown_critical_extensions_are_refused(maker, refuses, weak_key):
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, issuer=maker.intermediate(key=weak_key)))
    refuses(Reason.ATTESTATION_UNTRUSTED, maker.attest(CHALLENGE, leaf={"critical": "1.2.3.4.5"}))


def test_an_attestation_that_answers_no_open_challenge_is_refused(maker, refuses):
    refuses(Reason.ATTESTATION_STALE, maker.attest(b"d" * 40))
    refuses(Reason.ATTESTATION_STALE, maker.attest(b""))


@pytest.mark.parametrize(
    "claims",
    [
        {"attestation_level": 0},
        {"key_level": 0},
        {"attestation_level": 3},
        {"boot_state": 1},
        {"boot_state": 2},
        {"boot_state": 3},
        {"locked": False},
        {"has_root_of_trust": False},
    ],
)
def test_a_device_without_secure_hardware_or_with_another_system_is_refused(maker, refuses, claims):
    refuses(Reason.ATTESTATION_DEVICE, maker.attest(CHALLENGE, **claims))


def test_rooted_devices_pass_where_they_are_allowed_and_software_keys_still_do_not(maker, verify, refuses):
    assert verify(maker.attest(CHALLENGE, boot_state=2, locked=False), allow_rooted=True)
    assert verify(maker.attest(CHALLENGE, has_root_of_trust=False), allow_rooted=True)
    refuses(Reason.ATTESTATION_DEVICE, maker.attest(CHALLENGE, key_level=0), allow_rooted=True)


def test_every_attested_package_and_every_signature_must_be_on_the_list(maker, verify, refuses, devices):
    for claims in (
        {"packages": ("org.evil",)},
        {"packages": ("org.evil", devices.package)},
        {"packages": (devices.package, "org.evil")},
        {"packages": ()},
        {"digests": ("cd" * 32,)},
        {"digests": (devices.digest, "cd" * 32)},
        {"digests": ()},
    ):
        refuses(Reason.ATTESTATION_PACKAGE, maker.attest(CHALLENGE, **claims))
    both = read_packages([f"{devices.package}={devices.digest.upper()}+{'cd' * 32}", f"org.other={'cd' * 32}"])
    assert verify(maker.attest(CHALLENGE, digests=("cd" * 32,)), packages=both)
    assert verify(maker.attest(CHALLENGE, digests=("cd" * 32,), packages=(devices.package, "org.other")), packages=both)
    refuses(Reason.ATTESTATION_PACKAGE, maker.attest(CHALLENGE, packages=("org.other",)), packages=both)


@pytest.mark.parametrize("chain", [[], [b""], [b"\x30\x00"], [b"\x30" * 1000], [bytes(20_000)], [b"x"] * 11])
def test_something_that_is_no_chain_is_refused(refuses, chain):
    refuses(Reason.ATTESTATION_MALFORMED, chain)


def test_a_chain_without_description_is_refused(maker, refuses, devices):
    refuses(Reason.ATTESTATION_MALFORMED, devices.chain_of(maker.certificate("Key", maker.intermediate())))


def test_a_damaged_description_is_refused_wherever_the_damage_is(maker, verify, devices):
    whole = devices.claims(CHALLENGE).extension()
    issuer = maker.intermediate()
    read = []
    for place in range(len(whole)):
        # Only the place of the damage matters, so every chain may share one key.
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        leaf = maker.certificate("Key", issuer, extension=bytes(damaged), key=issuer.key)
        try:
            read.append(verify(devices.chain_of(leaf)))
        except RequestRejected:
            continue
    # What was read says the same of what decides: versions, dates and boot hashes do not.
    assert len(read) < len(whole) / 2
    for end in range(0, len(whole), 7):
        leaf = maker.certificate("Key", issuer, extension=whole[:end], key=issuer.key)
        with pytest.raises(RequestRejected):
            verify(devices.chain_of(leaf))


def serial_of(der):
    return f"{x509.load_der_x509_certificate(der).serial_number:x}"


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("status", ["REVOKED", "SUSPENDED"])
def test_a_revoked_certificate_anywhere_in_the_chain_is_refused(tmp_path, maker, refuses, place, status):
    chain = maker.attest(CHALLENGE)
    file = tmp_path / "status.json"
    file.write_text(json.dumps({"entries": {serial_of(chain[place]): {"status": status, "reason": "KEY_COMPROMISE"}}}))
    refuses(Reason.ATTESTATION_REVOKED, chain, revoked=RevocationList(file))


def test_a_serial_number_in_decimal_is_on_the_list_too(tmp_path, maker, refuses):
    chain = maker.attest(CHALLENGE)
    file = tmp_path / "status.json"
    serial = x509.load_der_x509_certificate(chain[1]).serial_number
    file.write_text(json.dumps({"entries": {str(serial): {"status": "REVOKED"}}}))
    refuses(Reason.ATTESTATION_REVOKED, chain, revoked=RevocationList(file))


def test_the_revocation_list_is_read_again_when_it_changes_and_a_damaged_one_leaves_the_last_in_force(
    tmp_path, maker, verify, refuses, caplog
):
    file = tmp_path / "status.json"
    file.write_text('{"entries": {}}')
    revoked = RevocationList(file)
    first, second = maker.attest(CHALLENGE), maker.attest(CHALLENGE)
    assert verify(first, revoked=revoked)

    def write(text):
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").replace(file)

    write(json.dumps({"entries": {"00" + serial_of(first[0]).upper(): {"status": "REVOKED"}}}))
    refuses(Reason.ATTESTATION_REVOKED, first, revoked=revoked)
    assert verify(second, revoked=revoked)
    write('{"entries": ')
    refuses(Reason.ATTESTATION_REVOKED, first, revoked=revoked)
    file.unlink()
    refuses(Reason.ATTESTATION_REVOKED, first, revoked=revoked)
    assert len(caplog.records) == 2
    write('{"entries": {}}')
    assert verify(first, revoked=revoked)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": []}', '{"entries": {"zz": {}}}', "[" * 100_000])
def test_a_server_does_not_start_with_a_list_that_it_cannot_read(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(OperationFailed) as refusal:
        RevocationList(tmp_path / "status.json")
    assert refusal.value.reason is Reason.SETTINGS_INVALID


def test_roots_and_packages_that_cannot_be_read_are_refused(tmp_path, roots_file):
    assert len(read_roots(roots_file)) == 1
    (tmp_path / "empty.pem").write_text("nothing")
    for path in (tmp_path / "empty.pem", tmp_path / "none.pem"):
        with pytest.raises(OperationFailed) as refusal:
            read_roots(path)
        assert refusal.value.reason is Reason.SETTINGS_INVALID
    for entry in ("org.example", "org.example=", "org.example=ab", f"org example={'ab' * 32}", f"={'ab' * 32}"):
        with pytest.raises(ValueError, match="SHA-256"):
            read_packages([entry])
