"""Encryption keys of a device: fetched, kept for their lifetime, drawn at random (spec/device.md 2.1-2.2)."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedcompute.crypto.keys import KEY_LIST_BYTES_LIMIT, PublicKey, key_lifetime, parse_public_keys
from fedcompute.device.http import Transport, join_url
from fedcompute.errors import ArtifactInvalid, DeviceRunFailed, Reason

DEFAULT_PATH = ".well-known/odp/v1/public-keys"
_CHOICE = 5


@dataclass(frozen=True)
class _Kept:
    key: PublicKey
    expires: float  # Unix seconds


class EncryptionKeys:
    """The public keys that a device knows. One may serve all devices that use the same key service."""

    def __init__(
        self,
        transport: Transport,
        url: str,
        *,
        fetch_timeout: float = 5.0,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        """`url`: the key service. `fetch_timeout`: seconds a run waits for it. `clock`: Unix seconds."""
        self._transport = transport
        self._url = url
        self._fetch_timeout = fetch_timeout
        self._clock = clock
        self._chance = chance if chance is not None else random.SystemRandom()
        self._kept: dict[str, _Kept] = {}
        self._fetching = asyncio.Lock()

    async def choose(self) -> PublicKey:
        """One of the five unexpired keys with the latest expiry, at random; fetches if none is left.

        Raises DeviceRunFailed (NO_ENCRYPTION_KEY) if the service does not answer in time or with usable keys.
        """
        async with self._fetching:
            if not self._unexpired():
                await self._fetch()
        keys = self._unexpired()
        if not keys:
            raise DeviceRunFailed(Reason.NO_ENCRYPTION_KEY, "the key service publishes no keys")
        return self._chance.choice(keys)

    def _unexpired(self) -> list[PublicKey]:
        now = self._clock()
        valid = [kept for kept in self._kept.values() if kept.expires > now]
        return [kept.key for kept in sorted(valid, key=lambda kept: kept.expires, reverse=True)[:_CHOICE]]

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(self._fetch_timeout):
                response = await self._transport.request("GET", self._url, what="key fetch", limit=KEY_LIST_BYTES_LIMIT)
            if not response.ok:
                raise DeviceRunFailed(Reason.NO_ENCRYPTION_KEY, f"the key service answers {response.status}")
            keys = parse_public_keys(response.body)
        except TimeoutError:
            detail = f"no answer of the key service within {self._fetch_timeout} s"
            raise DeviceRunFailed(Reason.NO_ENCRYPTION_KEY, detail) from None
        except (ArtifactInvalid, DeviceRunFailed) as cause:
            raise DeviceRunFailed(Reason.NO_ENCRYPTION_KEY, cause.detail) from cause
        now = self._clock()
        expires = now + key_lifetime(response.headers)
        self._kept = {key_id: kept for key_id, kept in self._kept.items() if kept.expires > now}
        self._kept.update({key.id: _Kept(key, expires) for key in keys})


def default_url(server: str) -> str:
    """The key service that a server brings along."""
    return join_url(server, DEFAULT_PATH)
