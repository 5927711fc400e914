"""Which of several engines on one database does a job (spec/server.md 11.1)."""

import os
import socket
import time
import uuid
from datetime import UTC, datetime, timedelta

from fedcompute.storage.database import Database
from fedcompute.storage.leases import acquire_lease, release_leases, renew_leases

_HOST_CHARACTERS = 20
_ASK_AGAIN = 1.0


class Leases:
    """The leases of one engine: taken by name before a job, kept while the engine lives, given back at the end.

    An engine that dies or freezes stops renewing, and after `lifetime` seconds another one takes its jobs. For one
    thread.
    """

    def __init__(self, database: Database, lifetime: float) -> None:
        self._database = database
        self._lifetime = timedelta(seconds=lifetime)
        self._period = lifetime / 3
        self._holder = f"{socket.gethostname()[:_HOST_CHARACTERS]}/{os.getpid()}/{uuid.uuid4().hex[:12]}"
        self._held: set[str] = set()
        self._denied: dict[str, float] = {}  # monotonic time before which there is no sense in asking again
        self._renewed = time.monotonic()

    @property
    def count(self) -> int:
        """How many are held; from any thread."""
        return len(self._held)

    def take(self, name: str) -> bool:
        """Whether this engine may do what is called `name`; raises OperationFailed(STORAGE_FAILED)."""
        if name in self._held:
            return True
        moment = time.monotonic()
        if moment < self._denied.get(name, 0.0):
            return False
        with self._database.write() as tx:
            taken = acquire_lease(tx, name, self._holder, datetime.now(UTC), self._lifetime)
        if taken:
            if not self._held:
                self._renewed = time.monotonic()
            self._held.add(name)
        else:
            # Every wake asks, and each question is a transaction that writes.
            self._denied = {one: until for one, until in self._denied.items() if moment < until}
            self._denied[name] = moment + min(_ASK_AGAIN, self._period)
        return taken

    def keep(self) -> set[str]:
        """Renews what is held, when it is time; returns what was lost meanwhile: others may be doing it."""
        if not self._held or time.monotonic() - self._renewed < self._period:
            return set()
        with self._database.write() as tx:
            kept = renew_leases(tx, self._holder, datetime.now(UTC), self._lifetime)
        self._renewed = time.monotonic()
        lost, self._held = self._held - kept, self._held & kept
        return lost

    def give(self, name: str) -> None:
        """Gives one back."""
        if name in self._held:
            self._held.discard(name)
            with self._database.write() as tx:
                release_leases(tx, self._holder, [name])

    def give_all(self) -> None:
        """Gives everything back, so that others need not wait for it to expire."""
        self._held.clear()
        with self._database.write() as tx:
            release_leases(tx, self._holder)
