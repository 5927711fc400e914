"""The external service that makes challenges and verifies attestations in the server's place (spec/server.md 3.4)."""

import base64
import binascii
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.server.security.attestation import DevicePolicy, attestation_name
from fedcompute.server.security.certificates import read_chain
from fedcompute.server.security.challenges import LIFE_S
from fedcompute.server.security.key_description import describe_key
from fedcompute.server.security.key_fetch import read_body
from fedcompute.server.security.rates import ATTEMPTS_SPAN_S

# It costs a tenth of a server's start, and few servers ask anybody.
if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 3.0
# Of a whole answer: a service that drips must not keep threads that nobody waits for.
_LONGEST_S = 6.0
_ANSWER_LIMIT = 1024 * 1024
_CHALLENGE_LIMIT = 128
_KEY_LIMIT = 4096
_VERDICT = "KEY_ATTESTATION_RECORD_VERIFICATION_RESULT_OK"
# The attempts of one request share a challenge, so that they cost the service one call.
_REMEMBERED = 4096


class AttestationService:
    """A client of the service; safe for threads. Connections are kept for ten minutes at most, and nothing is retried.

    Every failure of the service raises OperationFailed(ATTESTATION_UNAVAILABLE), so that it can be told from a refusal.
    """

    def __init__(self, url: str, api_key: str, policy: DevicePolicy) -> None:
        self._url = url.rstrip("/")
        self._policy = policy
        headers = {
            "x-goog-api-key": api_key,
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/json; utf-8",
        }
        import httpx

        self._client = httpx.Client(
            headers=headers, timeout=_TIMEOUT_S, limits=httpx.Limits(keepalive_expiry=600.0), follow_redirects=False
        )
        self._lock = threading.Lock()
        self._challenges: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def challenge(self, request: str | None) -> bytes:
        """A challenge of the service; `request` names the device's request, whose attempts get the same one.

        Raises OperationFailed(ATTESTATION_UNAVAILABLE).
        """
        with self._lock:
            known = None if request is None else self._challenges.get(request)
        if known is not None and time.monotonic() - known[1] <= ATTEMPTS_SPAN_S:
            return known[0]
        answer = self._post("generateChallenge", {"ttl": {"seconds": LIFE_S}})
        if answer.status_code != 200:
            raise _unavailable(f"status {answer.status_code} for a challenge")
        try:
            challenge = base64.b64decode(_object(answer)["challenge"], validate=True)
        except (binascii.Error, ValueError, TypeError, KeyError):
            raise _unavailable("an answer without a challenge") from None
        if not 0 < len(challenge) <= _CHALLENGE_LIMIT:
            raise _unavailable(f"a challenge of {len(challenge)} bytes")
        if request is not None:
            with self._lock:
                self._challenges[request] = (challenge, time.monotonic())
                self._challenges.move_to_end(request)
                while len(self._challenges) > _REMEMBERED:
                    self._challenges.popitem(last=False)
        return challenge

    def verify(self, chain: Sequence[bytes]) -> str:
        """Returns the name of the attestation; `chain`: DER, leaf first.

        Raises RequestRejected (ATTESTATION_UNTRUSTED if the service says no, _MALFORMED, _DEVICE, _PACKAGE) and
        OperationFailed(ATTESTATION_UNAVAILABLE).

        Formal guarantees: on return the service has answered that the record is in order, and both its reading of the
        key's description and our own satisfy the policy. Chain, challenge, freshness and revocation are the service's
        word, over a connection that is as trustworthy as its URL.
        """
        certificates = read_chain(chain)
        record = [base64.b64encode(one).decode() for one in chain]
        answer = self._post(
            "verifyKeyAttestationRecord",
            {"keyAttestationCertificateChain": record, "internalChallengeTtl": {"seconds": LIFE_S}},
        )
        if answer.status_code == 400:
            raise RequestRejected(Reason.ATTESTATION_UNTRUSTED, "the attestation service refuses the record")
        if answer.status_code != 200:
            raise _unavailable(f"status {answer.status_code} for a record")
        self._check(_object(answer))
        self._policy.check(describe_key(certificates))
        return attestation_name(certificates)

    def close(self) -> None:
        self._client.close()

    def _check(self, document: dict[str, Any]) -> None:
        try:
            verdict = document["verificationResult"]
            description = document["keyDescription"]
            packages = description["softwareEnforced"]["attestationApplicationId"]["packageInfos"]
            names = [one["name"] for one in packages]
            root = None if self._policy.allow_rooted else description["teeEnforced"]["rootOfTrust"]
            verified = root is None or (root["verifiedBootState"] == "VERIFIED" and root["deviceLocked"] is True)
        except (KeyError, TypeError):
            raise _unavailable("an answer without verdict or key description") from None
        if verdict != _VERDICT:
            raise RequestRejected(Reason.ATTESTATION_UNTRUSTED, "the attestation service's verdict is not OK")
        if not verified:
            raise RequestRejected(Reason.ATTESTATION_DEVICE, "the device did not start a verified, locked system")
        if not names or any(name not in self._policy.packages for name in names):
            raise RequestRejected(Reason.ATTESTATION_PACKAGE, "the attested package is not on the list")

    def _post(self, call: str, body: dict[str, Any]) -> "httpx.Response":
        import httpx

        deadline = time.monotonic() + _LONGEST_S
        try:
            with self._client.stream("POST", f"{self._url}:{call}", content=json.dumps(body)) as answer:
                data = read_body(answer, _ANSWER_LIMIT, deadline)
                if data is None:
                    raise _unavailable(f"an answer over {_ANSWER_LIMIT} bytes or {_LONGEST_S:.0f} s, or compressed")
                return httpx.Response(answer.status_code, content=data)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unavailable(type(error).__name__) from None


def read_service_key(path: Path) -> str:
    """The API key in a file, without white space around it; raises OperationFailed(SETTINGS_INVALID)."""
    try:
        with path.open(encoding="ascii") as file:
            key = file.read(_KEY_LIMIT).strip()
    except (OSError, ValueError):
        key = ""
    if not key.isprintable() or not key:
        detail = "setting attestation_service_key_file: no key can be read from it"
        raise OperationFailed(Reason.SETTINGS_INVALID, detail)
    return key


def _object(answer: "httpx.Response") -> dict[str, Any]:
    try:
        document = json.loads(answer.content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _unavailable("an answer that is no JSON object")
    return document


def _unavailable(detail: str) -> OperationFailed:
    return OperationFailed(Reason.ATTESTATION_UNAVAILABLE, f"the attestation service: {detail}")
