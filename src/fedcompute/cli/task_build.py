"""`fedcompute task build`: a task group built in a process of its own, then registered with the server."""

import json
import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcompute.builder.lower_ops import LowerOps
from fedcompute.cli import options
from fedcompute.cli.connection import api_key
from fedcompute.errors import ArtifactInvalid, BuildFailed, ConfigInvalid, FedComputeError, Reason
from fedcompute.models.quiet import quiet_tensorflow
from fedcompute.tracing import span

_ZIP = ".zip"


@dataclass(frozen=True)
class _Job:
    model: Path
    config: bytes  # serialized TaskConfig
    flags: bytes  # serialized ExperimentFlags
    lower_ops: LowerOps


@dataclass(frozen=True)
class _Refused:
    """A typed error on its way between processes."""

    reason: Reason
    detail: str
    remedy: str


def build(
    model: Annotated[Path, typer.Option(help="SavedModel directory of a functional model, or a zip archive of one.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Task configuration: text format or JSON, whatever its name. Unset: the one in the model's archive."
        ),
    ] = None,
    server: options.Server = options.DEFAULT_SERVER,
    api_key_file: options.ApiKeyFile = None,
    population: Annotated[str, typer.Option(help="Use this population instead of the configuration's.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build and report; create no task.")] = False,
    skip_dp_check: Annotated[
        bool, typer.Option("--skip-dp-check", help="Accept an epsilon above the target; it is reported all the same.")
    ] = False,
    skip_dp_aggregator: Annotated[
        bool, typer.Option("--skip-dp-aggregator", help="No clipping and no noise: no privacy promise at all.")
    ] = False,
    skip_flex_ops_check: Annotated[
        bool, typer.Option("--skip-flex-ops-check", help="Accept operations that phones may lack.")
    ] = False,
    lower_ops: Annotated[
        LowerOps, typer.Option(help="Rewrite operations that phones lack: auto, where the check would fail otherwise.")
    ] = LowerOps.AUTO,
    as_json: options.AsJson = False,
) -> None:
    """Build the tasks that a configuration asks for and register them; devices get them once they are open."""
    from google.protobuf.json_format import MessageToDict

    from fedcompute.builder.client import load_config
    from fedcompute.builder.task_management import link_warning, register_group
    from fedcompute.monitoring.tracing import TASK_BUILDER, TRACING_VARIABLE, traced
    from fedcompute.protos import task_builder_pb2

    # Before a build that may take minutes.
    key = None if dry_run else api_key(api_key_file)
    loaded = load_config(str(_config_file(config, model)), population_name=population)
    _check_model(model)
    flags = task_builder_pb2.ExperimentFlags(
        skip_dp_check=skip_dp_check, skip_dp_aggregator=skip_dp_aggregator, skip_flex_ops_check=skip_flex_ops_check
    )
    with (
        traced(os.environ.get(TRACING_VARIABLE) or None, TASK_BUILDER),
        span("build", {"population": loaded.config.population_name}),
    ):
        with _status("building plans and checkpoints ...", quiet=as_json):
            group = _built(_Job(model, loaded.config.SerializeToString(), flags.SerializeToString(), lower_ops))
        tasks = [built.task for built in (group.training, group.evaluation) if built is not None]
        warnings = [*loaded.warnings, *group.report.warnings]
        if not dry_run:
            with _status(f"registering with {server} ...", quiet=as_json):
                created = register_group(server, group, api_key=key or "")
            tasks = [getattr(created, kind) for kind in ("training_task", "eval_task") if created.HasField(kind)]
            warnings += [text for text in [link_warning(created)] if text]
    group.report.ClearField("warnings")
    if as_json:
        report = MessageToDict(group.report, preserving_proto_field_name=True)
        typer.echo(json.dumps({"tasks": [_listed(task) for task in tasks], "report": report, "warnings": warnings}))
        return
    _print(tasks, group.report, warnings, server, dry_run=dry_run)


def _config_file(config: Path | None, model: Path) -> Path:
    if config is None and model.suffix.lower() != _ZIP:
        raise ConfigInvalid(
            Reason.CONFIG_UNREADABLE,
            "no task configuration is given",
            remedy="name it with --config, or put it into a zip archive beside the model",
        )
    return config or model


def _check_model(model: Path) -> None:
    if not model.exists():
        raise ArtifactInvalid(Reason.SAVED_MODEL_INVALID, f"there is no saved model at {model}")
    if model.is_file() and model.suffix.lower() != _ZIP:
        raise ArtifactInvalid(
            Reason.SAVED_MODEL_INVALID, f"{model} is neither a SavedModel directory nor a zip archive"
        )


def _built(job: _Job) -> Any:
    from fedcompute.server.executors import ProcessExecutor

    workshop = ProcessExecutor(1)
    try:
        future = workshop.submit(_build_job, job)
        while True:
            # In short waits, so that Ctrl-C is seen at once.
            try:
                outcome = future.result(timeout=0.2)
                break
            except TimeoutError:
                if future.done():
                    raise
    finally:
        workshop.close()
    if isinstance(outcome, _Refused):
        raise BuildFailed(outcome.reason, outcome.detail, remedy=outcome.remedy)
    return outcome


def _build_job(job: _Job) -> Any:
    with quiet_tensorflow():
        try:
            return _build_group(job)
        except FedComputeError as error:
            return _Refused(error.reason, error.detail, error.remedy)


def _build_group(job: _Job) -> Any:
    from fedcompute.builder.archive import MAX_ARCHIVE_BYTES, unpack
    from fedcompute.builder.build import build_task_group
    from fedcompute.protos import task_builder_pb2

    config = task_builder_pb2.TaskConfig.FromString(job.config)
    flags = task_builder_pb2.ExperimentFlags.FromString(job.flags)
    if not job.model.is_file():
        return build_task_group(job.model, config, flags, lower_ops=job.lower_ops)
    with tempfile.TemporaryDirectory(prefix="fedcompute-build-") as scratch, job.model.open("rb") as archive:
        return build_task_group(
            unpack(archive.read(MAX_ARCHIVE_BYTES + 1), Path(scratch)), config, flags, lower_ops=job.lower_ops
        )


def _status(text: str, *, quiet: bool) -> Any:
    if quiet:
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


def _listed(task: Any) -> dict[str, Any]:
    # Not the whole message: its URLs are signed, and whoever has one may write the artifact.
    return {
        "population": task.population_name,
        "task_id": task.task_id,
        "kind": "EVALUATION" if task.info.HasField("evaluation_info") else "TRAINING",
        "rounds": task.total_iteration,
        "report_goal": task.min_aggregation_size,
        "min_client_version": task.min_client_version,
    }


def _print(tasks: list[Any], report: Any, warnings: list[str], server: str, *, dry_run: bool) -> None:
    from google.protobuf import text_format

    for task in map(_listed, tasks):
        name = "would be created" if dry_run else f"task {task['task_id']}"
        typer.echo(
            f"{task['kind'].lower():<11} {name}: population {task['population']}, {task['rounds']} rounds of "
            f"{task['report_goal']} devices, client version {task['min_client_version']} or later"
        )
    typer.echo(text_format.MessageToString(report).rstrip())
    for warning in warnings:
        typer.echo(f"note: {warning}")
    if tasks and not dry_run:
        typer.echo(f"watch with: fedcompute task watch --server {server} --population {tasks[0].population_name}")
