"""Answers that no honest key or verification service gives, from a real server on loopback."""

import gzip
import socket
import threading
import time

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.security import attestation_service, key_fetch
from fedcompute.server.security.attestation import DevicePolicy
from fedcompute.server.security.attestation_service import AttestationService

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n"
BOMB = gzip.compress(bytes(1 << 20))
SQUEEZED = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b" % (len(BOMB), BOMB)


@pytest.fixture
def serve():
    """Returns serve(answer) -> URL of a server that sends those bytes, and then a space every tenth of a second."""
    listener = socket.create_server(("127.0.0.1", 0))

    def start(answer):
        def run():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(65_536)
                        connection.sendall(answer)
                        while True:
                            time.sleep(0.1)
                            connection.sendall(b" ")
                    except OSError:
                        continue

        threading.Thread(target=run, daemon=True).start()
        return f"http://localhost:{listener.getsockname()[1]}"

    yield start
    # Wakes whoever waits in accept().
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.mark.parametrize("answer", [HEAD, SQUEEZED], ids=["drips", "compressed"])
def test_an_answer_that_never_ends_or_is_compressed_is_an_outage_of_the_key_service(serve, answer):
    start = time.monotonic()
    with key_fetch.client(5.0) as http, pytest.raises(OperationFailed) as raised:
        key_fetch.get(http, serve(answer), {}, limit=65_536, seconds=1.0)
    assert raised.value.reason is Reason.KEY_SERVICE_FAILED
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("answer", [HEAD, SQUEEZED], ids=["drips", "compressed"])
def test_an_answer_that_never_ends_or_is_compressed_is_an_outage_of_the_attestation_service(serve, answer, monkeypatch):
    monkeypatch.setattr(attestation_service, "_LONGEST_S", 1.0)
    service = AttestationService(serve(answer), "key", DevicePolicy({}))
    start = time.monotonic()
    with pytest.raises(OperationFailed) as raised:
        service.challenge(None)
    service.close()
    assert raised.value.reason is Reason.ATTESTATION_UNAVAILABLE
    assert time.monotonic() - start < 10
