"""The task builder as an HTTP service (spec/task-builder.md 8.1). It loads no TensorFlow: builds run in a worker."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedcompute import tracing
from fedcompute.builder.archive import MAX_ARCHIVE_BYTES
from fedcompute.builder.artifact_places import Place, PlaceRules, artifact_place, write_artifact
from fedcompute.builder.artifacts import BuiltGroup
from fedcompute.builder.build_cache import BuildCache, build_key
from fedcompute.builder.callers import BUILDERS, READERS, check_caller, presented_key
from fedcompute.builder.measures import BuildMeasures
from fedcompute.builder.model_sources import fingerprint
from fedcompute.builder.task_management import PROTOBUF, link_warning, register_group
from fedcompute.builder.tasks import artifact_only_task
from fedcompute.builder.validation import DEFAULT_POPULATION
from fedcompute.builder.worker import BuildJob, BuildOrder, BuildOutcome, BuildProcess, build_elsewhere, error_info
from fedcompute.errors import BuildFailed, ConfigInvalid, FedComputeError, Reason
from fedcompute.protos import task_builder_pb2

logger = logging.getLogger(__name__)

_Mode = task_builder_pb2.TaskMode
_ErrorType = task_builder_pb2.ErrorType
_LONGEST_NAME = 64  # in a trace

# Runs a function of plain data somewhere else.
Submit = Callable[[Callable[[Any], Any], Any], "Future[Any]"]


@dataclass(frozen=True)
class ServiceSettings:
    """How the service behaves.

    `task_management_url`: where tasks are registered, "" if nowhere. `storage_root`: the only directory that
    artifact-only builds may write to. `allow_local_models`, `allow_object_stores`: whether requests may name a model
    on this machine, and models and artifacts in object stores, which are reached with the service's own credentials.
    `forbidden_flags`: names of experiment flags that requests may not set. `op_table`: replaces the table of ops that
    devices have. `hosts`: the host names that requests may address, any if empty. `require_api_keys`: whether requests
    need an API key of the server that gets the tasks. `api_key`: the service's own, for requests that show none.
    """

    task_management_url: str = ""
    default_population: int = DEFAULT_POPULATION
    storage_root: Path | None = None
    allow_local_models: bool = True
    allow_object_stores: bool = True
    forbidden_flags: frozenset[str] = field(default_factory=frozenset)
    hosts: frozenset[str] = field(default_factory=frozenset)
    op_table: str | None = None
    require_api_keys: bool = False
    api_key: str = field(default="", repr=False)
    max_request_bytes: int = MAX_ARCHIVE_BYTES + (1 << 20)
    build_timeout: float = 540.0  # seconds; below the 600 of common gateways
    build_memory: int = 8 << 30  # bytes of data that the build process may hold


class BuildWorker:
    """Builds in one process of this machine, one after the other, or wherever `submit` takes jobs."""

    def __init__(self, memory_bytes: int, submit: Submit | None = None) -> None:
        self._process = BuildProcess(memory_bytes)
        self._memory_bytes = memory_bytes
        self._submit = submit
        self._turn = asyncio.Lock()
        self._cache = BuildCache()

    async def build(self, job: BuildJob, timeout: float) -> BuildOutcome:
        """Runs a build when it is its turn, or answers with an equal one that succeeded before.

        Raises BuildFailed if it outlives `timeout` seconds or its process dies.
        """
        async with self._turn if self._submit is None else contextlib.nullcontext():
            key = await run_in_threadpool(_key, job)
            if key is not None and (known := await run_in_threadpool(self._cache.get, key)) is not None:
                logger.info("This model and configuration were built before.")
                return BuildOutcome(known.report, group=known)
            outcome = await self._run(job, timeout)
            # A model that changed meanwhile must not be kept under the old one's name.
            if key is not None and outcome.group is not None and key == await run_in_threadpool(_key, job):
                self._cache.put(key, outcome.group)
            return outcome

    async def _run(self, job: BuildJob, timeout: float) -> BuildOutcome:
        if self._submit is not None:
            order = BuildOrder(job, timeout, self._memory_bytes)
            built: BuildOutcome = await asyncio.wrap_future(self._submit(build_elsewhere, order))
            return built
        with self._process.ending(timeout):
            outcome = await asyncio.wait_for(asyncio.wrap_future(self._process.start(job)), timeout)
        if outcome.worn:
            self._process.close()
        return outcome

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.close()


def _key(job: BuildJob) -> bytes | None:
    """What the job's result depends on; None if that cannot be said."""
    model = fingerprint(job.request.saved_model, local=job.allow_local_models, object_stores=job.allow_object_stores)
    settings = tuple(getattr(job, part.name) for part in fields(job) if part.name != "request")
    return None if model is None else build_key(model, job.request, settings)


def create_service(settings: ServiceSettings, submit: Submit | None = None) -> Starlette:
    """The ASGI application with its routes.

    `submit`: where builds run, an executor's; None is a process of this machine.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.worker = BuildWorker(settings.build_memory, submit)
        app.state.measures = BuildMeasures()
        try:
            yield
        finally:
            app.state.worker.close()

    return Starlette(
        routes=[
            Route("/taskbuilder/v1:build-task-group", build_task_group, methods=["POST"]),
            Route("/taskbuilder/v1:build-artifacts", build_artifacts, methods=["POST"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/ready", greet, methods=["GET"]),
            Route("/healthz", greet, methods=["GET"]),
        ],
        lifespan=lifespan,
    )


async def greet(request: Request) -> Response:
    """GET /ready and /healthz."""
    return PlainTextResponse("The task builder is ready.\n")


async def metrics(request: Request) -> Response:
    """GET /metrics: what the service measures of itself; whoever may build may read it, and viewers of the server."""
    if refusal := await _refused(request, READERS):
        return refusal
    measures: BuildMeasures = request.app.state.measures
    return Response(measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def build_task_group(request: Request) -> Response:
    """POST /taskbuilder/v1:build-task-group: builds, creates the tasks and uploads their artifacts."""
    return await _answer(request, artifact_only=False)


async def build_artifacts(request: Request) -> Response:
    """POST /taskbuilder/v1:build-artifacts: builds and writes the artifacts where the configuration says."""
    return await _answer(request, artifact_only=True)


async def _answer(request: Request, *, artifact_only: bool) -> Response:
    settings: ServiceSettings = request.app.state.settings
    # A web page in the user's browser can send neither this type nor this host name unasked.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != PROTOBUF:
        return PlainTextResponse(f"send a BuildTaskRequest as {PROTOBUF}\n", status_code=415)
    if refusal := await _refused(request, BUILDERS):
        return refusal
    api_key = presented_key(request.headers, request.query_params)
    body = await _read_body(request, settings.max_request_bytes)
    if body is None:
        return PlainTextResponse(f"a request has at most {settings.max_request_bytes} bytes\n", status_code=413)
    try:
        message = task_builder_pb2.BuildTaskRequest.FromString(body)
    except DecodeError:
        return PlainTextResponse("Unable to decode request body: no BuildTaskRequest\n", status_code=400)
    response = task_builder_pb2.BuildTaskResponse()
    response.task_report.SetInParent()
    facts: dict[str, tracing.Value] = {
        "population": message.task_config.population_name[:_LONGEST_NAME],
        "artifact_only": artifact_only,
        "bytes": len(body),
    }
    started, outcome = time.monotonic(), "built"
    try:
        with tracing.span("build", facts, parent=tracing.received(request.headers), serves=True) as traced:
            result = await _build(
                request.app.state.worker,
                settings,
                message,
                response.task_report,
                artifact_only,
                api_key or settings.api_key,
            )
            if isinstance(result, task_builder_pb2.ErrorInfo):
                traced["error"] = _ErrorType.Enum.Name(result.error_type)
    except FedComputeError as error:
        result = error_info(error)
    if isinstance(result, task_builder_pb2.ErrorInfo):
        outcome = _ErrorType.Enum.Name(result.error_type)
        logger.warning("A task group was refused: %s", outcome)
        response.error_info.CopyFrom(result)
    else:
        response.task_group.CopyFrom(result)
    request.app.state.measures.built(outcome, time.monotonic() - started)
    return Response(response.SerializeToString(), media_type=PROTOBUF)


async def _refused(request: Request, roles: Sequence[str]) -> Response | None:
    """The answer for a caller who addresses another host or has none of the roles; None for everybody else."""
    settings: ServiceSettings = request.app.state.settings
    if settings.hosts and urlsplit(f"//{request.headers.get('host', '')}").hostname not in settings.hosts:
        return PlainTextResponse("this service is addressed by another name\n", status_code=403)
    api_key = presented_key(request.headers, request.query_params)
    if api_key or settings.require_api_keys:
        try:
            await run_in_threadpool(check_caller, settings.task_management_url, api_key, roles)
        except FedComputeError as error:
            return _refusal(error)
    return None


def _refusal(error: FedComputeError) -> Response:
    document = {"code": error.reason.value, "message": error.detail, "remedy": error.remedy}
    headers = {"www-authenticate": 'Bearer realm="fedcompute"'} if error.status in (401, 403) else None
    return JSONResponse(document, status_code=error.status, headers=headers)


async def _build(
    worker: BuildWorker,
    settings: ServiceSettings,
    message: task_builder_pb2.BuildTaskRequest,
    report: task_builder_pb2.TaskReport,
    artifact_only: bool,
    api_key: str,
) -> task_builder_pb2.TaskGroup | task_builder_pb2.ErrorInfo:
    logger.info("Start building task group under population %r.", message.task_config.population_name)
    _check_flags(message.flags, settings.forbidden_flags)
    # Looked at first: a build takes long, and none of it could be kept.
    rules = PlaceRules(settings.storage_root, settings.allow_object_stores)
    places = _artifact_places(message.task_config, rules) if artifact_only else {}
    if not artifact_only and not settings.task_management_url:
        raise BuildFailed(Reason.TASK_MANAGEMENT_FAILED, "Cannot find task management server.")
    job = BuildJob(
        message,
        settings.default_population,
        settings.op_table,
        settings.allow_local_models,
        settings.allow_object_stores,
    )
    outcome = await worker.build(job, settings.build_timeout)
    tracing.tell(outcome.spans)
    report.CopyFrom(outcome.report)
    if outcome.group is None:
        assert outcome.error is not None, "an outcome is a group or an error"
        return outcome.error
    if artifact_only:
        with tracing.span("write_artifacts"):
            return await run_in_threadpool(_write_group, outcome.group, places)
    register = partial(register_group, settings.task_management_url, outcome.group, api_key=api_key)
    group = await run_in_threadpool(register)
    if warning := link_warning(group):
        report.warnings.append(warning)
    return group


@dataclass(frozen=True)
class _Places:
    """Where the three artifacts of one artifact-only task go."""

    urls: task_builder_pb2.ArtifactBuilding
    plan: Place
    client_plan: Place
    checkpoint: Place


def _artifact_places(config: task_builder_pb2.TaskConfig, rules: PlaceRules) -> dict[str, _Places]:
    """TaskGroup field name -> places, for the tasks that the configuration's mode builds."""
    learning = config.federated_learning
    evaluates = config.mode in (_Mode.TRAINING_AND_EVAL, _Mode.EVAL_ONLY) or (
        config.mode == _Mode.UNKNOWN and learning.HasField("evaluation")
    )
    urls = {}
    if config.mode != _Mode.EVAL_ONLY:
        urls["training_task"] = learning.learning_process.artifact_building
    if evaluates:
        urls["eval_task"] = learning.evaluation.artifact_building
    return {
        kind: _Places(
            block,
            plan=artifact_place(block.plan_url, rules),
            client_plan=artifact_place(block.client_plan_url, rules),
            checkpoint=artifact_place(block.checkpoint_url, rules),
        )
        for kind, block in urls.items()
    }


def _write_group(group: BuiltGroup, places: Mapping[str, _Places]) -> task_builder_pb2.TaskGroup:
    result = task_builder_pb2.TaskGroup()
    for kind, built in (("training_task", group.training), ("eval_task", group.evaluation)):
        if built is not None:
            place = places[kind]
            write_artifact(place.checkpoint, built.checkpoint)
            write_artifact(place.plan, built.plan)
            write_artifact(place.client_plan, built.client_plan)
            getattr(result, kind).CopyFrom(artifact_only_task(place.urls, built.task.min_client_version))
    return result


def _check_flags(flags: task_builder_pb2.ExperimentFlags, forbidden: frozenset[str]) -> None:
    for flag, _ in flags.ListFields():
        if flag.name in forbidden:
            raise ConfigInvalid(
                Reason.CONFIG_INVALID, f"[Invalid task config]: this task builder does not allow the flag {flag.name}"
            )


async def _read_body(request: Request, limit: int) -> bytes | None:
    """The body, or None if it is longer than `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)
