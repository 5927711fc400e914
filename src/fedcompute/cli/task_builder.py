"""The `task_builder` program: the task builder as an HTTP service."""

import os
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from fedcompute.cli.connection import api_key
from fedcompute.cli.flags import define_tracing, run, tracing_url
from fedcompute.cli.server import serve
from fedcompute.errors import OperationFailed, Reason
from fedcompute.server.listening import listen

if TYPE_CHECKING:
    from fedcompute.server.executors import Executor

USAGE = """
Builds federated learning tasks over HTTP and registers them with a federated compute server.

Example: TASK_MANAGEMENT_SERVER_URL=http://localhost:8080 task_builder --port=5000
"""
DEFAULT_TASK_MANAGEMENT_URL = "http://localhost:8080"
_OPS_TABLE_LIMIT = 1 << 20
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_SKIP_FLAGS = ("skip_flex_ops_check", "skip_dp_check", "skip_dp_aggregator")


def main() -> None:
    """Entry point of the `task_builder` program."""
    run(_serve, _define, USAGE)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for every network.", flag_values=values)
    flags.DEFINE_integer("port", 5000, "Port to listen on; 0 for any free one.", 0, 65535, flag_values=values)
    flags.DEFINE_string(
        "task_management_server",
        None,
        "URL of the server that gets the tasks; the environment's TASK_MANAGEMENT_SERVER_URL by default, "
        f"else {DEFAULT_TASK_MANAGEMENT_URL}.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "total_population",
        1_000_000,
        "Devices that accounting samples from, where the configuration sets no estimated_population.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "support_ops", None, "File of `version,op` lines: the ops that devices have.", flag_values=values
    )
    flags.DEFINE_string(
        "storage_root",
        None,
        "Directory that artifact-only builds may write to; by default the current one if --host is this machine's own "
        "address, else none.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "allow_local_models", True, "Let requests name a model by a path on this machine.", flag_values=values
    )
    flags.DEFINE_boolean(
        "allow_object_stores",
        True,
        "Let requests name models and artifacts by gs:// and s3:// URIs, reached with this service's credentials.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "require_api_keys",
        None,
        "Ask for an API key of the task management server; by default unless --host is this machine's own address.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "api_key_file",
        None,
        "File with this service's own API key, for requests that show none; the environment's FEDCOMPUTE_API_KEY by "
        "default.",
        flag_values=values,
    )
    flags.DEFINE_integer("build_timeout", 540, "Seconds that one build may take.", 1, flag_values=values)
    flags.DEFINE_integer("build_memory", 8192, "MiB of data that the build process may hold.", 1, flag_values=values)
    flags.DEFINE_enum(
        "executor",
        "processes",
        ["processes", "ray"],
        "Where builds run: in a process of this machine, one after the other, or on a Ray cluster.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "ray_address",
        None,
        "HOST:PORT of the Ray cluster's head, or auto for the one that this machine is part of; its nodes see the "
        "models that requests name by a path. By default a Ray of this machine alone.",
        flag_values=values,
    )
    flags.DEFINE_integer("builds", 1, "Builds at a time on a Ray cluster; 0: one for each CPU.", 0, flag_values=values)
    define_tracing(values)
    for name in _SKIP_FLAGS:
        flags.DEFINE_boolean(f"allow_{name}", True, f"Let requests set {name}.", flag_values=values)


def _serve(values: flags.FlagValues) -> int:
    import uvicorn

    from fedcompute.builder.service import ServiceSettings, create_service

    # Read by TensorFlow when the build process loads it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    tasks_url = (
        values["task_management_server"].value
        or os.environ.get("TASK_MANAGEMENT_SERVER_URL")
        or DEFAULT_TASK_MANAGEMENT_URL
    )
    if not tasks_url.startswith(("http://", "https://")):
        raise OperationFailed(
            Reason.URL_NOT_ALLOWED, f"{tasks_url!r} is no server URL", remedy="write it as http://host:port"
        )
    root = values["storage_root"].value
    is_local = values["host"].value in _LOCAL_HOSTS
    required, key_file = values["require_api_keys"].value, values["api_key_file"].value
    settings = ServiceSettings(
        task_management_url=tasks_url,
        default_population=values["total_population"].value,
        # Who reaches this machine's own address may write here anyway; who comes over a network may not.
        storage_root=Path(root).absolute() if root else (Path.cwd() if is_local else None),
        allow_local_models=values["allow_local_models"].value,
        allow_object_stores=values["allow_object_stores"].value,
        hosts=frozenset(_LOCAL_HOSTS) if is_local else frozenset(),
        require_api_keys=not is_local if required is None else required,
        api_key=api_key(Path(key_file) if key_file else None) or "",
        build_timeout=values["build_timeout"].value,
        build_memory=values["build_memory"].value << 20,
        forbidden_flags=frozenset(name for name in _SKIP_FLAGS if not values[f"allow_{name}"].value),
        op_table=_read_ops(values["support_ops"].value),
    )
    from fedcompute.monitoring.tracing import TASK_BUILDER, traced

    listener = listen(values["host"].value, values["port"].value)
    host, port = listener.getsockname()[:2]
    executor = _executor(values)
    config = uvicorn.Config(
        create_service(settings, None if executor is None else executor.submit),
        http="h11",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
    )
    with traced(tracing_url(values), TASK_BUILDER), nullcontext() if executor is None else closing(executor):
        serve(
            uvicorn.Server(config),
            [listener],
            f"task builder listening on http://{host}:{port}\n  tasks go to     {tasks_url}\n  stop with       Ctrl-C",
        )
    return 0


def _executor(values: flags.FlagValues) -> "Executor | None":
    kind, address = values["executor"].value, values["ray_address"].value
    if kind == "processes" and address is None:
        return None
    from fedcompute.server.executors import open_executor

    return open_executor(kind, address, values["builds"].value)


def _read_ops(path: str | None) -> str | None:
    if path is None:
        return None
    with Path(path).open("rb") as file:
        data = file.read(_OPS_TABLE_LIMIT + 1)
    if len(data) > _OPS_TABLE_LIMIT:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"--support_ops: {path} has over {_OPS_TABLE_LIMIT} bytes",
            remedy="give the op table",
        )
    return data.decode(errors="replace")
