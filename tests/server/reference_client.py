"""A client that follows spec/device.md step by step, on sockets: what phones do, with their accidents.

Nothing of our device runtime is used here, so that one misreading cannot hide the other. Loaded by `conftest.py`.
"""

import base64
import gzip
import json
import os
import random
import socket
import ssl
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedcompute.protos import federatedcompute_pb2, plan_pb2, task_assignments_pb2

ATTEMPTS = 3
CONNECT_S, READ_S = 5, 30
TWO_DAYS_MS = 2 * 86_400_000
CHECKPOINT_LIMIT = 50_000_000
USER_AGENT = "Dalvik/2.1.0 (Linux; U; Android 15; Pixel 8 Build/AP4A.250105.002)"
GZIP = federatedcompute_pb2.RESOURCE_COMPRESSION_FORMAT_GZIP
Report = task_assignments_pb2.ReportResultRequest


class RunFailed(Exception):
    """The run ends with an exception: transient delay, failure counted."""


class Crash(RunFailed):
    """The client would have met a null pointer: a server must never bring it here."""


@dataclass
class Answer:
    """What the platform's HTTP library hands to the client."""

    status: int
    headers: dict[str, str]  # lower-case names, as a map that ignores case
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status in (200, 201)


@dataclass
class Sent:
    """One attempt as it left the device, and the status of its answer, None if none was read."""

    method: str
    url: str
    head: bytes
    body: bytes
    status: int | None = None


@dataclass
class Run:
    """How a run ended: whether it succeeded, else whether the failure counts and the window, if the server gave one."""

    succeeded: bool
    counted: bool = False
    window_ms: tuple[int, int] | None = None
    delay_ms: float | None = None
    assignment: task_assignments_pb2.TaskAssignment | None = None
    cause: str = ""


@dataclass
class ReferenceClient:
    """One phone. `compute(plan, checkpoint)` returns the update file's bytes, or a failed result's number.

    `answer(challenge, token)` makes the value of `odp-authentication-key`; the default is a device that cannot attest.
    `lose(method, url, attempt)` says whether the answer to an attempt gets lost on its way.
    """

    server: str
    compute: Callable[[plan_pb2.ClientOnlyPlan, bytes], bytes | int]
    key_url: str = ""
    owner: str = "com.example.app/com.example.app.SampleService"
    digest: str = "0A1B" * 16
    version: str = "341717000"
    encrypt: bool = True
    answer: Callable[[bytes, str], str] = lambda challenge, token: "[]"
    lose: Callable[[str, str, int], bool] = lambda method, url, attempt: False
    sent: list[Sent] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    keys: dict[str, tuple[bytes, float]] = field(default_factory=dict)  # id -> key, expiry
    history: dict[tuple[str, str], int] = field(default_factory=dict)  # (population, task) -> round of the last one

    def run(self, population: str) -> Run:
        """One run of the scheduled job (section 0)."""
        try:
            return self._run(population)
        except RunFailed as failure:
            return Run(False, counted=True, cause=f"{type(failure).__name__}: {failure}")

    def _run(self, population: str) -> Run:
        assignment = self.check_in(population)
        if isinstance(assignment, Run):
            return assignment
        if not self._eligible(assignment):
            self.report(assignment, Report.NOT_ELIGIBLE)
            return Run(False, assignment=assignment, cause="not eligible")
        plan = self._plan(assignment.plan)
        checkpoint = self._checkpoint(assignment.init_checkpoint)
        if checkpoint is None:
            return Run(False, counted=True, assignment=assignment, cause="download failed")
        # Also when encryption is off (quirk 8).
        key = self._key()
        if key is None:
            self.report(assignment, Report.FAILED)
            raise RunFailed("no encryption key")
        update = self.compute(plan, checkpoint)
        if isinstance(update, int):
            self.report(assignment, update)
            return Run(False, assignment=assignment, cause=f"computation reported {update}")
        return self.deliver(assignment, update, key)

    # Check-in

    def check_in(self, population: str) -> "task_assignments_pb2.TaskAssignment | Run":
        """`create-task-assignment` with at most one answer to a challenge (1.4)."""
        request = task_assignments_pb2.CreateTaskAssignmentRequest()
        request.client_version.version_code = self.version
        request.resource_capabilities.supported_compression_formats.append(GZIP)
        # Raw: no character of the population is percent-encoded.
        suffix = f"/taskassignment/v1/population/{population}:create-task-assignment"
        authorization = _Authorization(self)
        while True:
            headers = {
                "Content-Type": "application/x-protobuf",
                "odp-idempotency-key": f"{int(time.time() * 1000)} - {uuid.uuid4()}",
                "fcp-owner-id-digest": f"{self.owner}-{self.digest}",
                **authorization.headers(),
            }
            answer = self._request("POST", self._join(suffix), headers, request.SerializeToString())
            accepted = (200, 201, 401) if authorization.first else (200, 201, 403)
            if answer.status not in accepted:
                raise RunFailed(f"check-in answered {answer.status}")
            message = _parsed(task_assignments_pb2.CreateTaskAssignmentResponse, answer.body)
            match message.WhichOneof("result"):
                case "task_assignment":
                    return self._valid(message.task_assignment, population)
                case "rejection_info":
                    rejected = self._rejected(message.rejection_info, authorization, counts=not authorization.first)
                    if rejected is not None:
                        return rejected
                case _:
                    raise RunFailed("neither an assignment nor a rejection")

    def _valid(self, assignment, population):
        if assignment.population_name != population:
            raise RunFailed("an assignment of another population")
        if not (assignment.task_id and assignment.aggregation_id and assignment.assignment_id):
            raise RunFailed("an assignment without ids")
        return assignment

    def _rejected(self, info, authorization: "_Authorization", *, counts: bool) -> Run | None:
        """The run's end, or None if a challenge was answered and the request goes out again."""
        match info.WhichOneof("metadata"):
            case "auth_metadata" if authorization.first:
                authorization.attest(info.auth_metadata.key_attestation_metadata.challenge)
                return None
            case "retry_window":
                window = _window(info.retry_window)
                delay = None
                if window is not None:
                    low, high = window
                    delay = min(max(random.uniform(low, max(low, high)), 0), TWO_DAYS_MS)
                return Run(False, counted=counts, window_ms=window, delay_ms=delay, cause="rejected")
            case _:
                raise RunFailed("a rejection without usable metadata")

    def _eligible(self, assignment) -> bool:
        for policy in assignment.eligibility_task_info.eligibility_policies:
            match policy.WhichOneof("policy_type"):
                case "min_sep_policy":
                    last = self.history.get((assignment.population_name, assignment.task_id))
                    told = policy.min_sep_policy
                    if last is not None and told.minimum_separation > told.current_index - last:
                        return False
                case "data_availability_policy":
                    pass
                case _:
                    raise RunFailed("a policy of no known type")
        return True

    # Downloads

    def _plan(self, resource) -> plan_pb2.ClientOnlyPlan:
        answer = self._download(resource)
        zipped = resource.compression_format == GZIP or "gzip" in answer.headers.get("content-encoding", "")
        return _parsed(plan_pb2.ClientOnlyPlan, _gunzipped(answer.body) if zipped else answer.body)

    def _checkpoint(self, resource) -> bytes | None:
        answer = self._download(resource)
        body = answer.body
        # The field alone does nothing (quirk 4).
        if "gzip" in answer.headers.get("content-encoding", ""):
            body = _gunzipped(body)
        return body if 0 < len(body) <= CHECKPOINT_LIMIT else None

    def _download(self, resource) -> Answer:
        if not resource.uri:
            raise RunFailed("a resource without URI")
        headers = {"Accept-Encoding": "gzip"} if resource.compression_format == GZIP else {}
        answer = self._request("GET", resource.uri, headers)
        if not answer.ok:
            raise RunFailed(f"a download answered {answer.status}")
        return answer

    # Keys

    def _key(self) -> tuple[str, bytes] | None:
        now = time.time()
        alive = {name: key for name, (key, expiry) in self.keys.items() if expiry > now}
        if not alive:
            self._fetch_keys(now)
            alive = {name: key for name, (key, expiry) in self.keys.items() if expiry > now}
        newest = sorted(alive, key=lambda name: self.keys[name][1], reverse=True)[:5]
        return (name := random.choice(newest), alive[name]) if newest else None

    def _fetch_keys(self, now: float) -> None:
        url = self.key_url or self._join("/.well-known/odp/v1/public-keys")
        answer = self._request("GET", url, {})
        life = _max_age(answer.headers)
        # The status is not examined (quirk 9).
        try:
            found = {one["id"]: base64.b64decode(one["key"]) for one in json.loads(answer.body)["keys"]}
        except (ValueError, KeyError, TypeError):
            found = {}
        self.keys |= {name: (key, now + life) for name, key in found.items()}

    # Report and upload

    def deliver(self, assignment, update: bytes, key: tuple[str, bytes]) -> Run:
        """The success report, the upload, and what the device writes down afterwards (1.7, 1.8)."""
        answered = self.report(assignment, Report.COMPLETED)
        if isinstance(answered, Run):
            return answered
        instruction = answered.upload_instruction
        if not instruction.upload_location:
            raise RunFailed("no upload location")
        body = self.sealed(update, key) if self.encrypt else update
        if instruction.compression_format == GZIP:
            body = gzip.compress(body)
        headers = dict(instruction.extra_request_headers)
        if any(name.lower() == "content-length" for name in headers):
            raise RunFailed("Content-Length is the client's own")
        answer = self._request("PUT", instruction.upload_location, headers, body)
        if not answer.ok:
            raise RunFailed(f"the upload answered {answer.status}")
        policies = assignment.eligibility_task_info.eligibility_policies
        rounds = [one.min_sep_policy.current_index for one in policies if one.HasField("min_sep_policy")]
        self.history[assignment.population_name, assignment.task_id] = rounds[0] if rounds else 0
        return Run(True, assignment=assignment)

    def report(self, assignment, result: int) -> "task_assignments_pb2.ReportResultResponse | Run":
        """`report-result`. Only a success report answers a challenge; the answer to a failure report is not read."""
        suffix = (
            f"/taskassignment/v1/population/{assignment.population_name}/task/{assignment.task_id}"
            f"/aggregation/{assignment.aggregation_id}/task-assignment/{assignment.assignment_id}:report-result"
        )
        message = Report(result=result)
        message.resource_capabilities.supported_compression_formats.append(GZIP)
        authorization = _Authorization(self)
        while True:
            headers = {"Content-Type": "application/x-protobuf", **authorization.headers()}
            answer = self._request("PUT", self._join(suffix), headers, message.SerializeToString())
            if result != Report.COMPLETED:
                return Run(False, counted=not answer.ok)
            accepted = (200, 201, 401) if authorization.first else (200, 201, 403)
            if answer.status not in accepted:
                raise RunFailed(f"the report answered {answer.status}")
            response = _parsed(task_assignments_pb2.ReportResultResponse, answer.body)
            if not response.HasField("rejection_info"):
                return response
            rejected = self._rejected(response.rejection_info, authorization, counts=False)
            if rejected is not None:
                return rejected

    def sealed(self, update: bytes, key: tuple[str, bytes]) -> bytes:
        """gzip, HPKE, JSON with slashes escaped as Android's library does (2.3, 2.4)."""
        name, public = key
        fields = {
            "keyId": name,
            "encryptedPayload": base64.b64encode(hpke_seal(public, gzip.compress(update), b"{}")).decode(),
            "associatedData": base64.b64encode(b"{}").decode(),
        }
        return json.dumps(fields).replace("/", "\\/").encode()

    # Transport

    def _join(self, suffix: str) -> str:
        return f"{self.server.removesuffix('/')}/{suffix.removeprefix('/')}"

    def _request(self, method: str, url: str, headers: dict[str, str], body: bytes = b"") -> Answer:
        """Three attempts, back to back, the same bytes each time; the last answer or exception counts (1.1)."""
        if not url.startswith(("https://", "http://localhost:")):
            raise RunFailed(f"a URL that is not allowed: {url[:30]}")
        failure: OSError | None = None
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._attempt(method, url, headers, body, attempt)
            except OSError as error:
                failure = error
                continue
            failure = None
            if answer.ok:
                return answer
        if failure is not None:
            raise RunFailed(f"{method}: {failure}") from failure
        return answer

    def _attempt(self, method: str, url: str, headers: dict[str, str], body: bytes, attempt: int) -> Answer:
        place = urlsplit(url)
        target = url[url.index("/", len(place.scheme) + 3) :]
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        given = {name.lower() for name in headers}
        if body:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"User-Agent: {USER_AGENT}", f"Host: {place.netloc}", "Connection: Keep-Alive"]
        transparent = "accept-encoding" not in given
        if transparent:
            lines.append("Accept-Encoding: gzip")
        head = "\r\n".join([*lines, "", ""]).encode()
        self.sent.append(record := Sent(method, url, head, body))
        status, answered, data = exchange(place.hostname, place.port, place.scheme, head + body)
        if self.lose(method, url, attempt):
            raise TimeoutError("the answer got lost")
        record.status = status
        if status not in (200, 201) and "content-length" not in answered and not data:
            raise Crash(f"{status} without a body and without a length")
        if transparent and answered.get("content-encoding") == "gzip":
            data = _gunzipped(data)
            answered = {k: v for k, v in answered.items() if k not in ("content-encoding", "content-length")}
        return Answer(status, answered, data)


class _Authorization:
    """The context of one request, made anew for check-in and report (3.1)."""

    def __init__(self, client: ReferenceClient) -> None:
        self._client = client
        self._record: str | None = None
        self._challenge = b""
        self.first = True

    def attest(self, challenge: bytes) -> None:
        self.first = False
        self._client.tokens.pop(self._client.owner, None)
        self._challenge = challenge

    def headers(self) -> dict[str, str]:
        if self.first:
            token = self._client.tokens.get(self._client.owner)
            return {} if token is None else {"odp-authorization-key": token}
        token = str(uuid.uuid4())
        # Stored at once, before anybody has accepted it (quirk 6).
        self._client.tokens[self._client.owner] = token
        record = self._client.answer(self._challenge, token)
        return {"odp-authentication-key": record.replace("/", "\\/"), "odp-authorization-key": token}


def exchange(host: str, port: int, scheme: str, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own; returns status, headers and the whole body. Raises OSError."""
    connection = socket.create_connection((host, port), CONNECT_S)
    with connection if scheme == "http" else tls(connection, host) as wire:
        wire.settimeout(READ_S)
        try:
            wire.sendall(request)
        except OSError:
            # An early refusal may lie there already.
            if not wire.recv(1, socket.MSG_PEEK):
                raise
        with wire.makefile("rb") as stream:
            return read_answer(stream)


def tls(connection: socket.socket, host: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE"))
    return context.wrap_socket(connection, server_hostname=host)


def read_answer(stream) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower-case names) and body of one HTTP/1.1 answer; raises OSError if it breaks off."""
    first = stream.readline()
    if not first.endswith(b"\r\n"):
        raise ConnectionResetError("unexpected end of stream")
    headers = {}
    while (line := stream.readline()) != b"\r\n":
        if not line:
            raise ConnectionResetError("unexpected end of headers")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    if "content-length" in headers:
        length = int(headers["content-length"])
        body = stream.read(length)
        if len(body) != length:
            raise ConnectionResetError(f"{len(body)} of {length} bytes")
    elif headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int(stream.readline().split(b";")[0], 16):
            body += stream.read(size)
            stream.readline()
        stream.readline()
    else:
        body = stream.read()
    return int(first.split()[1]), headers, body


def hpke_seal(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """RFC 9180, base mode, single shot: X25519, HKDF-SHA256, ChaCha20-Poly1305, no associated data."""
    secret = X25519PrivateKey.generate()
    encapsulated = secret.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    shared = secret.exchange(X25519PublicKey.from_public_bytes(public))
    kem = b"KEM\x00\x20"
    suite = b"HPKE\x00\x20\x00\x01\x00\x03"
    extracted = _extract(b"", kem, b"eae_prk", shared)
    shared_secret = _expand(extracted, kem, b"shared_secret", encapsulated + public, 32)
    context = b"\x00" + _extract(b"", suite, b"psk_id_hash", b"") + _extract(b"", suite, b"info_hash", info)
    exporter = _extract(shared_secret, suite, b"secret", b"")
    key = _expand(exporter, suite, b"key", context, 32)
    nonce = _expand(exporter, suite, b"base_nonce", context, 12)
    return encapsulated + ChaCha20Poly1305(key).encrypt(nonce, plaintext, b"")


def _extract(salt: bytes, suite: bytes, label: bytes, material: bytes) -> bytes:
    code = hmac.HMAC(salt or bytes(32), hashes.SHA256())
    code.update(b"HPKE-v1" + suite + label + material)
    return code.finalize()


def _expand(secret: bytes, suite: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labeled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(hashes.SHA256(), length, labeled).derive(secret)


def _window(message) -> tuple[int, int] | None:
    """Both bounds in milliseconds; None unless both are above 0 (1.5)."""
    low, high = (d.seconds * 1000 + d.nanos // 1_000_000 for d in (message.delay_min, message.delay_max))
    return (low, high) if low > 0 and high > 0 else None


def _max_age(headers: dict[str, str]) -> int:
    found = 0
    for token in headers.get("cache-control", "").lower().split(","):
        if token.strip().startswith("max-age="):
            found = int(token.strip().removeprefix("max-age="))
    life = found - int(headers.get("age", 0))
    return life if life > 0 else 1_209_600


def _parsed(kind, data: bytes):
    try:
        return kind.FromString(data)
    except Exception as error:
        raise RunFailed(f"no {kind.DESCRIPTOR.name}") from error


def _gunzipped(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise RunFailed("no gzip") from error
