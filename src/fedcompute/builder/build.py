"""A task group from a saved model and a configuration (spec/task-builder.md 7.4)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fedcompute.builder.artifacts import BuiltGroup, BuiltTask
from fedcompute.builder.client_graph import ClientSettings, client_graph
from fedcompute.builder.device_graph import DeviceGraph, device_graph
from fedcompute.builder.differential_privacy import (
    Accounting,
    dp_notes,
    evaluation_claim,
    log_parameters,
    privacy_claim,
)
from fedcompute.builder.dp_types import DpParameters
from fedcompute.builder.lower_ops import LowerOps
from fedcompute.builder.model_safety import check_saved_model
from fedcompute.builder.op_check import NO_MINIMUM, flex_ops, min_client_version, supported_ops
from fedcompute.builder.plan import build_plan, client_only_plan, example_selector
from fedcompute.builder.preparation import prepare_task
from fedcompute.builder.tasks import correlation_id, evaluation_task, training_task
from fedcompute.builder.validation import DEFAULT_POPULATION, BuildSettings
from fedcompute.errors import BuildFailed, FedComputeError, Reason
from fedcompute.learning.specification import evaluation_process, initial_state, zero_state
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.models.saved_model import load_functional_model
from fedcompute.protos import learning_pb2, plan_pb2, task_builder_pb2, task_pb2
from fedcompute.tensors.checkpoint import write_checkpoint
from fedcompute.tensors.tree import Tensors
from fedcompute.tracing import span

logger = logging.getLogger(__name__)

T = TypeVar("T")


def build_task_group(
    saved_model_dir: Path | str,
    config: task_builder_pb2.TaskConfig,
    flags: task_builder_pb2.ExperimentFlags | None = None,
    *,
    report: task_builder_pb2.TaskReport | None = None,
    default_population: int = DEFAULT_POPULATION,
    op_table: str | None = None,
    lower_ops: LowerOps = LowerOps.AUTO,
) -> BuiltGroup:
    """Builds the tasks that the configuration asks for; nothing is stored or registered.

    `report` is filled as far as the work gets, also when it raises. `op_table` replaces the table of ops that devices
    have (`version,op` lines). `lower_ops`: when to rewrite operations that devices lack; the report's warnings then say
    which, and what it costs. Raises ConfigInvalid (rules, DP check, values this builder does not offer),
    ArtifactInvalid (the model) and BuildFailed (OPS_NOT_SUPPORTED, BUILD_FAILED).
    """
    flags = flags if flags is not None else task_builder_pb2.ExperimentFlags()
    report = report if report is not None else task_builder_pb2.TaskReport()

    def load() -> FunctionalModel:
        check_saved_model(Path(saved_model_dir))
        return load_functional_model(saved_model_dir)

    prepared = prepare_task(load, config, flags, report, default_population=default_population)
    settings, model, process, client = prepared.settings, prepared.model, prepared.process, prepared.client
    versions = None if flags.skip_flex_ops_check else supported_ops(op_table)
    group_id = correlation_id()
    halves = []
    if settings.trains:
        uri = settings.example_selector_uri
        halves.append(_client_half("training", model, process, client, uri, versions, lower_ops))
    if settings.evaluation is not None:
        evaluated, uri = evaluation_process(process, prepared.metrics), settings.evaluation.example_selector_uri
        halves.append(_client_half("evaluation", model, evaluated, client, uri, versions, lower_ops))
    with span("exact_epsilon"):
        dp = _exact(settings, prepared.accounting, report, notes=not flags.skip_dp_aggregator)
    built = {}
    for half in halves:
        report.warnings.extend(half.warnings)
        if not flags.skip_dp_aggregator:
            half.process.privacy_claim.CopyFrom(_claim(settings, half.kind, dp))
        state = (
            initial_state(half.process, model.trainable, model.non_trainable)
            if half.kind == "training"
            else zero_state(half.process)
        )
        row = training_task if half.kind == "training" else evaluation_task
        built[half.kind] = _artifacts(half, state, row(settings, half.min_client_version, group_id))
    return BuiltGroup(built.get("training"), built.get("evaluation"), report)


def _claim(settings: BuildSettings, kind: str, dp: DpParameters) -> learning_pb2.PrivacyClaim:
    if kind == "training" or settings.evaluation is None:
        return privacy_claim(dp)
    return evaluation_claim(dp, settings.evaluation.report_goal)


def _exact(
    settings: BuildSettings, accounting: Accounting, report: task_builder_pb2.TaskReport, *, notes: bool
) -> DpParameters:
    dp = accounting.result()
    log_parameters(dp)
    report.dp_hyperparameters.dp_epsilon = dp.epsilon
    for note in dp_notes(settings, dp) if notes else ():
        logger.warning("%s", note)
        report.warnings.append(note)
    return dp


@dataclass(frozen=True)
class _Half:
    """One task as far as it does not depend on the accounting: the device's graph and what it asks for."""

    kind: str
    process: learning_pb2.LearningProcess
    selector: plan_pb2.ExampleSelector
    flatbuffer: bytes
    min_client_version: str
    warnings: tuple[str, ...]


def _client_half(
    kind: str,
    model: FunctionalModel,
    process: learning_pb2.LearningProcess,
    client: ClientSettings,
    selector_uri: str,
    versions: Mapping[str, int] | None,
    lower_ops: LowerOps,
) -> _Half:
    """The device's graph of one process; `versions` None skips the op check."""
    selector = example_selector(selector_uri)
    settings = replace(client, selector=selector.SerializeToString())
    graph = _step("Cannot build the plan", lambda: _device_graph(kind, model, process, settings, versions, lower_ops))
    with span("op_check", {"kind": kind, "skipped": versions is None}):
        version = NO_MINIMUM if versions is None else min_client_version(flex_ops(graph.flatbuffer), versions)
    if versions is not None:
        logger.info("The task can only run on Android build %s or above", version)
    warnings = (f"{kind}: {graph.lowered}",) if graph.lowered else ()
    return _Half(kind, process, selector, graph.flatbuffer, version, warnings)


def _artifacts(half: _Half, state: Tensors, task: task_pb2.Task) -> BuiltTask:
    """Plan, device plan and checkpoint."""
    with span("plan", {"kind": half.kind}) as traced:
        plan = build_plan(half.process, half.flatbuffer, half.selector)
        logger.info("Plan was built successfully.")
        client_plan = client_only_plan(plan)
        logger.info("ClientOnlyPlan was built successfully.")
        checkpoint = _step("Cannot build the initial checkpoint", lambda: write_checkpoint(state))
        logger.info("Initial checkpoint was built successfully.")
        built = BuiltTask(task, plan.SerializeToString(), client_plan.SerializeToString(), checkpoint)
        traced["bytes"] = len(built.plan) + len(built.client_plan) + len(built.checkpoint)
        return built


def _device_graph(
    kind: str,
    model: FunctionalModel,
    process: learning_pb2.LearningProcess,
    settings: ClientSettings,
    versions: Mapping[str, int] | None,
    lower_ops: LowerOps,
) -> DeviceGraph:
    with span("client_graph", {"kind": kind}):
        graph = client_graph(model, process, settings)
    with span("tflite", {"kind": kind}) as traced:
        found = device_graph(graph, versions, lower_ops)
        traced["bytes"], traced["lowered"] = len(found.flatbuffer), bool(found.lowered)
        return found


def _step(name: str, work: Callable[[], T]) -> T:
    """Runs one step; whatever TensorFlow or the model's own code raises becomes a BuildFailed that names the step."""
    try:
        return work()
    except BuildFailed as error:
        raise BuildFailed(error.reason, f"{name}: {error.detail}", remedy=error.remedy) from error
    except FedComputeError:
        raise
    except Exception as error:
        raise BuildFailed(Reason.BUILD_FAILED, f"{name}: {error}") from error
