"""Registering a built group: tasks are created, artifacts uploaded, and all of it undone when a step fails
(spec/task-builder.md 7.4, 8.1)."""

import gzip
import logging
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlsplit

import httpx
from google.protobuf.message import DecodeError

from fedcompute.builder.artifacts import BuiltGroup, BuiltTask
from fedcompute.builder.callers import key_header
from fedcompute.builder.identity import id_token_header
from fedcompute.errors import BuildFailed, Reason
from fedcompute.protos import task_builder_pb2, task_pb2
from fedcompute.tracing import headers, span

logger = logging.getLogger(__name__)

PROTOBUF = "application/x-protobuf"
_MAX_ANSWER_BYTES = 1 << 20
_MAX_REASON_CHARACTERS = 500
_ARTIFACT_HEADERS = {"content-type": "application/octet-stream", "content-encoding": "gzip"}
_TIMEOUT = httpx.Timeout(30, read=120, write=120)


def register_group(base_url: str, group: BuiltGroup, *, api_key: str = "") -> task_builder_pb2.TaskGroup:
    """Creates the group's tasks (training first) and uploads their artifacts; returns the tasks as created.

    `api_key`: of the role builder or above, for a server that asks for one.

    Raises BuildFailed: TASK_MANAGEMENT_FAILED if a task cannot be created, ARTIFACT_UPLOAD_FAILED if an artifact
    cannot be uploaded. The tasks created so far are cancelled then, as far as task management answers.
    """
    if not base_url:
        raise BuildFailed(Reason.TASK_MANAGEMENT_FAILED, "Cannot find task management server.")
    base = base_url.removesuffix("/")
    fields = (("training_task", group.training), ("eval_task", group.evaluation))
    kinds = [(kind, built) for kind, built in fields if built is not None]
    created: list[task_pb2.Task] = []
    # For task management alone: uploads go to URLs that carry their own signature.
    identity = {**id_token_header(base), **key_header(api_key)}
    with httpx.Client(timeout=_TIMEOUT, transport=httpx.HTTPTransport(retries=2)) as client:
        try:
            for _, built in kinds:
                facts = {"population": built.task.population_name, "correlation_id": built.task.correlation_id}
                with span("register_task", facts) as traced:
                    created.append(_create(client, base, built.task, {**identity, **headers()}))
                    traced["task"] = created[-1].task_id
            uploads = [_uploads(task, built) for task, (_, built) in zip(created, kinds, strict=True)]
            for task, parts in zip(created, uploads, strict=True):
                size = sum(len(data) for _, data in parts)
                with span("upload_artifacts", {"task": task.task_id, "bytes": size}):
                    for url, data in parts:
                        _upload(client, task.task_id, url, data)
                logger.info("Artifacts are uploaded for task %s.", task.task_id)
        except Exception:
            _cancel(client, base, created, identity)
            raise
    return task_builder_pb2.TaskGroup(**{kind: task for (kind, _), task in zip(kinds, created, strict=True)})


def link_warning(group: task_builder_pb2.TaskGroup) -> str | None:
    """A warning if the evaluation of a fresh group reads another training task than the one just created."""
    evaluation = group.eval_task.info.evaluation_info
    same_population = evaluation.training_population_name == group.training_task.population_name
    if not group.HasField("training_task") or not group.HasField("eval_task") or not same_population:
        return None
    if evaluation.training_task_id == group.training_task.task_id:
        return None
    return (
        f"the evaluation task reads checkpoints of training task {evaluation.training_task_id}, "
        f"and the training task just created is {group.training_task.task_id}"
    )


def _create(client: httpx.Client, base: str, task: task_pb2.Task, identity: Mapping[str, str]) -> task_pb2.Task:
    url = f"{base}/taskmanagement/v1/population/{quote(task.population_name, safe='')}:create-task"
    failed = "Failed to create tasks by task management service: "
    request = task_pb2.CreateTaskRequest(task=task)
    try:
        with client.stream(
            "POST", url, content=request.SerializeToString(), headers={"content-type": PROTOBUF, **identity}
        ) as answer:
            body = _read(answer)
    except httpx.HTTPError as error:
        raise BuildFailed(Reason.TASK_MANAGEMENT_FAILED, f"{failed}Fail to connect: {url}") from error
    if not answer.is_success:
        reason = _reason(answer, body)
        raise BuildFailed(Reason.TASK_MANAGEMENT_FAILED, f"{failed}{answer.status_code}: {reason}")
    try:
        created = task_pb2.CreateTaskResponse.FromString(body).task
    except DecodeError as error:
        raise BuildFailed(Reason.TASK_MANAGEMENT_FAILED, f"{failed}Server returned unreadable response.") from error
    if not created.task_id:
        raise BuildFailed(Reason.TASK_MANAGEMENT_FAILED, f"{failed}Server returned unreadable response.")
    return created


def _uploads(task: task_pb2.Task, built: BuiltTask) -> list[tuple[str, bytes]]:
    """(URL, artifact) of every upload, all URLs checked."""
    parts: Sequence[tuple[Sequence[str], bytes]] = (
        (task.init_checkpoint_url, built.checkpoint),
        (task.server_phase_url, built.plan),
        (task.client_only_plan_url, built.client_plan),
    )
    uploads = [(url, data) for urls, data in parts for url in (urls or [""])]
    for url, _ in uploads:
        if urlsplit(url).scheme not in ("http", "https"):
            raise BuildFailed(
                Reason.ARTIFACT_UPLOAD_FAILED,
                "Cannot build artifacts because createTask returns invalid URLs: "
                f"{_without_query(url) or 'empty URI'}.",
            )
    return uploads


def _upload(client: httpx.Client, task_id: int, url: str, data: bytes) -> None:
    shown = _without_query(url)
    logger.info("Start uploading artifact to: %s", shown)
    try:
        # The modification time would make equal artifacts differ.
        answer = client.put(url, content=gzip.compress(data, mtime=0), headers=_ARTIFACT_HEADERS)
        cause = "" if answer.is_success else f"{answer.status_code}: {answer.reason_phrase}"
    except httpx.HTTPError as error:
        cause = type(error).__name__
    if cause:
        raise BuildFailed(
            Reason.ARTIFACT_UPLOAD_FAILED,
            f"Artifact failed to upload for task {task_id}: Cannot upload artifact to: {shown} ({cause})"
            ". Stop building remaining artifacts.",
        )
    logger.info("Upload complete!")


def _cancel(client: httpx.Client, base: str, tasks: Sequence[task_pb2.Task], identity: Mapping[str, str]) -> None:
    for task in tasks:
        url = f"{base}/taskmanagement/v1/population/{quote(task.population_name, safe='')}/tasks/{task.task_id}:cancel"
        try:
            answer = client.post(url, headers=identity)
            done = answer.is_success
        except httpx.HTTPError:
            done = False
        logger.log(
            logging.INFO if done else logging.WARNING,
            "Task %s was %s after a failure.",
            task.task_id,
            "cancelled" if done else "left behind: its cancellation failed",
        )


def _read(answer: httpx.Response) -> bytes:
    body = b""
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise httpx.DecodingError("the answer is too large")
    return body


def _reason(answer: httpx.Response, body: bytes) -> str:
    """The status's words and, where the server explains itself in text, its explanation."""
    kind = answer.headers.get("content-type", "")
    if not kind.startswith(("text/", "application/json")):
        return answer.reason_phrase
    return f"{answer.reason_phrase}: {body.decode(errors='replace')[:_MAX_REASON_CHARACTERS]}"


def _without_query(url: str) -> str:
    # A query may carry a signature.
    return url.split("?")[0]
