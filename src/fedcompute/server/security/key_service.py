"""The external key service as its client: two coordinators, neither of which can read an upload (spec/server.md 7.2).

It lives in the processes that open uploads and sums, one per process.
"""

import base64
import binascii
import json
import logging
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcompute.crypto.keys import KEY_LIST_BYTES_LIMIT, PublicKey, parse_public_keys
from fedcompute.crypto.keyset import hpke_private_key, join_shares
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.server.security import key_fetch
from fedcompute.server.security.key_management import TIMEOUT_S, decrypt_share, identity_token
from fedcompute.server.settings import Settings

SPLIT_TYPE = "MULTI_PARTY_HYBRID_EVEN_KEYSPLIT"
_SPLIT_NUMBER = 1
# Of google.rpc.Code: INVALID_ARGUMENT, as an id that a device made up may be, and NOT_FOUND.
_NO_SUCH_KEY = (3, 5)
_KEY_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_ANSWER_LIMIT = 256 * 1024
_MOST_KEYS, _KEY_LIFE_S = 100, 7 * 86_400.0
_MOST_ERRORS, _ERROR_LIFE_S, _FAILURES = 10_000, 600.0, 3
_PUBLIC_LIFE_S = 8 * 3_600.0
# Within a job; a job that still fails waits and comes again, for as long as it takes.
_PAUSES_S = (0.5, 1.5)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coordinator:
    """One holder of shares: its base URL, where our identity token comes from, what decrypts its shares."""

    url: str
    token: str | None = field(default=None, repr=False)
    kms: str = "plain"


@dataclass(frozen=True)
class KeyService:
    """An external key service as plain data, which a job takes along into another process."""

    first: Coordinator
    second: Coordinator
    public_url: str


def key_service_of(settings: Settings) -> KeyService | None:
    """The key service of the settings; None if the server holds its keys itself."""
    a, b, public = settings.key_service_a, settings.key_service_b, settings.key_service_public_url
    if a is None or b is None or public is None:
        return None
    return KeyService(
        Coordinator(a.rstrip("/"), settings.key_service_token_a, settings.key_service_kms_a),
        Coordinator(b.rstrip("/"), settings.key_service_token_b, settings.key_service_kms_b),
        public,
    )


@dataclass
class _Failed:
    times: int
    last: float


class KeyClient(Mapping[str, bytes]):
    """Raw private keys by id, fetched when asked for: a mapping without an end, whose iteration shows what is cached.

    A look-up raises KeyError for a key that the coordinators do not have or that is none of ours to use, and
    OperationFailed(KEY_SERVICE_FAILED) where they do not answer: the first costs one contribution, the second time.
    Keys stay for seven days, a hundred of them; after three failures a key is not asked for again for ten minutes.
    Safe for threads, which take turns.

    Formal guarantees: a key is returned only if both coordinators named it as split between two parties, their shares
    joined to one keyset, and its halves fit each other. Shares and keys stay in memory, and in no log or error.
    """

    def __init__(
        self,
        service: KeyService,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock`: seconds; `pause` waits for some."""
        self._service = service
        self._clock = clock
        self._pause = pause
        self._lock = threading.RLock()
        self._keys: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._failed: OrderedDict[str, _Failed] = OrderedDict()
        self._public: tuple[list[PublicKey], float] = ([], 0.0)
        self._http = key_fetch.client(TIMEOUT_S)

    def __getitem__(self, key_id: str) -> bytes:
        # The id comes out of an upload and goes into a URL.
        if not _KEY_ID.fullmatch(key_id):
            raise KeyError(key_id[:64])
        with self._lock:
            now = self._clock()
            found = self._keys.get(key_id)
            if found is not None and now < found[1]:
                self._keys.move_to_end(key_id)
                return found[0]
            failed = self._failed.get(key_id)
            if failed is not None and now >= failed.last + _ERROR_LIFE_S:
                del self._failed[key_id]
            elif failed is not None and failed.times >= _FAILURES:
                raise KeyError(key_id)
            try:
                key = self._fetch(key_id)
            except ArtifactInvalid as error:
                self._note_failure(key_id, error)
                raise KeyError(key_id) from None
            self._failed.pop(key_id, None)
            self._keys[key_id] = (key, now + _KEY_LIFE_S)
            while len(self._keys) > _MOST_KEYS:
                self._keys.popitem(last=False)
            return key

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def public_key(self) -> PublicKey:
        """One of the published keys, at random, to encrypt a sum to; raises OperationFailed(KEY_SERVICE_FAILED).

        The list is fetched every eight hours; while that fails, the last one stays in use.

        Formal guarantees: the key is one whose private half both coordinators hold together, which was seen here, so
        whoever serves the list cannot have sums encrypted to a key of theirs.
        """
        with self._lock:
            keys, due = self._public
            if not keys or self._clock() >= due:
                keys = self._fetch_public(keys)
                self._public = (keys, self._clock() + _PUBLIC_LIFE_S)
            for key in secrets.SystemRandom().sample(keys, len(keys)):
                private = self.get(key.id)
                if private is not None and _public_half(private) == key.key:
                    return key
                _LOG.warning("the published key %.64s is not the one that the coordinators hold", key.id)
        raise OperationFailed(
            Reason.KEY_SERVICE_FAILED, f"none of {len(keys)} published keys is one that the coordinators hold"
        )

    def _fetch_public(self, last: list[PublicKey]) -> list[PublicKey]:
        try:
            answer = self._get(self._service.public_url, {}, KEY_LIST_BYTES_LIMIT)
            if answer.status != 200:
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, f"the list of public keys answers {answer.status}")
            keys = parse_public_keys(answer.body)
            if not keys:
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, "the list of public keys is empty")
        except (OperationFailed, ArtifactInvalid) as error:
            if last:
                _LOG.warning("the last %d public keys stay in use: %s", len(last), error)
                return last
            raise OperationFailed(Reason.KEY_SERVICE_FAILED, error.detail) from None
        return keys

    def _note_failure(self, key_id: str, error: ArtifactInvalid) -> None:
        _LOG.warning("key %.64s cannot be had: %s", key_id, error.detail)
        before = self._failed.pop(key_id, _Failed(0, 0.0))
        self._failed[key_id] = _Failed(before.times + 1, self._clock())
        while len(self._failed) > _MOST_ERRORS:
            self._failed.popitem(last=False)

    def _fetch(self, key_id: str) -> bytes:
        shares = [self._share(one, key_id) for one in (self._service.first, self._service.second)]
        return hpke_private_key(join_shares(*shares))

    def _share(self, coordinator: Coordinator, key_id: str) -> bytes:
        url = f"{coordinator.url}/encryptionKeys/{key_id}"
        headers = {"accept": "application/json"}
        if coordinator.token is not None:
            headers["authorization"] = f"Bearer {identity_token(coordinator.token, coordinator.url)}"
        answer = self._get(url, headers, _ANSWER_LIMIT)
        document = _json_object(answer.body)
        if answer.status != 200:
            # Only a coordinator says so; another server's 404 means that the URL is wrong.
            if document is not None and document.get("code") in _NO_SUCH_KEY:
                raise ArtifactInvalid(Reason.UNKNOWN_KEY, "a coordinator does not have it")
            raise OperationFailed(Reason.KEY_SERVICE_FAILED, f"a key coordinator answers {answer.status}")
        if document is None:
            raise OperationFailed(
                Reason.KEY_SERVICE_FAILED, f"a key coordinator answers {len(answer.body)} bytes that are no JSON object"
            )
        key_uri, ciphertext = _material(document, key_id)
        return decrypt_share(coordinator.kms, key_uri, ciphertext)

    def _get(self, url: str, headers: Mapping[str, str], limit: int) -> key_fetch.Answer:
        return key_fetch.get(
            self._http, url, headers, limit=limit, seconds=TIMEOUT_S, pauses=_PAUSES_S, pause=self._pause
        )


@cache
def key_client(service: KeyService) -> KeyClient:
    """This process's client of a key service, with what it has cached."""
    return KeyClient(service)


class HeldKeys(Mapping[str, bytes]):
    """The server's own private keys, and behind them those of an external key service."""

    def __init__(self, own: Mapping[str, bytes], fetched: Mapping[str, bytes]) -> None:
        self._own, self._fetched = own, fetched

    def __getitem__(self, key_id: str) -> bytes:
        return self._own[key_id] if key_id in self._own else self._fetched[key_id]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (one for one in self._fetched if one not in self._own)

    def __len__(self) -> int:
        return len(list(iter(self)))


def held_keys(own: Mapping[str, bytes], service: KeyService | None) -> Mapping[str, bytes]:
    """Every private key that this process can have; see `KeyClient` for what a look-up may raise."""
    return own if service is None else HeldKeys(own, key_client(service))


def _material(answer: Mapping[str, Any], key_id: str) -> tuple[str, bytes]:
    """The key URI and the ciphertext of the first share in a proto-JSON EncryptionKey."""
    name = answer.get("name", key_id)
    if not isinstance(name, str) or name.rpartition("/")[2] != key_id:
        raise ArtifactInvalid(Reason.KEY_MALFORMED, "a coordinator answers with another key")
    kind = answer.get("encryptionKeyType", answer.get("encryption_key_type"))
    if kind != SPLIT_TYPE and (isinstance(kind, bool) or kind != _SPLIT_NUMBER):
        raise ArtifactInvalid(Reason.KEY_MALFORMED, f"its type is {str(kind)[:64]!r}, not {SPLIT_TYPE}")
    parts = answer.get("keyData", answer.get("key_data"))
    for part in parts if isinstance(parts, list) else ():
        if not isinstance(part, dict):
            continue
        material = part.get("keyMaterial", part.get("key_material"))
        if not isinstance(material, str) or not material:
            continue
        uri = part.get("keyEncryptionKeyUri", part.get("key_encryption_key_uri", ""))
        try:
            return str(uri), base64.b64decode(material, validate=True)
        except (binascii.Error, ValueError):
            raise ArtifactInvalid(Reason.KEY_MALFORMED, "a share is not base64") from None
    raise ArtifactInvalid(Reason.KEY_MALFORMED, "a coordinator's answer holds no share")


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _public_half(private_key: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
