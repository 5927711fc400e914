"""The client's side of the task builder: read a configuration, pack a model, ask the service, show its answer
(spec/task-builder.md 8.2 to 8.4). Loads no TensorFlow."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from google.protobuf import text_format
from google.protobuf.message import DecodeError

from fedcompute import tracing
from fedcompute.builder.archive import MAX_CONFIG_BYTES, config_in_archive, is_archive, pack_directory
from fedcompute.builder.config import LoadedConfig, read_config
from fedcompute.builder.local_files import local_path
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.task_management import PROTOBUF
from fedcompute.errors import ArtifactInvalid, BuildFailed, ConfigInvalid, Reason
from fedcompute.protos import task_builder_pb2

logger = logging.getLogger(__name__)

DEFAULT_SERVER = "http://localhost:5000/"
SUCCESS = "Success! Tasks are built, and artifacts are uploaded to the cloud."
_MAX_ANSWER_BYTES = 16 << 20
# A build may wait for others and calibrate noise; gateways give up at 600 s.
_TIMEOUT = httpx.Timeout(30, read=600, write=120)


@dataclass(frozen=True)
class Rendered:
    """An answer as the records that a user sees, in order, and whether it is a success."""

    success: bool
    records: tuple[str, ...]


def load_config(path: str, *, population_name: str = "") -> LoadedConfig:
    """Reads the configuration at a local path or file URI; `population_name` overrides the one in it.

    The file is the configuration itself, or a zip archive that holds it beside a saved model. Raises ConfigInvalid; its
    detail starts with the published sentence and names line and field.
    """
    logger.info("Loading task config from %s...", path)
    try:
        with _local(path).open("rb") as file:
            data = config_in_archive(file) if is_archive(file) else file.read(MAX_CONFIG_BYTES + 1)
        loaded = read_config(data)
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise ConfigInvalid(Reason.CONFIG_UNREADABLE, f"Cannot load task config from {path}. {cause}") from error
    except ConfigProblems as error:
        raise ConfigProblems(error.reason, error.problems, prefix=f"Cannot load task config from {path}. ") from error
    except (ArtifactInvalid, ConfigInvalid) as error:
        detail = f"Cannot load task config from {path}. {error.detail}"
        raise ConfigInvalid(Reason.CONFIG_UNREADABLE, detail, remedy=error.remedy) from error
    if population_name:
        loaded.config.population_name = population_name
    return loaded


def build_request(
    saved_model: str, config: task_builder_pb2.TaskConfig, flags: task_builder_pb2.ExperimentFlags
) -> task_builder_pb2.BuildTaskRequest:
    """The request for a model given as a local directory or zip archive (sent inline) or as a URI (passed on).

    Raises ArtifactInvalid (SAVED_MODEL_INVALID) for a local path that is neither.
    """
    request = task_builder_pb2.BuildTaskRequest(task_config=config, flags=flags)
    if "://" in saved_model and not saved_model.startswith("file://"):
        request.saved_model.uri = saved_model
        return request
    path = _local(saved_model)
    if path.is_dir():
        request.saved_model.inline_resource.data = pack_directory(path)
    elif path.is_file():
        request.saved_model.inline_resource.data = path.read_bytes()
    else:
        raise ArtifactInvalid(Reason.SAVED_MODEL_INVALID, f"there is no saved model at {saved_model}")
    return request


def send(
    request: task_builder_pb2.BuildTaskRequest,
    server: str = DEFAULT_SERVER,
    *,
    artifact_only: bool = False,
    api_key: str = "",
    headers: Mapping[str, str] | None = None,
) -> task_builder_pb2.BuildTaskResponse:
    """Sends the request and waits for the answer, minutes if need be.

    `api_key` goes into the URL's query and into no log or error. Raises BuildFailed: SERVER_UNREACHABLE,
    SERVER_ANSWER_INVALID, and the service's own reason where it wants a key or another one.
    """
    endpoint = server.removesuffix("/") + (
        "/taskbuilder/v1:build-artifacts" if artifact_only else "/taskbuilder/v1:build-task-group"
    )
    logger.info("Send HTTP request to: %s", endpoint)
    content = request.SerializeToString()
    with tracing.span("request_build", {"population": request.task_config.population_name}) as traced:
        traced["bytes"] = len(content)
        response = _answered(*_posted(endpoint, server, content, api_key, headers or {}))
        if response.HasField("error_info"):
            traced["error"] = _type_name(response)
        return response


def _posted(
    endpoint: str, server: str, content: bytes, api_key: str, headers: Mapping[str, str]
) -> tuple[httpx.Response, bytes]:
    try:
        with (
            httpx.Client(timeout=_TIMEOUT, trust_env=not _is_local(server)) as client,
            client.stream(
                "POST",
                endpoint,
                params={"key": api_key} if api_key else None,
                content=content,
                headers={"content-type": PROTOBUF, **headers, **tracing.headers()},
            ) as answer,
        ):
            return answer, _read(answer)
    except (httpx.HTTPError, httpx.InvalidURL):
        # Without a cause: the library's errors repeat the URL, key included.
        raise BuildFailed(Reason.SERVER_UNREACHABLE, f"Fail to connect: {endpoint}") from None


def _answered(answer: httpx.Response, body: bytes) -> task_builder_pb2.BuildTaskResponse:
    if answer.status_code in (401, 403) and (refused := _refusal(body)) is not None:
        raise refused
    if not answer.is_success:
        raise BuildFailed(Reason.SERVER_ANSWER_INVALID, f"{answer.status_code}: {answer.reason_phrase}")
    try:
        return task_builder_pb2.BuildTaskResponse.FromString(body)
    except DecodeError as error:
        raise BuildFailed(Reason.SERVER_ANSWER_INVALID, "Server returned unreadable response.") from error


def render(response: task_builder_pb2.BuildTaskResponse) -> Rendered:
    """The published records of an answer: success line, report, tasks; or report, failure line."""
    report = text_format.MessageToString(response.task_report)
    if response.WhichOneof("result") == "task_group":
        return Rendered(True, (SUCCESS, report, text_format.MessageToString(response.task_group)))
    error = response.error_info
    failure = (
        f"Failed to create task group. Error type: {error.error_type}; Error message: {error.error_message} "
        f"[{_type_name(response)}]"
    )
    return Rendered(False, (report, failure))


def _type_name(response: task_builder_pb2.BuildTaskResponse) -> str:
    kind = response.error_info.error_type
    return task_builder_pb2.ErrorType.Enum.Name(kind) if kind in task_builder_pb2.ErrorType.Enum.values() else "?"


def _refusal(body: bytes) -> BuildFailed | None:
    try:
        document = json.loads(body)
        return BuildFailed(Reason(document["code"]), str(document["message"]), remedy=str(document["remedy"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _local(uri: str) -> Path:
    if uri.startswith("file://"):
        path = local_path(uri)
        if path is None:
            raise ConfigInvalid(Reason.CONFIG_UNREADABLE, f"{uri} names no file on this machine")
        return path
    return Path(uri).expanduser()


def _is_local(server: str) -> bool:
    # A proxy of the environment does not know this machine's own addresses.
    return urlsplit(server).hostname in ("localhost", "127.0.0.1", "::1")


def _read(answer: httpx.Response) -> bytes:
    body = bytearray()
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise httpx.DecodingError("the answer is too large")
    return bytes(body)
