"""TLS from files: the server's certificate chain and private key, read again when they change."""

import logging
import ssl
import threading
import time
from pathlib import Path

from fedcompute.errors import OperationFailed, Reason

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0


class _KeyIsEncryptedError(Exception):
    """Nobody sits there to type a passphrase."""


class Certificate:
    """The certificate that new connections are shown.

    Whoever renews it replaces both files; connections from the next second on have the new one. While the files do
    not fit each other, the old one stays.

    Formal guarantees: TLS 1.2 or 1.3 with forward-secret, authenticated ciphers only (AES-GCM and
    ChaCha20-Poly1305 after ECDHE); assumes that the key file is readable by the server only. A client that resumes a
    session from before a change of certificate is not shown the new one.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises OperationFailed(TLS_INVALID) if a file cannot be read, is no PEM, or they do not belong together."""
        self._certificate = certificate
        self._key = key
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._stamp = self._stamps()
        self._current = _context(certificate, key)
        self._outer = _context(certificate, key)
        self._outer.sni_callback = self._choose

    @property
    def context(self) -> ssl.SSLContext:
        """What a listening socket takes; it shows each connection the newest certificate."""
        return self._outer

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        self._look()
        connection.context = self._current

    def _look(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked < _LOOK_SECONDS:
                return
            self._looked = time.monotonic()
            stamp = self._stamps()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._current = _context(self._certificate, self._key)
            except OperationFailed as error:
                _LOG.error("the new certificate is not used: %s", error)
            else:
                _LOG.warning("the certificate has changed; new connections have the new one")

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for path in (self._certificate, self._key):
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return found


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    for what, path in (("certificate", certificate), ("key", key)):
        try:
            with path.open("rb") as opened:
                opened.read(1)
        except OSError as error:
            raise OperationFailed(Reason.TLS_INVALID, f"tls_{what}: {path} cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")

    def refuse() -> bytes:
        raise _KeyIsEncryptedError

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except _KeyIsEncryptedError:
        raise OperationFailed(
            Reason.TLS_INVALID, f"tls_key: {key} is encrypted", remedy="store it decrypted, readable by the server only"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise OperationFailed(Reason.TLS_INVALID, f"the key {key} does not belong to {certificate}") from None
        why = f": {error.reason}" if error.reason else ""
        raise OperationFailed(
            Reason.TLS_INVALID, f"{certificate} and {key} are no PEM certificate and key{why}"
        ) from None
    return context
