"""What the routes and the round engine of one server share."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from anyio import CapacityLimiter
from starlette.requests import HTTPConnection

from fedcompute.crypto.sealing import Sealer
from fedcompute.protos import plan_pb2
from fedcompute.server.measures import Measures
from fedcompute.server.rounds.jobs import Jobs
from fedcompute.server.rounds.plans import ServerPlan, read_example_selector, read_server_plan
from fedcompute.server.rounds.spending import Accounts
from fedcompute.server.rounds.sums import Merged
from fedcompute.server.rounds.update import Preparation
from fedcompute.server.security.authentication import Authentication
from fedcompute.server.security.public_keys import PublicKeyList
from fedcompute.server.security.rates import Rates
from fedcompute.server.security.url_signing import Grant, sign_url
from fedcompute.server.settings import Settings
from fedcompute.server.uploads import Uploads
from fedcompute.storage.blobs import BlobStore
from fedcompute.storage.database import Database
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.paths import GRADIENT, MODEL, client_only_plan_path, server_plan_path

T = TypeVar("T")
_CACHED_PLANS = 256
_REPORT_THREADS = 16
# Whole ledgers may take a minute; who asks for one waits without holding a thread that other requests need.
_LEDGER_THREADS = 1


class Plans:
    """The parsed plans of tasks; artifacts of a task that has opened never change, so the latest few hundred stay."""

    def __init__(self, blobs: BlobStore, limit: int) -> None:
        self._blobs = blobs
        self._limit = limit
        self._lock = threading.Lock()
        self._servers: OrderedDict[TaskKey, ServerPlan] = OrderedDict()
        self._selectors: OrderedDict[TaskKey, plan_pb2.ExampleSelector] = OrderedDict()

    def server_plan(self, task: TaskKey) -> ServerPlan:
        """The server half of an open task's plan; raises ArtifactInvalid or OperationFailed."""

        def read() -> ServerPlan:
            return read_server_plan(self._blobs.get(MODEL, server_plan_path(task), limit=self._limit), self._limit)

        return self._cached(self._servers, task, read)

    def example_selector(self, task: TaskKey) -> plan_pb2.ExampleSelector:
        """The selector in an open task's client plan; raises ArtifactInvalid or OperationFailed."""

        def read() -> plan_pb2.ExampleSelector:
            stored = self._blobs.get(MODEL, client_only_plan_path(task), limit=self._limit)
            return read_example_selector(stored, self._limit)

        return self._cached(self._selectors, task, read)

    def _cached(self, cache: "OrderedDict[TaskKey, T]", task: TaskKey, read: Callable[[], T]) -> T:
        with self._lock:
            if task in cache:
                cache.move_to_end(task)
                return cache[task]
        value = read()
        with self._lock:
            cache[task] = value
            while len(cache) > _CACHED_PLANS:
                cache.popitem(last=False)
        return value


@dataclass(frozen=True)
class Context:
    """One running server: its settings, its stores, and what is known in memory only."""

    settings: Settings
    database: Database
    blobs: BlobStore
    jobs: Jobs
    measures: Measures
    plans: Plans
    sealer: Sealer  # of the operator secret
    url_key: bytes = field(repr=False)
    noise_key: bytes = field(repr=False)  # seals noise that outlives a round
    session_key: bytes = field(repr=False)  # of the sessions of browsers
    wake: Callable[[], None]  # asks the round engine for a pass
    is_alive: Callable[[], bool]  # whether the round engine does its work
    warm_up: Callable[[], None]  # starts the worker processes
    rates: Rates = field(default_factory=Rates)
    # Of their own: check-ins may have taken every other one.
    report_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_REPORT_THREADS))
    ledger_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_LEDGER_THREADS))
    authentication: Authentication | None = None  # None: every device is taken
    key_list: PublicKeyList | None = None  # where an external key service holds the keys
    uploads: Uploads = field(default_factory=Uploads)
    accounts: Accounts = field(default_factory=Accounts)
    prepared: dict[IterationKey, Preparation | None] = field(default_factory=dict)  # None: nothing is to be
    merged: dict[IterationKey, Merged] = field(default_factory=dict)
    missing: set[tuple[TaskKey, int]] = field(default_factory=set)  # checkpoints that the store has lost

    def signed_url(
        self, method: str, bucket: str, path: str, life: float, headers: dict[str, str] | None = None
    ) -> str:
        """An absolute URL for one object, valid for `life` seconds; a PUT must carry `headers` as they are.

        With `blob_urls` "store" devices are sent to the store itself; artifacts are still put through the server,
        which takes none once their task is open.
        """
        if self.settings.blob_urls == "store" and (method == "GET" or bucket == GRADIENT):
            return self.blobs.signed_url(method, bucket, path, life)
        expires = int(now().timestamp() + life)
        return sign_url(self.settings.base_url, self.url_key, Grant(method, bucket, path, expires, headers or {}))

    @property
    def store_headers(self) -> dict[str, str]:
        """What a device's PUT carries beside the headers of the protocol, where it goes to the store itself."""
        return self.blobs.put_headers if self.settings.blob_urls == "store" else {}


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


def context_of(request: HTTPConnection) -> Context:
    """The server that a request has reached."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context
