import contextlib
import json
import logging
import socket
import time
from types import SimpleNamespace
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


@pytest.fixture
def server(api):
    """One server for the tests that leave its clocks alone."""
    return SimpleNamespace(api=api)


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


def test_a_server_that_stops_tells_an_upload_under_way_and_stores_nothing_of_it(run_server, hand_made, caplog):
    server = run_server(stop_grace=1)
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
        # A sender is woken when a third of its buffer is free: of a large one that is minutes on a busy machine.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        client.connect(("127.0.0.1", urlsplit(impatient.api.url).port))
        client.settimeout(120)
        with pytest.raises(OSError, match=r"(?i)reset|broken|aborted"):
            pile_up(client)


def pile_up(client):
    """Asks for ever and reads nothing; in the end the server stops waiting for its answers to be taken."""
    while True:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 50)


HEAD_LIMIT = 64 * 1024


def refusal(answer):
    """Status and document of the one answer in the bytes; its length must be what its head says."""
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert int(fields[b"content-length"]) == len(body), answer
    assert fields[b"connection"] == b"close"
    return int(head.split()[1]), json.loads(body)["code"]


def head_of(size, name=b"X-Long"):
    """A request whose head has exactly `size` bytes."""
    start = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + name + b": "
    return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"


def many_headers(size):
    lines = b"".join(b"x-%05d: %s\r\n" % (number, b"v" * 80) for number in range(size // 90))
    return b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"


def test_a_head_of_64_kib_passes_and_one_byte_more_is_a_typed_431(server):
    assert talk(server, head_of(HEAD_LIMIT))[0].startswith(b"HTTP/1.1 200 ")
    assert refusal(talk(server, head_of(HEAD_LIMIT + 1))[0]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "request_bytes",
    [
        head_of(200_000),
        head_of(5_000_000),
        many_headers(200_000),
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Blank:" + b" " * 100_000 + b"x\r\n\r\n",
    ],
    ids=["one header", "one huge header", "many headers", "path", "white space"],
)
@pytest.mark.parametrize("step", [10_000_000, 4096])
def test_a_head_over_64_kib_is_refused_however_it_arrives(server, request_bytes, step):
    pieces = [request_bytes[start : start + step] for start in range(0, min(len(request_bytes), 500_000), step)]
    assert refusal(talk(server, *pieces)[0]) == (431, "headers_too_large")


def test_the_second_request_of_a_connection_has_the_same_limit(server):
    first = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    received, _ = talk(server, first + head_of(HEAD_LIMIT))
    assert received.count(b"HTTP/1.1 200 ") == 2
    received, _ = talk(server, first + head_of(HEAD_LIMIT + 1))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert refusal(received[received.index(b"HTTP/1.1 431") :]) == (431, "headers_too_large")


def test_a_certificate_chain_of_40_kib_passes(server):
    chain = b"odp-authentication-key: [" + b",".join([b'"' + b"A" * 10_000 + b'"'] * 4) + b"]\r\n"
    request = CHECK_IN + chain + b"Connection: close\r\nContent-Length: 4\r\n\r\n\x0a\x02\x0a\x00"
    assert talk(server, request)[0].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"no http at all\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad name: y\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Nul: \x00\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_typed_400_with_its_length(server, request_bytes):
    assert refusal(talk(server, request_bytes)[0]) == (400, "malformed_request")


SMUGGLED = b"GET /api/v1/tasks HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd" + SMUGGLED,
        b"Content-Length: 4, 5\r\n\r\nabcd" + SMUGGLED,
        b"Content-Length: -1\r\n\r\n" + SMUGGLED,
        b"Content-Length: +4\r\n\r\nabcd" + SMUGGLED,
        b"Content-Length: 0x4\r\n\r\nabcd" + SMUGGLED,
        b"Content-Length: 99999999999999999999999\r\n\r\nabcd" + SMUGGLED,
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: zero\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabcd\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabcd\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\n\r\n0x4\r\nabcd\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\nabcd\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcdef\r\n0\r\n\r\n" + SMUGGLED,
    ],
)
def test_a_request_whose_length_is_in_doubt_is_refused_and_nothing_behind_it_is_heard(server, framing):
    received, ended = talk(server, CHECK_IN + framing)
    assert ended
    assert received.count(b"HTTP/1.1 ") == 1, received
    status, code = refusal(received)
    assert status in (400, 413, 501)
    assert code in ("malformed_request", "request_too_large")


def test_a_body_without_end_is_refused_and_cut_off(server):
    head = CHECK_IN + b"Transfer-Encoding: chunked\r\n\r\n"
    received, ended = talk(server, head, *[b"10000\r\n" + bytes(65536) + b"\r\n"] * 50)
    assert ended
    assert received == b"" or received.startswith(b"HTTP/1.1 413 ")


def test_connections_that_say_nothing_make_room_for_those_that_do(monkeypatch, server):
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 20)
    port = urlsplit(server.api.url).port
    half = b"POST /taskassignment/v1/population/p:create-task-assignment HTTP/1.1\r\nHost: x\r\n"
    body = b"Content-Type: application/x-protobuf\r\nContent-Length: 4\r\n\r\n"
    busy = socket.create_connection(("127.0.0.1", port), 30)
    busy.sendall(half + body.replace(b"4", b"62") + b"\x0a\x3c\x0a\x3a")
    idle = []
    try:
        for number in range(58):
            idle.append(socket.create_connection(("127.0.0.1", port), 30))
            idle[-1].sendall(half + body if number % 2 else half)
            # Slow, but not silent.
            busy.sendall(b"1")
            time.sleep(0.01)
        assert httpx.get(f"{server.api.url}/healthz", timeout=30).status_code == 200
        idle[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(100) == b""
        # Who sends stays; 58 digits are no version.
        assert busy.recv(1000).startswith(b"HTTP/1.1 400 ")
    finally:
        for one in (busy, *idle):
            one.close()


def test_nonsense_fills_no_log(server, caplog):
    time.sleep(1.1)
    with caplog.at_level(logging.INFO, logger="fedcompute.server.connection"):
        for _ in range(20):
            talk(server, b"nonsense\r\n\r\n")
            talk(
                server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
            )
    lines = [record for record in caplog.records if record.name in ("fedcompute.server.connection", "uvicorn.error")]
    assert 1 <= len(lines) < 15
