"""A server that speaks https, with a certificate made for the test."""

import socket
import ssl
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.settings import Settings
from fedcompute.server.tls import Certificate


@pytest.fixture
def make_certificate(tmp_path):
    """Returns make(name, passphrase=None) -> (certificate, key), files for `localhost` under these names."""

    def make(name, passphrase=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(key, hashes.SHA256())
        )
        hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        pair = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        pair[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        pair[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, hidden))
        return pair

    return make


def shown(port, trusted):
    """The common name of the certificate that a new connection is shown."""
    with (
        socket.create_connection(("localhost", port)) as plain,
        ssl.create_default_context(cafile=trusted).wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return dict(entry[0] for entry in secured.getpeercert()["subject"])["commonName"]


def test_a_server_with_a_certificate_speaks_https_and_says_so_in_its_urls(run_server, make_certificate):
    certificate, key = make_certificate("first")
    running = run_server(tls_certificate=certificate, tls_key=key)
    url = running.settings.base_url
    assert url == f"https://localhost:{running.settings.port}"
    with httpx.Client(verify=ssl.create_default_context(cafile=certificate)) as trusting:
        assert trusting.get(f"{url}/ready", timeout=30).status_code == 200
        running.api.http, replaced = trusting, running.api.http
        replaced.close()
        task = running.api.create_task("private")
        assert task.init_checkpoint_url[0].startswith(f"{url}/blobs/v1/")
        assert trusting.put(task.init_checkpoint_url[0], content=b"some bytes").status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/ready")
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http") + "/ready")
    running.api.http = httpx.Client()


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_nothing_older_than_tls_1_2_is_spoken(run_server, make_certificate):
    certificate, key = make_certificate("strict")
    running = run_server(tls_certificate=certificate, tls_key=key)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(certificate)
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("localhost", running.settings.port)) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain, server_hostname="localhost")


def test_new_connections_have_the_new_certificate_and_a_broken_one_changes_nothing(run_server, make_certificate):
    certificate, key = make_certificate("first")
    running = run_server(tls_certificate=certificate, tls_key=key)
    port = running.settings.port
    assert shown(port, certificate) == "first"
    others = make_certificate("second")
    both = certificate.with_name("both.crt")
    both.write_bytes(certificate.read_bytes() + others[0].read_bytes())
    # A certificate without its key, as for a moment in every renewal.
    certificate.write_bytes(others[0].read_bytes())
    time.sleep(1.1)
    assert shown(port, both) == "first"
    key.write_bytes(others[1].read_bytes())
    running.api.wait(lambda: shown(port, both) == "second")
    key.unlink()
    time.sleep(1.1)
    assert shown(port, both) == "second"


def test_files_that_do_not_fit_are_refused_at_start(make_certificate, tmp_path):
    certificate, key = make_certificate("one")
    other = make_certificate("other")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("no PEM")
    for files, words in (
        ((certificate, other[1]), "does not belong"),
        ((certificate, tmp_path / "missing"), "cannot be read"),
        ((nonsense, key), "no PEM"),
        ((certificate, nonsense), "no PEM"),
        ((certificate, make_certificate("hidden", b"passphrase")[1]), "is encrypted"),
    ):
        with pytest.raises(OperationFailed, match=words) as refused:
            Certificate(*files)
        assert refused.value.reason is Reason.TLS_INVALID


def test_certificate_and_key_are_set_together():
    with pytest.raises(OperationFailed, match="tls_key"):
        Settings(tls_certificate="server.crt")
