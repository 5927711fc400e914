"""Jobs in flight, each known by the batch or round that it serves."""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.executors import Executor
from fedcompute.server.measures import Measures
from fedcompute.server.rounds.leases import Leases
from fedcompute.storage.keys import BatchKey, IterationKey, TaskKey

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT = 10.0
# What comes back by itself or by an operator's hand, and is waited for.
_OUTAGES = (Reason.STORAGE_FAILED, Reason.KEY_SERVICE_FAILED, Reason.CLUSTER_UNREACHABLE)
_LONGEST_POWER = 10
_KINDS = {
    "batch": "aggregate",
    "iteration": "update",
    "ahead": "look_ahead",
    "broadcast": "broadcast",
    "merge": "merge",
}


@dataclass(frozen=True)
class AheadKey:
    """The job that works out what a round will cost, while its devices train or before it opens."""

    iteration: IterationKey

    def __str__(self) -> str:
        return f"the cost of {self.iteration}"


@dataclass(frozen=True)
class BroadcastKey:
    """The job that makes what the devices of a round are told, before it opens."""

    iteration: IterationKey

    def __str__(self) -> str:
        return f"the client checkpoint of {self.iteration}"


@dataclass(frozen=True)
class MergeKey:
    """The job that merges a group of a round's sums into the one at `path`."""

    iteration: IterationKey
    path: str

    def __str__(self) -> str:
        return f"{self.iteration}/sums/{self.path.rpartition('/')[2]}"


JobKey = BatchKey | IterationKey | AheadKey | BroadcastKey | MergeKey


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its result, or the error of its last attempt."""

    result: Any = None
    error: FedComputeError | None = None


@dataclass
class _Flight:
    future: Future[Any] | None
    failures: int = 0  # that count towards giving up
    outages: int = 0  # of storage or key service, which do not
    started: float | None = None  # monotonic time at which it was given to the executor; None when that is counted
    resume: float = 0.0  # monotonic time before which a failed job is not started again


class Sizes(NamedTuple):
    """What an engine has to do."""

    running: int  # jobs that were given to a worker and have not ended, those that wait for one included
    waiting: int  # jobs that failed and wait to be tried again
    room: int  # jobs that are worth having at a time
    leases: int  # jobs that no other engine does; none where there is one engine only


class Jobs:
    """Runs at most one job per key at a time and repeats those that fail, a little later each time.

    Storage, a key service or a cluster that fails is waited for, however long: a full disk must not cost a task. Other
    errors are given up after `attempts`. A job that waits takes no worker's place, and any engine may try it.

    Nothing here outlives the process: after a restart the database says which jobs are missing, and `poll` starts
    them again. An engine that shares its database takes no more at a time than its workers can do soon. For one thread,
    but `on_done` is called from the executor's threads.
    """

    def __init__(
        self,
        executor: Executor,
        attempts: int,
        on_done: Callable[[], None],
        leases: Leases | None = None,
        measures: Measures | None = None,
    ) -> None:
        """`leases`: where other engines work on the same database; whoever has a job's lease does it."""
        self._executor = executor
        self._attempts = attempts
        self._on_done = on_done
        self._leases = leases
        self._measures = measures or Measures(())
        self._flights: dict[JobKey, _Flight] = {}

    def poll(self, key: JobKey, job: Callable[[Any], Any], argument: Callable[[], Any]) -> Outcome | None:
        """Returns the outcome of the key's job once it has one; starts the job if it does not run.

        The outcome is returned again until `forget`, so a caller that fails to record it may come back.
        """
        if not self._is_ours(key):
            return None
        flight = self._flights.setdefault(key, _Flight(None))
        if flight.future is None:
            if time.monotonic() >= flight.resume:
                flight.future, flight.started = self._executor.submit(job, argument()), time.monotonic()
                flight.future.add_done_callback(lambda _: self._on_done())
            return None
        if not flight.future.done() or flight.future.cancelled():
            return None
        error = flight.future.exception()
        if error is None:
            self._count(key, flight, "done")
            return Outcome(result=flight.future.result())
        if isinstance(error, FedComputeError) and error.reason in _OUTAGES:
            flight.outages += 1
            self._count(key, flight, "outage")
            # Twice as rarely each time: an outage may last for days.
            if flight.outages & (flight.outages - 1) == 0:
                _LOG.error("job for %s waits for what failed to come back (attempt %d): %s", key, flight.outages, error)
            self._postpone(flight, flight.outages)
            if self._leases is not None:
                # It may be this machine's way to the store that is cut; another engine may have one.
                self._leases.give(str(key))
            return None
        flight.failures += 1
        self._count(key, flight, "retried" if flight.failures < self._attempts else "failed")
        if flight.failures < self._attempts:
            _LOG.warning("job for %s failed (attempt %d of %d): %s", key, flight.failures, self._attempts, error)
            self._postpone(flight, flight.failures)
            return None
        if isinstance(error, FedComputeError):
            return Outcome(error=error)
        return Outcome(error=OperationFailed(Reason.INTERNAL, f"{type(error).__name__}: {error}"))

    def forget(self, key: JobKey) -> None:
        """Drops what is known about the key's job, whose outcome is recorded."""
        self._flights.pop(key, None)
        if self._leases is not None:
            self._leases.give(str(key))

    def keep(self) -> None:
        """Renews the leases of the jobs; one whose lease was lost is another engine's now, and forgotten here."""
        lost = set() if self._leases is None else self._leases.keep()
        self._measures.leases_lost(len(lost))
        for key in [key for key in self._flights if str(key) in lost]:
            _LOG.warning("the job for %s took too long to report and goes to another engine", key)
            del self._flights[key]

    def hand_over(self) -> None:
        """Leaves every job to other engines at once, where there are any; for an engine that stops."""
        self._flights.clear()
        if self._leases is not None:
            self._leases.give_all()

    def retain(self, active: Collection[IterationKey], waiting: Collection[TaskKey] = ()) -> None:
        """Forgets the jobs of rounds that are neither in `active` nor one that a task in `waiting` may open next.

        A canceled round asks for no outcome.
        """
        for key in list(self._flights):
            iteration = key if isinstance(key, IterationKey) else key.iteration
            if iteration not in active and not (isinstance(key, AheadKey | BroadcastKey) and iteration.task in waiting):
                self.forget(key)

    def sizes(self) -> Sizes:
        """How much there is to do; from any thread."""
        flights = list(self._flights.values())
        return Sizes(
            running=sum(one.future is not None and not one.future.done() for one in flights),
            waiting=sum(one.future is None for one in flights),
            room=self._executor.capacity,
            leases=0 if self._leases is None else self._leases.count,
        )

    def _count(self, key: JobKey, flight: _Flight, outcome: str) -> None:
        # A job's outcome may be asked for more than once.
        if flight.started is not None:
            kind = type(key).__name__.removesuffix("Key").lower()
            self._measures.job(_KINDS.get(kind, kind), outcome, time.monotonic() - flight.started)
            flight.started = None

    def _is_ours(self, key: JobKey) -> bool:
        # What a round will cost is of use to every engine that may come to apply it.
        if self._leases is None or isinstance(key, AheadKey):
            return True
        flight = self._flights.get(key)
        if flight is not None and (flight.future is not None or time.monotonic() < flight.resume):
            return True
        running = [
            one for one, its in self._flights.items() if not isinstance(one, AheadKey) and its.future is not None
        ]
        return len(running) < self._executor.capacity and self._leases.take(str(key))

    def _postpone(self, flight: _Flight, times: int) -> None:
        wait = min(2.0 ** min(times - 1, _LONGEST_POWER) - 1, _LONGEST_WAIT)
        flight.future, flight.resume = None, time.monotonic() + wait
        self._on_done()
