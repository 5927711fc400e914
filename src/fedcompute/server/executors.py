"""Where heavy jobs run: a pool of worker processes on this machine, or the nodes of a Ray cluster (`ray_executor`).

Jobs are module-level functions of plain data, blobs in and blobs out, so that one may run twice without harm.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Protocol

from fedcompute import tracing
from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.logs import Logs, bound, configure_logging, current_logs, facts
from fedcompute.server.settings import PROCESSES, RAY, RAY_ADDRESS
from fedcompute.server.worker_memory import keep_freed_memory

_LOG = logging.getLogger(__name__)
# How long idle workers have to leave by themselves.
_LEAVE_SECONDS = 1.0
# A job that loses its process this often is given up.
LIVES = 3


@dataclass(frozen=True)
class Failure:
    """An exception as text: one that does not survive the way between processes would end the pool."""

    reason: Reason
    detail: str
    trace: str = ""  # of an error that nobody expected
    remedy: str | None = None


class Executor(Protocol):
    """Runs jobs somewhere else; the seam for other kinds of workers."""

    def submit(self, job: Callable[[Any], Any], argument: Any) -> Future[Any]:
        """Queues `job(argument)`. Callable from any thread.

        The future carries the job's result, or OperationFailed with the reason of its typed error (INTERNAL for any
        other, which is logged with its traceback).
        """

    def warm_up(self) -> None:
        """Starts what the first job would otherwise wait for, without blocking."""

    @property
    def capacity(self) -> int:
        """How many jobs are worth having here at a time, those that wait for a worker included."""

    def close(self) -> None:
        """Drops queued jobs, waits for none, and leaves no process behind."""


def open_executor(kind: str, ray_address: str | None, workers: int) -> Executor:
    """Worker processes here (`kind` "processes"), or those of a Ray cluster ("ray").

    `ray_address`: HOST:PORT of the cluster's head, "auto" for the cluster that this machine is part of, None for one
    that starts here and ends with the executor. `workers`: how many jobs may run at a time; on Ray 0 is as many as the
    cluster has CPUs. Raises OperationFailed(SETTINGS_INVALID) for what this is not, or if Ray is not installed.
    """
    if ray_address is not None and not (kind == RAY and RAY_ADDRESS.fullmatch(ray_address)):
        raise OperationFailed(Reason.SETTINGS_INVALID, "a Ray address is HOST:PORT or auto, and for executor ray")
    if kind == PROCESSES:
        return ProcessExecutor(max(1, workers))
    from fedcompute.server.ray_executor import RayExecutor

    return RayExecutor(ray_address, workers)


class ProcessExecutor:
    """A pool of spawned processes that starts with the first job.

    When a worker dies (out of memory, killed), the pool is rebuilt and the jobs it held run again. Workers end with
    this process, however it ends, and ignore Ctrl-C, which is the server's to handle.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False
        # Signals interrupt the main thread only: a worker that starts elsewhere always gets all of its start.
        self._starter = ThreadPoolExecutor(1)

    def submit(self, job: Callable[[Any], Any], argument: Any) -> Future[Any]:
        """Queues `job(argument)`; see `Executor.submit`."""
        outcome: Future[Any] = Future()
        job, origin = partial(with_facts, facts(), job), tracing.origin()
        self._queue(outcome, job if origin is None else partial(with_spans, origin, job), argument, LIVES)
        return outcome

    def warm_up(self) -> None:
        """Starts the worker processes and lets each import what jobs need."""
        for _ in range(self._workers):
            self.submit(import_jobs, None)

    @property
    def capacity(self) -> int:
        """Two for each worker: one that runs, one that is next."""
        return 2 * self._workers

    def close(self) -> None:
        """Ends the pool; running jobs are cut off, which is safe because every job may run again."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        self._starter.shutdown(wait=False)
        if pool is not None:
            processes = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            # An idle worker ends by itself at once, and cleans up behind itself; only a running job is cut off.
            deadline = time.monotonic() + _LEAVE_SECONDS
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
                process.terminate()
            for process in processes:
                process.join(5)

    def _queue(self, outcome: Future[Any], job: Callable[[Any], Any], argument: Any, lives: int) -> None:
        try:
            self._starter.submit(self._start, outcome, job, argument, lives)
        except RuntimeError:  # closed
            outcome.cancel()

    def _start(self, outcome: Future[Any], job: Callable[[Any], Any], argument: Any, lives: int) -> None:
        with self._lock:
            if self._closed:
                outcome.cancel()
                return
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self._workers,
                    multiprocessing.get_context("spawn"),
                    initializer=_enter_worker,
                    initargs=(current_logs(),),
                )
            pool = self._pool
            # A worker that starts inherits this: Ctrl-C must not reach it before it can ignore it.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                inner = pool.submit(guarded, job, argument)
            except (BrokenProcessPool, RuntimeError, OSError) as error:
                inner = Future()
                inner.set_exception(BrokenProcessPool(str(error)))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        inner.add_done_callback(lambda done: self._finish(done, pool, outcome, job, argument, lives))

    def _finish(
        self,
        done: Future[Any],
        pool: ProcessPoolExecutor,
        outcome: Future[Any],
        job: Callable[[Any], Any],
        argument: Any,
        lives: int,
    ) -> None:
        if done.cancelled():
            outcome.cancel()
            return
        error = done.exception()
        if isinstance(error, BrokenProcessPool) and lives > 1 and not self._closed:
            with self._lock:
                if self._pool is pool:
                    self._pool = None
                    _LOG.warning("a worker process died; its jobs run again")
            # Not in this callback's thread: it belongs to the broken pool, which waits for it.
            self._queue(outcome, job, argument, lives - 1)
            return
        if error is not None:
            settle(outcome, Failure(Reason.INTERNAL, f"the job's worker process died: {error}"))
        else:
            settle(outcome, done.result())


def settle(outcome: Future[Any], result: Any) -> None:
    """Gives `outcome` what a job gave, or its failure; sends its spans, logs what nobody expected."""
    if isinstance(result, tracing.Told):
        tracing.tell(result.spans, result.origin)
        result = result.result
    # A cancelled outcome takes no result; nobody waits for it.
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Failure):
            if result.trace:
                _LOG.error("a job failed", extra={"trace": result.trace})
            outcome.set_exception(OperationFailed(result.reason, result.detail, remedy=result.remedy))
        else:
            outcome.set_result(result)


def guarded(job: Callable[[Any], Any], argument: Any) -> Any:
    """What the job gives, or a Failure in place of whatever it raises."""
    try:
        return job(argument)
    except FedComputeError as error:
        trace = traceback.format_exc() if error.reason is Reason.INTERNAL else ""
        return Failure(error.reason, error.detail, trace, error.remedy)
    except Exception as error:
        return Failure(Reason.INTERNAL, f"{type(error).__name__}: {error}", traceback.format_exc())


def with_facts(about: dict[str, str], job: Callable[[Any], Any], argument: Any) -> Any:
    """Runs a job whose lines carry the facts."""
    with bound(about):
        return job(argument)


def with_spans(origin: tracing.Origin, job: Callable[[Any], Any], argument: Any) -> tracing.Told:
    """Runs a job; its spans come with what it gives, for the place in a trace where it was asked for."""
    with tracing.keep() as spans:
        result = guarded(job, argument)
    return tracing.Told(result, origin, tuple(spans))


def _enter_worker(logs: Logs | None) -> None:
    if logs is not None:
        configure_logging(logs)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool that is told to stop terminates its workers; the default action is what ends them at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=_leave_with_parent, args=(sentinel,), daemon=True).start()


def _leave_with_parent(sentinel: int) -> None:
    # The sentinel becomes ready when the parent is gone, also after kill -9, which runs no clean-up of ours.
    wait([sentinel])
    os._exit(1)


def import_jobs(_: None) -> None:
    """A job that loads what the jobs of rounds need."""
    import fedcompute.server.rounds.aggregate
    import fedcompute.server.rounds.update  # noqa: F401
