"""Every byte that docs/protocol.md prints."""

import base64
import gzip
import hashlib
import hmac
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedcompute.crypto.hpke import open_sealed
from fedcompute.crypto.keys import parse_public_keys
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.security.enrolment import proof_mac

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
BLOCK = re.compile(
    r"<!-- (?P<kind>bytes|base64|request|answer): (?P<name>[\w-]+) -->\n```\w+\n(?P<text>.*?)\n```", re.DOTALL
)
BLOCKS = {(found["kind"], found["name"]): found["text"] for found in BLOCK.finditer(PAGE.read_text())}
TOKEN = "1b0f6c1e-7a1d-4c3b-9a58-3f6b6f0c9d2e"


def printed(name):
    return bytes.fromhex(BLOCKS["bytes", name])


def request(name, api, session=""):
    """A printed request with its printed body, for a server that listens elsewhere."""
    text = BLOCKS["request", name].replace("SESSION", session).replace("localhost:8080", urlsplit(api.url).netloc)
    return ("\r\n".join(text.splitlines()) + "\r\n\r\n").encode() + printed(name)


@pytest.fixture
def send(api, reference):
    return lambda data: reference.exchange("localhost", urlsplit(api.url).port, "http", data)


def test_the_page_holds_what_is_checked_here():
    assert len(BLOCKS) == PAGE.read_text().count("<!-- ") == 10


def test_printed_messages_are_those_that_the_text_names():
    check_in = task_assignments_pb2.CreateTaskAssignmentRequest.FromString(printed("check-in"))
    assert check_in.client_version.version_code == "341717000"
    assert list(check_in.resource_capabilities.supported_compression_formats) == [1]
    report = task_assignments_pb2.ReportResultRequest.FromString(printed("report"))
    assert report.result == task_assignments_pb2.ReportResultRequest.COMPLETED
    away = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(printed("turned-away")).rejection_info
    assert away.reason == federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE
    assert (away.retry_window.delay_min.seconds, away.retry_window.delay_max.seconds) == (60, 300)
    told = task_assignments_pb2.ReportResultResponse.FromString(printed("turned-away")).rejection_info
    assert told == away
    asked = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(printed("challenge")).rejection_info
    assert asked.reason == federatedcompute_pb2.RejectionReason.UNAUTHENTICATED
    assert asked.auth_metadata.key_attestation_metadata.challenge == bytes(range(40))


def test_the_server_takes_the_printed_requests(api, hand_made, send):
    status, _, body = send(request("check-in", api))
    assert status == 200
    assert task_assignments_pb2.CreateTaskAssignmentResponse.FromString(body).HasField("rejection_info")
    api.open_task("digits", hand_made.process_of())
    status, headers, body = api.wait(lambda: (answer := send(request("check-in", api)))[0] == 201 and answer)
    assert headers["content-type"] == "application/x-protobuf"
    assignment = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(body).task_assignment
    assert (assignment.population_name, assignment.task_id, assignment.aggregation_id) == ("digits", "1", "1")
    assert send(request("check-in", api))[2].count(assignment.assignment_id.encode()) == 2
    status, _, body = send(request("report", api, assignment.assignment_id))
    assert status == 200
    instruction = task_assignments_pb2.ReportResultResponse.FromString(body).upload_instruction
    assert dict(instruction.extra_request_headers) == {
        "content-type": "application/octet-stream",
        "content-encoding": "gzip",
    }


def test_the_printed_payload_opens_with_the_printed_key(reference):
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = printed("private-key")
    sealed = base64.b64decode(BLOCKS["base64", "sealed"], validate=True)
    assert gzip.decompress(open_sealed(private, sealed, b"{}")) == b"an update"
    (key,) = parse_public_keys(BLOCKS["answer", "keys"].encode())
    assert key.key == X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    assert (
        gzip.decompress(open_sealed(private, reference.hpke_seal(key.key, gzip.compress(b"x"), b"{}"), b"{}")) == b"x"
    )


def test_the_published_keys_have_the_printed_form(api):
    published = api.http.get(f"{api.url}/.well-known/odp/v1/public-keys")
    assert published.json().keys() == json.loads(BLOCKS["answer", "keys"]).keys()
    assert published.json()["keys"][0].keys() == {"id", "key"}


def test_the_printed_proof_of_an_enrolment_is_right():
    secret, challenge = bytes(range(32)), bytes(range(40))
    mac = base64.b64decode(BLOCKS["base64", "enrolment"], validate=True)
    assert mac == hmac.new(secret, challenge + TOKEN.encode(), hashlib.sha256).digest()
    assert mac == proof_mac(secret, challenge, TOKEN)
    assert TOKEN in PAGE.read_text()


def test_the_numbers_of_the_page_are_those_of_the_server():
    from fedcompute.server import connection
    from fedcompute.server.api import admission
    from fedcompute.server.security import limits
    from fedcompute.server.settings import Settings

    text = PAGE.read_text()
    assert connection.HEAD_BYTES_LIMIT == limits.MESSAGE_LIMIT == 64 * 1024
    assert Settings.max_upload_bytes == 128 * 1024 * 1024
    assert (
        f"{admission.CHECK_IN_S:g} s for a check-in, {admission.PLACE_S + admission.REPORT_S:g} s for a report" in text
    )
    assert f"| {limits.PATIENCE_S:g} s of waiting" in text
    assert f"| {connection.PATIENCE_S:g} s |" in text
    assert (Settings.retry_no_task.minimum, Settings.retry_no_task.maximum) == (60, 300)
