"""Retention: what nobody needs any more is removed, a little at a time, beside the round engine.

Raw updates and un-noised sums tell more about devices than anything else that is stored, so by default they go a day
after their round is over; what was released stays for a year. The rules are in `storage.retention`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta

from fedcompute.errors import FedComputeError
from fedcompute.server.context import now
from fedcompute.server.rounds.leases import Leases
from fedcompute.server.settings import Settings
from fedcompute.storage import retention
from fedcompute.storage.blobs import BlobStore
from fedcompute.storage.database import Database
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    AGGREGATED,
    GRADIENT,
    MODEL,
    client_checkpoint_path,
    result_folder,
    server_checkpoint_path,
)
from fedcompute.storage.retention import Round

_LOG = logging.getLogger(__name__)
LEASE = "retention"
# Of one look; what is left is taken up soon after, so that stopping a server never waits for long.
_BUDGET = 20.0
_SOON = 5.0
_FIRST = 30.0
_PATIENCE = 5.0
_LONGEST_PAUSE = 1.0
# A PUT that was granted at the last moment may take this long.
_LONGEST_UPLOAD = 3_600.0


@dataclass
class Removed:
    """What one look removed, or would remove."""

    rounds: list[str] = field(default_factory=list)  # whose updates and sums
    checkpoints: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)  # whose assignments
    objects: int = 0
    rows: int = 0
    finished: bool = True  # nothing that is due is left

    def __bool__(self) -> bool:
        return any(getattr(self, one.name) for one in fields(self) if one.name != "finished")


class _Stopped(Exception):
    """The look ends here; the next one goes on."""


@dataclass(frozen=True)
class Retention:
    """The stores of one server and how long things are kept in them."""

    database: Database
    blobs: BlobStore
    settings: Settings

    def due(self, at: datetime) -> Removed:
        """What a look would begin with: rounds, checkpoints and tasks that are due, each list up to its limit."""
        found = Removed()
        with self.database.read() as tx:
            rounds = retention.settled_rounds(tx, self._updates_before(at))
            checkpoints = retention.old_checkpoints(
                tx, self._before(at, self.settings.keep_checkpoints_days), self.settings.keep_newest_checkpoints
            )
            tasks = retention.old_tasks(tx, self._before(at, self.settings.keep_assignments_days))
            found.rows = sum(retention.count_devices(tx, one) for one in tasks)
        found.rounds = [str(one) for one in rounds]
        found.checkpoints = [str(one) for one in checkpoints]
        found.tasks = [str(one) for one in tasks]
        found.objects = sum(len(self.blobs.list(bucket, path)) for one in rounds for bucket, path in _disposable(one))
        found.finished = not found
        return found

    def is_due(self, at: datetime) -> bool:
        """Whether a look would find anything to do."""
        checkpoints_before = self._before(at, self.settings.keep_checkpoints_days)
        with self.database.read() as tx:
            return bool(
                retention.settled_rounds(tx, self._updates_before(at), limit=1)
                or retention.given_up_checkpoints(tx, limit=1)
                or retention.old_checkpoints(tx, checkpoints_before, self.settings.keep_newest_checkpoints)
                or retention.old_tasks(tx, self._before(at, self.settings.keep_assignments_days), limit=1)
            )

    def look(self, at: datetime, proceed: Callable[[], bool] = lambda: True) -> Removed:
        """Removes what is due; asks `proceed` before every step and stops when it says no.

        Every step may be cut off and repeated. Raises OperationFailed(STORAGE_FAILED) as the stores do.

        Formal guarantees: what a round that is under way or may be tried again reads is not removed: its uploads, its
        sums, and the checkpoint that it starts from or measures. The ledger and budgets are never touched.
        """
        removed = Removed()
        try:
            for step in (self._clean_rounds, self._purge_checkpoints, self._forget_devices):
                for _ in step(at, removed):
                    if not proceed():
                        raise _Stopped
        except _Stopped:
            removed.finished = False
        return removed

    def _clean_rounds(self, at: datetime, removed: Removed) -> Iterator[None]:
        while True:
            with self.database.read() as tx:
                rounds = retention.settled_rounds(tx, self._updates_before(at))
            for one in rounds:
                for bucket, path in _disposable(one):
                    yield from self._delete_folder(bucket, path, removed)
                with self.database.write() as tx:
                    retention.mark_cleaned(tx, one, now())
                removed.rounds.append(str(one))
                yield
            if not rounds:
                return

    def _purge_checkpoints(self, at: datetime, removed: Removed) -> Iterator[None]:
        before = self._before(at, self.settings.keep_checkpoints_days)
        with self.database.read() as tx:
            pending = retention.given_up_checkpoints(tx)
        while True:
            for one in pending:
                yield from self._remove_checkpoint(one, removed)
            with self.database.read() as tx:
                old = retention.old_checkpoints(tx, before, self.settings.keep_newest_checkpoints)
            pending = []
            for one in old:
                with self.database.write() as tx:
                    if retention.give_up_checkpoint(tx, one, now()):
                        pending.append(one)
                yield
            if not pending:
                return

    def _remove_checkpoint(self, one: Round, removed: Removed) -> Iterator[None]:
        for path in (server_checkpoint_path(one.task, one.result_id), client_checkpoint_path(one.task, one.result_id)):
            removed.objects += self.blobs.delete(MODEL, path)
        with self.database.write() as tx:
            retention.mark_cleaned(tx, one, now())
        removed.checkpoints.append(str(one))
        yield

    def _forget_devices(self, at: datetime, removed: Removed) -> Iterator[None]:
        before = self._before(at, self.settings.keep_assignments_days)
        while True:
            with self.database.read() as tx:
                tasks = retention.old_tasks(tx, before)
            for task in tasks:
                yield from self._forget_devices_of(task, removed)
                removed.tasks.append(str(task))
            if not tasks:
                return

    def _forget_devices_of(self, task: TaskKey, removed: Removed) -> Iterator[None]:
        while True:
            with self.database.write() as tx:
                gone = retention.forget_devices(tx, task)
            if not gone:
                return
            removed.rows += gone
            yield

    def _delete_folder(self, bucket: str, path: str, removed: Removed) -> Iterator[None]:
        while True:
            gone = self.blobs.delete_folder(bucket, path)
            if not gone:
                return
            removed.objects += gone
            yield

    def _updates_before(self, at: datetime) -> datetime:
        # No URL that was handed out may bring an update back.
        least = timedelta(seconds=self.settings.signed_url_life + _LONGEST_UPLOAD)
        return at - max(timedelta(days=self.settings.keep_updates_days), least)

    @staticmethod
    def _before(at: datetime, days: float) -> datetime:
        return at - timedelta(days=days)


class RetentionThread:
    """Looks every `retention_period` seconds, in a thread of its own, while the server runs.

    Of several engines on one database one looks at a time.
    """

    def __init__(self, work: Retention) -> None:
        self._work = work
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._last_error = ""

    def start(self) -> None:
        """Starts looking, soon for the first time; does nothing if the period is 0."""
        if self._work.settings.retention_period > 0:
            self._thread.start()

    def stop(self) -> None:
        """Ends the look under way after its present step; one that waits for a store is left behind."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        period = self._work.settings.retention_period
        wait = min(_FIRST, period)
        while not self._stopping.wait(wait):
            wait = min(_SOON, period) if not self._guarded_look() else period

    def _guarded_look(self) -> bool:
        try:
            removed = self._look()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != self._last_error:
                _LOG.error("retention: %s", error, exc_info=None if isinstance(error, FedComputeError) else error)
            self._last_error = text
            return True
        self._last_error = ""
        if removed:
            _LOG.info(
                "retention: %d objects of %d rounds and %d checkpoints, %d assignments and batches of %d tasks",
                removed.objects, len(removed.rounds), len(removed.checkpoints), removed.rows, len(removed.tasks),
            )  # fmt: skip
        return removed.finished

    def _look(self) -> Removed:
        if not self._work.is_due(now()):
            return Removed()
        leases = Leases(self._work.database, self._work.settings.lease_lifetime)
        if not leases.take(LEASE):
            return Removed()
        began = time.monotonic()
        deadline = began + _BUDGET

        def proceed() -> bool:
            nonlocal began
            # As long a pause as the step took: rounds and check-ins want the stores too.
            stopping = self._stopping.wait(min(time.monotonic() - began, _LONGEST_PAUSE))
            began = time.monotonic()
            return not stopping and began < deadline and not leases.keep()

        try:
            return self._work.look(now(), proceed)
        finally:
            leases.give_all()


def _disposable(one: Round) -> list[tuple[str, str]]:
    """The folders of a settled round that nobody needs: bucket, path."""
    folder = result_folder(one.task, one.result_id)
    found = [(GRADIENT, folder), (AGGREGATED, folder)]
    if not one.released:
        # What was computed and never released, noised or not, must not be found later.
        found.append((MODEL, folder))
    elif not one.is_training:
        # A copy of the checkpoint that it measured.
        found.append((MODEL, f"{folder}/d"))
    return found
