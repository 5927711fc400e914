"""Public keys of an external key service, as this server hands them on to devices (spec/server.md 7.2)."""

import logging
import threading
import time
from collections.abc import Callable

from fedcompute.crypto.keys import KEY_LIST_BYTES_LIMIT, PublicKey, key_lifetime, parse_public_keys
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.server.security import key_fetch
from fedcompute.server.security.keys import Publication

# A device waits five seconds for its first fetch.
_TIMEOUT_S = 3.0
_LONGEST_S = 8 * 3_600.0
# How long devices may remember keys whose source does not answer, and how soon it is asked again.
_STOPGAP_S, _AGAIN_S = 3_600.0, 10.0

_LOG = logging.getLogger(__name__)


class PublicKeyList:
    """The key service's list, fetched every eight hours or when it is too old; the last one serves while that fails.

    Safe for threads. What devices are told of its age is what its source said, less the time since then.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._lock = threading.Lock()
        self._http = key_fetch.client(_TIMEOUT_S)
        self._keys: tuple[PublicKey, ...] = ()
        self._until = 0.0  # what the source said
        self._due = 0.0

    def publication(self) -> Publication:
        """The keys for devices now; raises OperationFailed(KEY_SERVICE_FAILED) if there never were any."""
        with self._lock:
            if self._clock() >= self._due:
                self._fetch()
            remaining = self._until - self._clock()
            return Publication(self._keys, max(1, int(remaining if remaining > 0 else _STOPGAP_S)))

    def _fetch(self) -> None:
        try:
            answer = key_fetch.get(self._http, self._url, {}, limit=KEY_LIST_BYTES_LIMIT, seconds=_TIMEOUT_S)
            if answer.status != 200:
                detail = f"the list of public keys answers {answer.status}"
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, detail)
            keys = tuple(parse_public_keys(answer.body))
            if not keys:
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, "the list of public keys is empty")
        except (ArtifactInvalid, OperationFailed) as error:
            if not self._keys:
                raise OperationFailed(Reason.KEY_SERVICE_FAILED, error.detail) from None
            _LOG.warning("the last %d public keys stay in use: %s", len(self._keys), error)
            self._due = self._clock() + _AGAIN_S
            return
        life = key_lifetime(answer.headers)
        self._keys = keys
        self._until = self._clock() + life
        self._due = self._clock() + min(_LONGEST_S, life)
