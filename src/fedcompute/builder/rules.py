"""The rules of a task configuration, as a table (spec/task-builder.md 2.1, 2.4, 3.5)."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from fedcompute.protos import task_builder_pb2

Config = task_builder_pb2.TaskConfig
Value = float | str

MAX_TARGET_EPSILON = 10.0
MAX_POPULATION_NAME = 64
DEFAULT_OVER_SELECTION_RATE = 0.3
_MAX_INT64 = 2**63 - 1

_Mode = task_builder_pb2.TaskMode
_Dp = task_builder_pb2.DpAggregator
_FIXED_TYPES = (_Dp.UNKNOWN, _Dp.FIXED_GAUSSIAN, _Dp.TREE_AGGREGATION)
_ADAPTIVE_TYPES = (_Dp.ADAPTIVE_GAUSSIAN, _Dp.ADAPTIVE_TREE)
_SELECTOR = re.compile(r"every_([1-9][0-9]{0,8})_(round|hour)", re.ASCII)


@dataclass(frozen=True)
class Rule:
    """One row: where the value stands, what it must satisfy, what is said when it does not.

    `holds` and `detail` see the configuration with mode and estimated population already filled in.
    """

    key: str
    entity: str
    value: Callable[[Config], Value]
    holds: Callable[[Config], bool]
    detail: Callable[[Config], str]
    evaluation_only: bool = False


def problem(key: str, value: object, entity: str, detail: str) -> str:
    """One validation message in the frame that users and their scripts know."""
    return f"[Invalid task config]: key `{key}` has a bad value: `{value}` in `{entity}`. {detail}"


def selector_parts(text: str) -> tuple[int, str] | None:
    """(k, "round" or "hour") of `every_<k>_round` or `every_<k>_hour`, k from 1; None for anything else."""
    found = _SELECTOR.fullmatch(text)
    return (int(found[1]), found[2]) if found else None


def aggregation_size(report_goal: int, over_selection_rate: float) -> int:
    """Devices that may be assigned to a round of `report_goal`; an unset rate is the default."""
    return int(report_goal * (1.0 + (over_selection_rate or DEFAULT_OVER_SELECTION_RATE)))


def _is_at_least_zero(value: float) -> bool:
    return 0 <= value < math.inf


# One function per block of the configuration: a rule is read more easily than a path of names.
def _separation(config: Config) -> int:
    return config.policies.min_separation_policy.minimum_separation


def _examples(config: Config) -> int:
    return config.policies.data_availability_policy.min_example_count


def _release(config: Config) -> task_builder_pb2.ModelReleaseManagementPolicy:
    return config.policies.model_release_policy


def _dataset(config: Config) -> task_builder_pb2.DatasetPolicy:
    return config.policies.dataset_policy


def _process(config: Config) -> task_builder_pb2.LearningProcess:
    return config.federated_learning.learning_process


def _runtime(config: Config) -> task_builder_pb2.RuntimeConfig:
    return _process(config).runtime_config


def _evaluation(config: Config) -> task_builder_pb2.Evaluation:
    return config.federated_learning.evaluation


def _dp(config: Config) -> task_builder_pb2.DifferentialPrivacy:
    return config.differential_privacy


def _population(config: Config) -> str:
    name = config.population_name
    if not name:
        return "population_name is required and must be set to an non-empty string."
    if len(name) > MAX_POPULATION_NAME:
        return f"population_name must have at most {MAX_POPULATION_NAME} characters."
    if "/" in name or name != name.strip() or not name.isprintable():
        return "population_name must be without slashes, control characters and surrounding blanks."
    return ""


def _rounds(config: Config) -> str:
    rounds = _release(config).num_max_training_rounds
    if rounds < 0:
        return "num_max_training_rounds must be a nonnegative number."
    # Nothing can be calibrated for zero rounds, and a training task without rounds would block its population.
    if rounds == 0 and (config.mode != _Mode.EVAL_ONLY or _dp(config).noise_multiplier == 0):
        return "num_max_training_rounds is required and must be a positive number."
    return ""


def _report_goal(config: Config) -> str:
    goal, devices = _runtime(config).report_goal, _dp(config).estimated_population
    if goal <= 0:
        return _goal_text(config)
    return f"report_goal must be at most the estimated population of {devices} devices." if goal > devices else ""


def _goal_text(config: Config) -> str:
    return "report_goal is required and must be set to an integer strictly greater than zero."


def _fits(goal: int, rate: float) -> bool:
    return _is_at_least_zero(rate) and goal * (1.0 + rate) < _MAX_INT64


def _text(text: str) -> Callable[[Config], str]:
    return lambda config: text


def _nonnegative(key: str, entity: str, value: Callable[[Config], float], evaluation_only: bool = False) -> Rule:
    detail = _text(f"{key} must be a nonnegative number.")
    return Rule(key, entity, value, lambda config: _is_at_least_zero(value(config)), detail, evaluation_only)


def _probability(key: str, entity: str, value: Callable[[Config], float], evaluation_only: bool = False) -> Rule:
    detail = _text(f"{key} must be a probability.")
    return Rule(key, entity, value, lambda config: 0 <= value(config) <= 1, detail, evaluation_only)


def _explained(key: str, entity: str, value: Callable[[Config], Value], broken: Callable[[Config], str]) -> Rule:
    return Rule(key, entity, value, lambda config: not broken(config), broken)


def _over_selection(
    entity: str,
    block: Callable[[Config], task_builder_pb2.RuntimeConfig | task_builder_pb2.Evaluation],
    evaluation: bool,
) -> Rule:
    return Rule(
        "over_selection_rate",
        entity,
        lambda config: block(config).over_selection_rate,
        lambda config: _fits(block(config).report_goal, block(config).over_selection_rate),
        _text("over_selection_rate must be a nonnegative number."),
        evaluation,
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "mode",
        "task_config",
        lambda c: c.mode,
        lambda c: c.mode in _Mode.Enum.values(),
        _text("mode must be TRAINING_ONLY, TRAINING_AND_EVAL or EVAL_ONLY."),
    ),
    _explained("population_name", "task_config", lambda c: c.population_name, _population),
    _nonnegative("minimum_separation", "min_separation_policy", _separation),
    _nonnegative("min_example_count", "data_availability_policy", _examples),
    Rule(
        "dp_target_epsilon",
        "model_release_policy",
        lambda c: _release(c).dp_target_epsilon,
        lambda c: 0 <= _release(c).dp_target_epsilon <= MAX_TARGET_EPSILON,
        _text(f"dp_target_epsilon must be a float number between 0 and {MAX_TARGET_EPSILON:f}"),
    ),
    Rule(
        "dp_delta",
        "model_release_policy",
        lambda c: _release(c).dp_delta,
        lambda c: 0 <= _release(c).dp_delta <= 1 / max(1, _dp(c).estimated_population),
        lambda c: f"dp_delta must be a float number between 0 and {1 / max(1, _dp(c).estimated_population):E}",
    ),
    _explained(
        "num_max_training_rounds",
        "model_release_policy",
        lambda c: _release(c).num_max_training_rounds,
        _rounds,
    ),
    _nonnegative("batch_size", "dataset_policy", lambda c: _dataset(c).batch_size),
    _probability("client_learning_rate", "learning_process", lambda c: _process(c).client_learning_rate),
    _probability("server_learning_rate", "learning_process", lambda c: _process(c).server_learning_rate),
    _explained("report_goal", "runtime_config", lambda c: _runtime(c).report_goal, _report_goal),
    _over_selection("runtime_config", _runtime, evaluation=False),
    Rule(
        "report_goal",
        "evaluation",
        lambda c: _evaluation(c).report_goal,
        lambda c: _evaluation(c).report_goal > 0,
        _goal_text,
        evaluation_only=True,
    ),
    _over_selection("evaluation", _evaluation, evaluation=True),
    Rule(
        "checkpoint_selector",
        "evaluation",
        lambda c: _evaluation(c).checkpoint_selector,
        lambda c: (
            not _evaluation(c).checkpoint_selector or selector_parts(_evaluation(c).checkpoint_selector) is not None
        ),
        _text(
            "checkpoint_selector must be in the format of every_k_round or every_k_hour, where k is a positive integer."
        ),
        evaluation_only=True,
    ),
    _probability("evaluation_traffic", "evaluation", lambda c: _evaluation(c).evaluation_traffic, True),
    Rule(
        "source_training_task_id",
        "evaluation",
        lambda c: _evaluation(c).source_training_task_id,
        lambda c: _evaluation(c).source_training_task_id > 0,
        _text("source_training_task_id is required and must be a positive number."),
        evaluation_only=True,
    ),
    _nonnegative("noise_multiplier", "differential_privacy", lambda c: _dp(c).noise_multiplier),
    Rule(
        "clip_norm",
        "differential_privacy",
        lambda c: _dp(c).clip_norm,
        lambda c: _dp(c).type not in _FIXED_TYPES or 0 < _dp(c).clip_norm < math.inf,
        _text(
            "clip_norm is required and must be a positive float when using FIXED_GAUSSIAN or TREE_AGGREGATION"
            " DP Aggregator."
        ),
    ),
    Rule(
        "init_clip_norm",
        "differential_privacy",
        lambda c: _dp(c).init_clip_norm,
        lambda c: _dp(c).type not in _ADAPTIVE_TYPES or _is_at_least_zero(_dp(c).init_clip_norm),
        _text(
            "init_clip_norm must be a positive float or be left empty when using ADAPTIVE_GAUSSIAN or ADAPTIVE_TREE"
            " DP Aggregator."
        ),
    ),
    Rule(
        "estimated_population",
        "differential_privacy",
        lambda c: _dp(c).estimated_population,
        lambda c: _dp(c).estimated_population > 0,
        _text("estimated_population must be a positive number of devices."),
    ),
)
