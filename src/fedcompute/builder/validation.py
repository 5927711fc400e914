"""From a configuration to the settings of a build: every rule checked, every default filled in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from fedcompute.builder.privacy_rules import PRIVACY_RULES, privacy_warnings
from fedcompute.builder.problem import ConfigProblems, Problem
from fedcompute.builder.rules import DEFAULT_OVER_SELECTION_RATE, RULES, problem, selector_parts
from fedcompute.errors import Reason
from fedcompute.protos import task_builder_pb2

DEFAULT_POPULATION = 1_000_000
DEFAULT_CLIENT_LEARNING_RATE = 0.1
DEFAULT_SERVER_LEARNING_RATE = 1.0
DEFAULT_BATCH_SIZE = 3
DEFAULT_CHECKPOINT_SELECTOR = "every_1_round"

T = TypeVar("T")

_Config = task_builder_pb2.TaskConfig
_Mode = task_builder_pb2.TaskMode


@dataclass(frozen=True)
class EvaluationSettings:
    """The evaluation block with its defaults filled in."""

    source_population: str
    source_task_id: int
    selector: tuple[int, str]  # one checkpoint of every k "round"s or "hour"s
    traffic: float  # share of devices, 0 to 1
    report_goal: int
    over_selection_rate: float
    example_selector_uri: str


@dataclass(frozen=True)
class BuildSettings:
    """A valid configuration with its defaults filled in; `warnings` are lines for the task report."""

    config: task_builder_pb2.TaskConfig
    mode: int
    population: str
    algorithm: task_builder_pb2.LearningAlgo.Enum
    client_optimizer: task_builder_pb2.Optimizer.Enum
    client_learning_rate: float
    server_optimizer: task_builder_pb2.Optimizer.Enum
    server_learning_rate: float
    batch_size: int
    max_batches: int  # -1: all
    rounds: int
    report_goal: int
    over_selection_rate: float
    example_selector_uri: str
    metrics: tuple[str, ...]  # as configured, duplicates dropped, not yet compared with the allow-list
    evaluation: EvaluationSettings | None  # None in mode TRAINING_ONLY
    warnings: tuple[str, ...]

    @property
    def trains(self) -> bool:
        return self.mode != _Mode.EVAL_ONLY


def validate(
    config: task_builder_pb2.TaskConfig,
    flags: task_builder_pb2.ExperimentFlags,
    *,
    default_population: int = DEFAULT_POPULATION,
) -> BuildSettings:
    """Checks every rule of the table and fills in defaults.

    Raises ConfigProblems (a ConfigInvalid, CONFIG_INVALID) with every broken rule, in the order of the table: its
    published line, then its field's path and the remedy. A `dp_delta` over its bound is a warning when `skip_dp_check`
    is set and it is below 1 (spec/task-builder.md D1).
    """
    config, warnings = _with_mode_and_population(config, default_population)
    broken = [
        found
        for rule in (*RULES, *PRIVACY_RULES)
        if not (rule.evaluation_only and config.mode == _Mode.TRAINING_ONLY)
        and (found := rule.problem(config)) is not None
    ]
    problems = [found for found in broken if not _tolerated(found, config, flags)]
    if problems:
        raise ConfigProblems(Reason.CONFIG_INVALID, problems)
    warnings += [found.message for found in broken]
    return _settings(config, [*warnings, *privacy_warnings(config)])


def _tolerated(found: Problem, config: task_builder_pb2.TaskConfig, flags: task_builder_pb2.ExperimentFlags) -> bool:
    delta = config.policies.model_release_policy.dp_delta
    return flags.skip_dp_check and found.path.endswith(".dp_delta") and 0 <= delta < 1


def supported(table: Mapping[int, T], enum: EnumTypeWrapper, value: int, key: str, entity: str) -> T:
    """The entry of a registry for a configured value; ConfigProblems naming the field where there is none."""
    if value in table:
        return table[value]
    name = enum.Name(value) if value in enum.values() else str(value)
    offered = " or ".join(enum.Name(number) for number in table)
    detail = f"{key} {name} is not supported by this task builder; use {offered}."
    raise ConfigProblems(Reason.CONFIG_INVALID, [problem(key, name, entity, detail, f"use {offered}")])


def _with_mode_and_population(
    config: task_builder_pb2.TaskConfig, default_population: int
) -> tuple[task_builder_pb2.TaskConfig, list[str]]:
    effective = _Config()
    effective.CopyFrom(config)
    warnings = []
    if effective.differential_privacy.estimated_population == 0:
        effective.differential_privacy.estimated_population = default_population
    if effective.mode == _Mode.UNKNOWN:
        evaluated = effective.federated_learning.HasField("evaluation")
        effective.mode = _Mode.TRAINING_AND_EVAL if evaluated else _Mode.TRAINING_ONLY
        warnings.append(f"mode is not set; read as {_Mode.Enum.Name(effective.mode)}")
    return effective, warnings


def _settings(config: task_builder_pb2.TaskConfig, warnings: Sequence[str]) -> BuildSettings:
    process = config.federated_learning.learning_process
    max_batches = config.policies.dataset_policy.max_training_batches_per_client
    names = [metric.name for metric in process.metrics]
    repeated = [f"metric {name!r} is named more than once" for name in dict.fromkeys(names) if names.count(name) > 1]
    return BuildSettings(
        config=config,
        mode=config.mode,
        population=config.population_name,
        algorithm=process.type or task_builder_pb2.LearningAlgo.FED_AVG,
        client_optimizer=process.client_optimizer or task_builder_pb2.Optimizer.SGD,
        client_learning_rate=process.client_learning_rate or DEFAULT_CLIENT_LEARNING_RATE,
        server_optimizer=process.server_optimizer or task_builder_pb2.Optimizer.SGD,
        server_learning_rate=process.server_learning_rate or DEFAULT_SERVER_LEARNING_RATE,
        batch_size=config.policies.dataset_policy.batch_size or DEFAULT_BATCH_SIZE,
        max_batches=max_batches if max_batches > 0 else -1,
        rounds=config.policies.model_release_policy.num_max_training_rounds,
        report_goal=process.runtime_config.report_goal,
        over_selection_rate=process.runtime_config.over_selection_rate or DEFAULT_OVER_SELECTION_RATE,
        example_selector_uri=process.runtime_config.example_selector_uri,
        metrics=tuple(dict.fromkeys(names)),
        evaluation=_evaluation(config) if config.mode != _Mode.TRAINING_ONLY else None,
        warnings=(*warnings, *repeated),
    )


def _evaluation(config: task_builder_pb2.TaskConfig) -> EvaluationSettings:
    evaluation = config.federated_learning.evaluation
    selector = selector_parts(evaluation.checkpoint_selector or DEFAULT_CHECKPOINT_SELECTOR)
    assert selector is not None, "the rules admit no other selector"
    return EvaluationSettings(
        source_population=evaluation.source_training_population or config.population_name,
        source_task_id=evaluation.source_training_task_id,
        selector=selector,
        traffic=evaluation.evaluation_traffic,
        report_goal=evaluation.report_goal,
        over_selection_rate=evaluation.over_selection_rate or DEFAULT_OVER_SELECTION_RATE,
        example_selector_uri=evaluation.example_selector_uri,
    )
