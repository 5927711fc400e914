"""What needs a person: the doctor's findings, looked for in the background so that no page waits for them."""

import logging
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from weakref import WeakKeyDictionary

from fedcompute.errors import FedComputeError
from fedcompute.server.context import Context, now
from fedcompute.server.doctor.findings import Finding, Limits, Patient
from fedcompute.server.doctor.machine import examine_disk, examine_leases, examine_rights
from fedcompute.server.doctor.rounds import examine_rounds, examine_tasks
from fedcompute.server.doctor.trust import examine_keys, examine_secrets
from fedcompute.storage.database import Database

_LOG = logging.getLogger(__name__)
_PERIOD = 15.0


@dataclass
class _Cache:
    findings: list[Finding] = field(default_factory=list)
    looked: datetime | None = None
    due: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


_CACHES: "WeakKeyDictionary[Database, _Cache]" = WeakKeyDictionary()
_MADE = threading.Lock()


def findings(context: Context) -> tuple[list[Finding], datetime | None]:
    """What was found at the last look, and when that was; starts another one, on a thread, if that is a while ago."""
    with _MADE:
        cache = _CACHES.setdefault(context.database, _Cache())
    if time.monotonic() >= cache.due and cache.lock.acquire(blocking=False):
        cache.due = time.monotonic() + _PERIOD
        threading.Thread(target=_look, args=(context, cache), name="attention", daemon=True).start()
    return cache.findings, cache.looked


def attention(context: Context) -> int:
    """How many things needed a person at the last look."""
    return len(findings(context)[0])


def _look(context: Context, cache: _Cache) -> None:
    try:
        patient = Patient(context.settings, context.database, context.blobs, now())
        limits = Limits()
        found: list[Finding] = []
        for part in (
            examine_tasks(patient, limits),
            examine_rounds(patient, limits),
            examine_leases(patient),
            examine_secrets(patient),
            examine_keys(patient, limits),
            examine_disk(patient, limits),
            examine_rights(patient),
        ):
            found += part
        cache.findings, cache.looked = found, patient.now
    except FedComputeError as error:
        # The stores cannot be read, or the server stops; `/ready` says so, and the next look comes soon.
        _LOG.debug("no look at what is stuck: %s", error)
    finally:
        cache.lock.release()
