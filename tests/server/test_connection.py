import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from fedcompute.server import connection
from fedcompute.server.security import limits

CHECK_IN = b"POST /taskassignment/v1/population/p:create-task-assignment HTTP/1.1\r\nHost: x\r\n"
CHECK_IN += b"Content-Type: application/x-protobuf\r\n"


@pytest.fixture
def impatient(monkeypatch, run_server):
    monkeypatch.setattr(connection, "PATIENCE_S", 0.4)
    monkeypatch.setattr(limits, "PATIENCE_S", 0.4)
    return run_server()


def talk(server, *pieces, pause=0.0, seconds=30.0):
    """Sends the pieces and returns what came back, and whether the server ended the connection in time."""
    received = b""
    with socket.create_connection(("127.0.0.1", urlsplit(server.api.url).port)) as client:
        client.settimeout(seconds)
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
            while part := client.recv(65536):
                received += part
        except TimeoutError:
            return received, False
        except OSError:
            return received, True
    return received, True


@pytest.mark.parametrize("start", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_client_that_never_finishes_the_head_of_its_request_is_cut_off(impatient, start):
    received, ended = talk(impatient, start)
    assert (received, ended) == (b"", True)
    assert httpx.get(f"{impatient.api.url}/healthz").status_code == 200


def test_dripping_a_head_byte_by_byte_buys_no_time(impatient):
    assert talk(impatient, b"GET / HTTP/1.1\r\n", *[b"X"] * 30, pause=0.1)[1]


@pytest.mark.parametrize(
    "rest", [[b"Content-Length: 10\r\n\r\nabc"], [b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\na\r\n"] * 20]]
)
def test_a_body_that_stalls_or_drips_is_answered_408(impatient, rest):
    received, ended = talk(impatient, CHECK_IN + rest[0], *rest[1:], pause=0.1)
    assert ended
    if len(rest) == 1:
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b"request_too_slow" in received


def test_a_client_that_sends_on_after_a_refusal_is_cut_off(impatient):
    head = b"PUT /blobs/v1/model/a?expires=1&signature=x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    received, ended = talk(impatient, head, *[b"1\r\na\r\n"] * 30, pause=0.1)
    assert received.startswith(b"HTTP/1.1 403 ") or received == b""
    assert ended


def test_a_slow_body_within_its_allowance_is_taken(impatient):
    received, _ = talk(
        impatient, CHECK_IN + b"Connection: close\r\nContent-Length: 4\r\n\r\n", b"\x0a\x02", b"\x0a\x00"
    )
    assert received.startswith(b"HTTP/1.1 200 ")


def test_a_server_that_stops_tells_an_upload_under_way_and_stores_nothing_of_it(
    monkeypatch, tmp_path, run_server, hand_made, caplog
):
    monkeypatch.setattr("fedcompute.app.GRACE_SECONDS", 1)
    server = run_server()
    server.api.open_task("stopping", hand_made.process_of(), goal=1)
    instruction = server.api.upload_instruction(server.api.assignment("stopping"))
    place = urlsplit(instruction.upload_location)
    head = f"PUT {place.path}?{place.query} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in instruction.extra_request_headers.items())
    with socket.create_connection(("127.0.0.1", place.port)) as client:
        client.sendall(head.encode() + b"\r\nhalf an update")
        time.sleep(0.2)
        server.stop()
        client.settimeout(30)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"server_stopping" in answer
    assert not [path for path in (server.settings.data_dir / "blobs" / "gradient").rglob("*") if path.is_file()]
    assert "Traceback" not in caplog.text


def test_a_client_that_does_not_take_its_answer_is_cut_off(impatient):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", urlsplit(impatient.api.url).port))
        client.settimeout(60)
        with pytest.raises(OSError, match=r"(?i)reset|broken|aborted"):
            pile_up(client)


def pile_up(client):
    """Asks for ever and reads nothing; in the end the server stops waiting for its answers to be taken."""
    while True:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
