"""Encryption keys of a device: fetched, kept for their lifetime, drawn at random (spec/device.md 2.1-2.2)."""

import asyncio
import random
import time
from collections.abc import Callable

from fedcompute.crypto.keys import KEY_LIST_BYTES_LIMIT, PublicKey, key_lifetime, parse_public_keys
from fedcompute.device.client.http import Transport, join_url
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.errors import ArtifactInvalid, DeviceRunFailed, Reason

DEFAULT_PATH = ".well-known/odp/v1/public-keys"
_CHOICE = 5


class EncryptionKeys:
    """The public keys that a device knows of one key service. One may serve all devices that use the same service."""

    def __init__(
        self,
        transport: Transport,
        url: str,
        *,
        database: DeviceDatabase | None = None,
        fetch_timeout: float = 5.0,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        """`url`: the key service. `database`: where keys are kept, without one in memory. `fetch_timeout`: seconds a
        run waits for the service. `clock`: Unix seconds.
        """
        self._transport = transport
        self._url = url
        self._fetch_timeout = fetch_timeout
        self._clock = clock
        self._chance = chance if chance is not None else random.SystemRandom()
        self._database = database if database is not None else DeviceDatabase()
        self._fetching = asyncio.Lock()

    async def choose(self) -> PublicKey:
        """One of the five unexpired keys with the latest expiry, at random; fetches if none is left.

        Raises DeviceRunFailed (NO_ENCRYPTION_KEY) if the service does not answer in time or with usable keys.
        """
        async with self._fetching:
            if not self._unexpired():
                await self.fetch()
        keys = self._unexpired()
        if not keys:
            raise DeviceRunFailed(Reason.NO_ENCRYPTION_KEY, "the key service publishes no keys")
        return self._chance.choice(keys)

    def _unexpired(self) -> list[PublicKey]:
        with self._database.read() as tx:
            rows = tx.execute(
                "SELECT key_id, public_key FROM encryption_key WHERE url = ? AND expires > ?"
                " ORDER BY expires DESC, key_id LIMIT ?",
                (self._url, round(self._clock() * 1000), _CHOICE),
            ).fetchall()
        return [PublicKey(key_id, bytes(key)) for key_id, key in rows]

    async def fetch(self) -> None:
        """Fetches and keeps what the service publishes now; expired keys go. Raises as `choose`."""
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
        expires = round((now + key_lifetime(response.headers)) * 1000)
        with self._database.write() as tx:
            tx.execute("DELETE FROM encryption_key WHERE expires <= ?", (round(now * 1000),))
            tx.executemany(
                "INSERT INTO encryption_key VALUES (?, ?, ?, ?) ON CONFLICT (url, key_id)"
                " DO UPDATE SET public_key = excluded.public_key, expires = excluded.expires",
                [(self._url, key.id, key.key, expires) for key in keys],
            )


def default_url(server: str) -> str:
    """The key service that a server brings along."""
    return join_url(server, DEFAULT_PATH)
