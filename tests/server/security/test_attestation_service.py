"""An external verification service, played by a small HTTP server on loopback."""

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2

Rejection = federatedcompute_pb2.RejectionReason
Answer = task_assignments_pb2.CreateTaskAssignmentResponse
API_KEY = "key-of-the-service-1234567890"


class Service:
    """What the service answers; every call is kept with its headers and body."""

    def __init__(self, package) -> None:
        self.calls, self.challenge = [], b"challenge of the service"
        self.challenge_status = self.verify_status = 200
        self.delay = 0.0
        self.body = None
        self.document = {
            "verificationResult": "KEY_ATTESTATION_RECORD_VERIFICATION_RESULT_OK",
            "keyDescription": {
                "softwareEnforced": {"attestationApplicationId": {"packageInfos": [{"name": package, "version": "3"}]}},
                "teeEnforced": {"rootOfTrust": {"verifiedBootState": "VERIFIED", "deviceLocked": True}},
            },
        }

    def answer(self, path, headers, body):
        self.calls.append((path, headers, body))
        time.sleep(self.delay)
        if path.endswith(":generateChallenge"):
            document = {"challenge": base64.b64encode(self.challenge).decode(), "expireTime": "ignored"}
            return self.challenge_status, json.dumps(document).encode() if self.body is None else self.body
        return self.verify_status, json.dumps(self.document).encode() if self.body is None else self.body


@pytest.fixture
def service(devices):
    played = Service(devices.package)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            status, answer = played.answer(self.path, self.headers, json.loads(body))
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    played.url = f"http://localhost:{server.server_address[1]}/v1/projects/test"
    yield played
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "service.key"
    path.write_text(f"{API_KEY}\n")
    return path


@pytest.fixture
def running(run_server, service, key_file, devices):
    return run_server(
        authentication="attestation",
        attestation_service_url=service.url,
        attestation_service_key_file=key_file,
        attestation_packages=(f"{devices.package}={devices.digest}",),
    )


@pytest.fixture
def phone(running, maker, devices):
    return devices.attested(running.api, maker)


def verdict(phone):
    """What a phone hears that answers a challenge."""
    return phone.check_in("digits", phone.answer(phone.check_in("digits")))


def info_of(response):
    info = Answer.FromString(response.content).rejection_info
    assert info.retry_window.delay_min.ToMilliseconds() == 60_000
    assert info.retry_window.delay_max.ToMilliseconds() == 300_000
    return info


def counts(running):
    return running.app.state.context.authentication.counts.all()


def test_the_service_makes_the_challenge_and_verifies_the_record(running, service, phone, devices):
    challenged = phone.check_in("digits", attempts=3)
    assert devices.challenge_in(challenged) == service.challenge
    # Three attempts of one request cost the service one call.
    assert len(service.calls) == 1
    path, headers, body = service.calls[0]
    assert path == "/v1/projects/test:generateChallenge"
    assert headers["x-goog-api-key"] == API_KEY
    assert headers["accept"] == "application/json"
    assert headers["content-type"] == "application/json; utf-8"
    assert body == {"ttl": {"seconds": 3600}}
    proof = phone.answer(challenged)
    assert phone.check_in("digits", proof).status_code == 200
    path, _, body = service.calls[1]
    assert path == "/v1/projects/test:verifyKeyAttestationRecord"
    assert body == {"keyAttestationCertificateChain": json.loads(proof), "internalChallengeTtl": {"seconds": 3600}}
    # The token is enough from now on.
    assert phone.check_in("digits").status_code == 200
    assert len(service.calls) == 2


def test_the_overall_verdict_of_the_service_counts(running, service, phone):
    for result in ("KEY_ATTESTATION_RECORD_VERIFICATION_RESULT_CHALLENGE_MISMATCH", "", None):
        service.document["verificationResult"] = result
        response = verdict(phone)
        assert response.status_code == 403
        assert info_of(response).reason == Rejection.UNAUTHORIZED
        phone.token = None
    assert counts(running)["refused: attestation_untrusted"] == 3


def test_a_record_that_the_service_refuses_is_refused(service, phone):
    service.verify_status = 400
    response = verdict(phone)
    assert response.status_code == 403
    assert info_of(response).reason == Rejection.UNAUTHORIZED


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["teeEnforced"]["rootOfTrust"].update(verifiedBootState="UNVERIFIED"),
        lambda d: d["teeEnforced"]["rootOfTrust"].update(deviceLocked=False),
        lambda d: d["softwareEnforced"]["attestationApplicationId"].update(packageInfos=[]),
        lambda d: d["softwareEnforced"]["attestationApplicationId"].update(packageInfos=[{"name": "org.evil"}]),
        lambda d: d["softwareEnforced"]["attestationApplicationId"]["packageInfos"].append({"name": "org.evil"}),
    ],
)
def test_a_verified_record_of_a_device_that_is_not_as_it_must_be_is_refused(service, phone, change):
    change(service.document["keyDescription"])
    response = verdict(phone)
    assert response.status_code == 403
    assert info_of(response).reason == Rejection.UNAUTHORIZED


def test_the_signature_digest_is_checked_although_the_service_does_not(service, phone):
    phone.claims = {"digests": ("cd" * 32,)}
    assert verdict(phone).status_code == 403


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_verification_that_fails_is_no_refusal(running, service, phone, status):
    service.verify_status = status
    response = verdict(phone)
    assert response.status_code == 200
    assert info_of(response).reason == Rejection.UNAUTHENTICATED
    assert counts(running) == {"challenged": 1, "service failed: verification": 1}
    service.verify_status = 200
    phone.token = None
    assert Answer.FromString(verdict(phone).content).rejection_info.reason == Rejection.NO_ACTIVE_TASK_EXISTS


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b"not json", b'{"keyDescription": 1}', b"[" * 100_000, b"x" * (2 << 20)]
)
def test_an_answer_without_its_structure_is_a_failure_of_the_service(service, phone, body):
    challenged = phone.check_in("digits")
    proof = phone.answer(challenged)
    service.body = body
    response = phone.check_in("digits", proof)
    assert response.status_code == 200
    assert info_of(response).reason == Rejection.UNAUTHENTICATED


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_challenge_that_cannot_be_had_is_no_refusal(running, service, phone, status):
    service.challenge_status = status
    response = phone.check_in("digits")
    assert response.status_code == 200
    assert info_of(response).reason == Rejection.UNAUTHORIZED
    assert counts(running) == {"service failed: challenge": 1}


@pytest.mark.parametrize("challenge", [b"", bytes(129)])
def test_a_challenge_that_no_phone_could_answer_is_a_failure_of_the_service(service, phone, challenge):
    service.challenge = challenge
    assert info_of(phone.check_in("digits")).reason == Rejection.UNAUTHORIZED


def test_a_service_that_does_not_answer_holds_no_device_for_long(service, phone):
    service.delay = 20
    start = time.monotonic()
    assert phone.check_in("digits").status_code == 200
    assert time.monotonic() - start < 15
    service.delay = 0


def test_the_key_of_the_service_is_neither_shown_nor_logged(running, service, phone, caplog):
    service.verify_status = 500
    verdict(phone)
    assert API_KEY not in repr(running.settings)
    assert API_KEY not in caplog.text
    assert any("cannot be judged" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "changes",
    [
        {"authentication": "attestation"},
        {"authentication": "attestation", "attestation_packages": ("p",)},
        {"authentication": "both", "attestation_service_url": "https://x", "attestation_packages": ("p",)},
        {"authentication": "attestation", "attestation_service_url": "https://x", "attestation_packages": ("p",)},
        {
            "authentication": "attestation",
            "attestation_service_url": "http://x.example",
            "attestation_packages": ("p",),
        },
        {"authentication": "sometimes"},
    ],
)
def test_settings_that_could_authenticate_nobody_are_refused(tmp_path, hand_made, changes):
    with pytest.raises(OperationFailed) as refusal:
        hand_made.settings_of(tmp_path, **changes)
    assert refusal.value.reason is Reason.SETTINGS_INVALID
