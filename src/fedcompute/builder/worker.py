"""One build request from bytes to a result, in a process of its own that may load TensorFlow and hostile models."""

import logging
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

from fedcompute.builder.artifacts import BuiltGroup
from fedcompute.builder.lower_ops import read_lower_ops
from fedcompute.builder.model_sources import model_directory
from fedcompute.errors import ArtifactInvalid, BuildFailed, ConfigInvalid, FedComputeError, Reason
from fedcompute.protos import task_builder_pb2
from fedcompute.tracing import Finished, keep

logger = logging.getLogger(__name__)

# The share of its limit that a process may hold between builds.
_WORN = 0.75

_ErrorType = task_builder_pb2.ErrorType


@dataclass(frozen=True)
class BuildJob:
    """A parsed request and what the service's settings say about it."""

    request: task_builder_pb2.BuildTaskRequest
    default_population: int
    op_table: str | None
    allow_local_models: bool
    allow_object_stores: bool = True


@dataclass(frozen=True)
class BuildOutcome:
    """Either a group or an error, and the report as far as the work got.

    `worn`: the process holds so much memory after it that another build should have a new one. `spans`: its steps.
    """

    report: task_builder_pb2.TaskReport
    group: BuiltGroup | None = None
    error: task_builder_pb2.ErrorInfo | None = None
    worn: bool = False
    spans: tuple[Finished, ...] = ()


class BuildProcess:
    """One spawned process that builds; a build that hangs or kills it costs that build and a restart.

    It may hold `memory_bytes` of its own data.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._memory_bytes = memory_bytes

    def start(self, job: BuildJob) -> "Future[BuildOutcome]":
        """Begins a build, behind those that are under way."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                1, mp_context=context, initializer=prepare_worker, initargs=(self._memory_bytes,)
            )
        return self._pool.submit(run_build, job)

    @contextmanager
    def ending(self, timeout: float) -> Iterator[None]:
        """Around the wait for a build; ends the process with a wait that fails.

        Raises BuildFailed if the wait outlives `timeout` seconds or the process dies.
        """
        try:
            yield
        except TimeoutError:
            self.close()
            raise BuildFailed(Reason.BUILD_FAILED, f"the build took more than {timeout:g} seconds") from None
        except BrokenProcessPool:
            self.close()
            text = f"the build ended its process, which may hold {self._memory_bytes >> 20} MiB"
            raise BuildFailed(Reason.BUILD_FAILED, text) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        self._pool = None


@dataclass(frozen=True)
class BuildOrder:
    """A build for another machine: at most `timeout` seconds in a process that may hold `memory_bytes`."""

    job: BuildJob
    timeout: float
    memory_bytes: int


@cache
def _process_here(memory_bytes: int) -> BuildProcess:
    return BuildProcess(memory_bytes)


def build_elsewhere(order: BuildOrder) -> BuildOutcome:
    """A job: builds in a process below this one, which the next build finds warm; every failure is in the outcome."""
    process = _process_here(order.memory_bytes)
    try:
        with process.ending(order.timeout):
            outcome = process.start(order.job).result(order.timeout)
    except BuildFailed as error:
        return BuildOutcome(task_builder_pb2.TaskReport(), error=error_info(error))
    if outcome.worn:
        process.close()
    return outcome


def prepare_worker(memory_bytes: int) -> None:
    """Initializer of a worker process: ends with its parent, leaves Ctrl-C to it, imports what every build needs.

    From here on the process may hold `memory_bytes` of its own data; what asks for more fails or ends it.
    """
    _limit_memory(memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    # TensorFlow greets every process with a page of hints unless told otherwise before it loads.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import fedcompute.builder.build  # noqa: F401


def _limit_memory(memory_bytes: int) -> None:
    # Data and not address space: TensorFlow maps gigabytes that it never touches.
    for kind, limit in ((resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def run_build(job: BuildJob) -> BuildOutcome:
    """Builds a request's task group; every failure becomes an error in the published words."""
    with keep() as spans:
        outcome = _outcome(job)
    return replace(
        outcome, spans=tuple(spans), worn=_data_bytes() > _WORN * resource.getrlimit(resource.RLIMIT_DATA)[0] > 0
    )


def _data_bytes() -> int:
    """What counts against the limit; 0 where the system does not tell, nor enforce it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _outcome(job: BuildJob) -> BuildOutcome:
    from fedcompute.builder.build import build_task_group

    report = task_builder_pb2.TaskReport()
    request = job.request
    try:
        with tempfile.TemporaryDirectory(prefix="fedcompute-build-") as scratch:
            group = build_task_group(
                model_directory(
                    request.saved_model,
                    Path(scratch),
                    local=job.allow_local_models,
                    object_stores=job.allow_object_stores,
                ),
                request.task_config,
                request.flags,
                report=report,
                default_population=job.default_population,
                op_table=job.op_table,
                lower_ops=read_lower_ops(request.flags.lower_ops),
            )
        return BuildOutcome(report, group=group)
    except Exception as error:
        if _is_out_of_memory(error):
            error = BuildFailed(Reason.BUILD_FAILED, "the build ran out of memory")
        if isinstance(error, FedComputeError):
            return BuildOutcome(report, error=error_info(error))
        logger.exception("A build failed in a way that no rule foresees.")
        return BuildOutcome(report, error=error_info(BuildFailed(Reason.BUILD_FAILED, f"{type(error).__name__}")))


def _is_out_of_memory(error: BaseException | None) -> bool:
    # Whichever step met the end of memory gave it a name of its own.
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError":
            return True
        error = error.__cause__ or error.__context__
    return False


def error_info(error: FedComputeError) -> task_builder_pb2.ErrorInfo:
    """The error's type and text as users of the reference know them."""
    kind, text = _rendered(error)
    return task_builder_pb2.ErrorInfo(error_type=kind, error_message=text)


def _rendered(error: FedComputeError) -> tuple[task_builder_pb2.ErrorType.Enum, str]:
    if isinstance(error, ConfigInvalid):
        return _ErrorType.INVALID_REQUEST, f"Task config is invalid: {error.detail}"
    if error.reason == Reason.SAVED_MODEL_INVALID:
        return _ErrorType.INVALID_REQUEST, f"Cannot load TFF functional model: {error.detail} ({error.remedy})"
    if isinstance(error, ArtifactInvalid):
        text = f"Failed to build learning algorithm based on `learning_process` config: {error.detail} ({error.remedy})"
        return _ErrorType.INVALID_REQUEST, text
    if error.reason == Reason.TASK_MANAGEMENT_FAILED:
        return _ErrorType.TASK_MANAGEMENT_ERROR, error.detail
    if error.reason == Reason.ARTIFACT_UPLOAD_FAILED:
        return _ErrorType.ARTIFACT_BUILDING_ERROR, error.detail
    text = f"Artifact building failed for task 0: {error.detail}\n. Stop building remaining artifacts."
    return _ErrorType.ARTIFACT_BUILDING_ERROR, text
