"""The rules of a task configuration, as a table (spec/task-builder.md 2.1, 2.4, 3.2, 3.5)."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedcompute.builder.problem import Problem, frame
from fedcompute.protos import task_builder_pb2

Config = task_builder_pb2.TaskConfig
Value = float | str

MAX_TARGET_EPSILON = 10.0
MAX_POPULATION_NAME = 64
DEFAULT_OVER_SELECTION_RATE = 0.3
_MAX_INT64 = 2**63 - 1
# Noise of the count that estimates the clip norm, per device of the report goal.
_COUNT_NOISE_PER_DEVICE = 0.05

_Mode = task_builder_pb2.TaskMode
_Dp = task_builder_pb2.DpAggregator
_FIXED_TYPES = (_Dp.UNKNOWN, _Dp.FIXED_GAUSSIAN, _Dp.TREE_AGGREGATION, _Dp.BANDED_MF)
_ADAPTIVE_TYPES = (_Dp.ADAPTIVE_GAUSSIAN, _Dp.ADAPTIVE_TREE)
_SELECTOR = re.compile(r"every_([1-9][0-9]{0,8})_(round|hour)", re.ASCII)

# Where each block stands, by the name that messages call it.
PATHS: Mapping[str, str] = {
    "task_config": "",
    "min_separation_policy": "policies.min_separation_policy.",
    "data_availability_policy": "policies.data_availability_policy.",
    "model_release_policy": "policies.model_release_policy.",
    "dataset_policy": "policies.dataset_policy.",
    "learning_process": "federated_learning.learning_process.",
    "runtime_config": "federated_learning.learning_process.runtime_config.",
    "evaluation": "federated_learning.evaluation.",
    "differential_privacy": "differential_privacy.",
}


@dataclass(frozen=True)
class Rule:
    """One row: where the value stands, what it must satisfy, what is said when it does not, what to do then.

    `broken` and `remedy` see the configuration with mode and estimated population already filled in; `broken` returns
    the published text, or "" where the rule holds. Every comparison is written so that NaN breaks it.
    """

    key: str
    entity: str
    value: Callable[[Config], Value]
    broken: Callable[[Config], str]
    remedy: Callable[[Config], str]
    evaluation_only: bool = False
    prefix: str = ""  # of the path, where the entity stands in more than one place

    def problem(self, config: Config) -> Problem | None:
        """What the configuration breaks of this rule, or None."""
        detail = self.broken(config)
        if not detail:
            return None
        return problem(
            self.key, self.value(config), self.entity, detail, self.remedy(config), prefix=self.prefix or None
        )


def problem(
    key: str, value: object, entity: str, detail: str, remedy: str = "", *, prefix: str | None = None
) -> Problem:
    """The problem of one field in the published frame; `entity` is a key of PATHS unless `prefix` says the place."""
    path = (PATHS[entity] if prefix is None else prefix) + key
    return Problem(frame(key, value, entity, detail), path, str(value), detail, remedy or "set one of the values named")


def selector_parts(text: str) -> tuple[int, str] | None:
    """(k, "round" or "hour") of `every_<k>_round` or `every_<k>_hour`, k from 1; None for anything else."""
    found = _SELECTOR.fullmatch(text)
    return (int(found[1]), found[2]) if found else None


def aggregation_size(report_goal: int, over_selection_rate: float) -> int:
    """Devices that may be assigned to a round of `report_goal`; an unset rate is the default."""
    return int(report_goal * (1.0 + (over_selection_rate or DEFAULT_OVER_SELECTION_RATE)))


def is_adaptive(dp_type: int) -> bool:
    """Whether a DP type estimates its clip norm from a noised count of devices."""
    return dp_type in _ADAPTIVE_TYPES


def adaptive_noise_problem(noise_multiplier: float, report_goal: int) -> Problem | None:
    """The problem of an adaptive type whose total noise leaves none for the updates, or None.

    The count's noise takes a part of the total; the rest is positive only below twice the count's standard deviation
    (spec/task-builder.md 3.2). Holds for given and for calibrated noise alike.
    """
    bound = 2 * (_COUNT_NOISE_PER_DEVICE * report_goal)
    if noise_multiplier < bound:
        return None
    return problem(
        "noise_multiplier",
        noise_multiplier,
        "differential_privacy",
        f"noise_multiplier must be below {bound:g}, a tenth of the report_goal {report_goal}, "
        "when using ADAPTIVE_GAUSSIAN or ADAPTIVE_TREE DP Aggregator.",
        f"raise report_goal above {10 * noise_multiplier:g} (10 times noise_multiplier), or lower the noise",
    )


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


def _max_delta(config: Config) -> float:
    return 1 / max(1, _dp(config).estimated_population)


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


def _goal(goal: int) -> str:
    if goal > 0:
        return ""
    return "report_goal is required and must be set to an integer strictly greater than zero."


def _report_goal(config: Config) -> str:
    goal, devices = _runtime(config).report_goal, _dp(config).estimated_population
    if 0 < devices < goal:
        return f"report_goal must be at most the estimated population of {devices} devices."
    return _goal(goal)


def _report_goal_remedy(config: Config) -> str:
    if _runtime(config).report_goal <= 0:
        return "set the number of devices whose updates make one round"
    return "lower report_goal, or set differential_privacy.estimated_population to the devices that there are"


def _fits(goal: int, rate: float) -> bool:
    return _is_at_least_zero(rate) and goal * (1.0 + rate) < _MAX_INT64


def _adaptive_noise(config: Config) -> str:
    noise, goal = _dp(config).noise_multiplier, _runtime(config).report_goal
    # Other rules speak of a goal or a noise that is none; noise 0 is calibrated, and looked at afterwards.
    if not is_adaptive(_dp(config).type) or goal <= 0 or not 0 < noise < math.inf:
        return ""
    found = adaptive_noise_problem(noise, goal)
    return found.rule if found else ""


def _adaptive_noise_remedy(config: Config) -> str:
    found = adaptive_noise_problem(_dp(config).noise_multiplier, _runtime(config).report_goal)
    return found.remedy if found else ""


def _clip_norm_detail(config: Config) -> str:
    # The published line names the reference's types alone.
    types = "BANDED_MF" if _dp(config).type == _Dp.BANDED_MF else "FIXED_GAUSSIAN or TREE_AGGREGATION"
    return f"clip_norm is required and must be a positive float when using {types} DP Aggregator."


def _is_placeholder(uri: str) -> bool:
    return "{" in uri or "}" in uri


def _text(text: str) -> Callable[[Config], str]:
    return lambda config: text


def _unless(holds: Callable[[Config], bool], detail: Callable[[Config], str] | str) -> Callable[[Config], str]:
    """The detail where the condition does not hold."""

    def broken(config: Config) -> str:
        if holds(config):
            return ""
        return detail if isinstance(detail, str) else detail(config)

    return broken


def _nonnegative(
    key: str, entity: str, value: Callable[[Config], float], remedy: str, evaluation_only: bool = False
) -> Rule:
    detail = f"{key} must be a nonnegative number."
    broken = _unless(lambda config: _is_at_least_zero(value(config)), detail)
    return Rule(key, entity, value, broken, _text(remedy), evaluation_only)


def _probability(
    key: str, entity: str, value: Callable[[Config], float], remedy: str, evaluation_only: bool = False
) -> Rule:
    detail = f"{key} must be a probability."
    broken = _unless(lambda config: 0 <= value(config) <= 1, detail)
    return Rule(key, entity, value, broken, _text(remedy), evaluation_only)


def _over_selection(
    entity: str,
    block: Callable[[Config], task_builder_pb2.RuntimeConfig | task_builder_pb2.Evaluation],
    evaluation: bool,
) -> Rule:
    return Rule(
        "over_selection_rate",
        entity,
        lambda config: block(config).over_selection_rate,
        _unless(
            lambda config: _fits(block(config).report_goal, block(config).over_selection_rate),
            "over_selection_rate must be a nonnegative number.",
        ),
        _text(f"set the share of spare devices, such as 0.3, or leave it out for {DEFAULT_OVER_SELECTION_RATE}"),
        evaluation,
    )


def _artifact_url(
    key: str, block: str, urls: Callable[[Config], task_builder_pb2.ArtifactBuilding], used: Callable[[Config], bool]
) -> Rule:
    def value(config: Config) -> str:
        return str(getattr(urls(config), key))

    return Rule(
        key,
        "artifact_building",
        value,
        _unless(
            lambda config: not (used(config) and _is_placeholder(value(config))),
            f"{key} must be a URI; what stands in braces is a placeholder.",
        ),
        _text("put the real location in the place of the braces, or leave artifact_building out"),
        prefix=f"{PATHS[block]}artifact_building.",
    )


def _artifact_urls() -> list[Rule]:
    blocks: list[tuple[str, Callable[[Config], task_builder_pb2.ArtifactBuilding], Callable[[Config], bool]]] = [
        ("learning_process", lambda c: _process(c).artifact_building, lambda c: c.mode != _Mode.EVAL_ONLY),
        ("evaluation", lambda c: _evaluation(c).artifact_building, lambda c: c.mode != _Mode.TRAINING_ONLY),
    ]
    keys = ("plan_url", "client_plan_url", "checkpoint_url")
    return [_artifact_url(key, name, urls, used) for name, urls, used in blocks for key in keys]


_LEARNING_RATE = "set a number from 0 to 1, or leave it out for the default"

RULES: tuple[Rule, ...] = (
    Rule(
        "mode",
        "task_config",
        lambda c: c.mode,
        _unless(lambda c: c.mode in _Mode.Enum.values(), "mode must be TRAINING_ONLY, TRAINING_AND_EVAL or EVAL_ONLY."),
        _text("write one of the three names"),
    ),
    Rule(
        "population_name",
        "task_config",
        lambda c: c.population_name,
        _population,
        _text(f"give a name of at most {MAX_POPULATION_NAME} printable characters, the one that devices ask for"),
    ),
    _nonnegative(
        "minimum_separation", "min_separation_policy", _separation, "set 0 or more rounds between two contributions"
    ),
    _nonnegative("min_example_count", "data_availability_policy", _examples, "set 0 or more examples"),
    Rule(
        "dp_target_epsilon",
        "model_release_policy",
        lambda c: _release(c).dp_target_epsilon,
        _unless(
            lambda c: 0 <= _release(c).dp_target_epsilon <= MAX_TARGET_EPSILON,
            f"dp_target_epsilon must be a float number between 0 and {MAX_TARGET_EPSILON:f}",
        ),
        _text(f"lower it, or leave it out for {MAX_TARGET_EPSILON:g}"),
    ),
    Rule(
        "dp_delta",
        "model_release_policy",
        lambda c: _release(c).dp_delta,
        _unless(
            lambda c: 0 <= _release(c).dp_delta <= _max_delta(c),
            lambda c: f"dp_delta must be a float number between 0 and {_max_delta(c):E}",
        ),
        lambda c: (
            "leave it out for 1 over the estimated population, or set differential_privacy.estimated_population "
            f"(now {_dp(c).estimated_population}) to the devices that there are"
        ),
    ),
    Rule(
        "num_max_training_rounds",
        "model_release_policy",
        lambda c: _release(c).num_max_training_rounds,
        _rounds,
        _text("set the rounds after which training ends, 1 or more"),
    ),
    _nonnegative(
        "batch_size", "dataset_policy", lambda c: _dataset(c).batch_size, "set 1 or more examples, or leave it out"
    ),
    _probability(
        "client_learning_rate", "learning_process", lambda c: _process(c).client_learning_rate, _LEARNING_RATE
    ),
    _probability(
        "server_learning_rate", "learning_process", lambda c: _process(c).server_learning_rate, _LEARNING_RATE
    ),
    Rule("report_goal", "runtime_config", lambda c: _runtime(c).report_goal, _report_goal, _report_goal_remedy),
    _over_selection("runtime_config", _runtime, evaluation=False),
    Rule(
        "report_goal",
        "evaluation",
        lambda c: _evaluation(c).report_goal,
        lambda c: _goal(_evaluation(c).report_goal),
        _text("set the number of devices that make one evaluation, or set mode: TRAINING_ONLY"),
        evaluation_only=True,
    ),
    _over_selection("evaluation", _evaluation, evaluation=True),
    Rule(
        "checkpoint_selector",
        "evaluation",
        lambda c: _evaluation(c).checkpoint_selector,
        _unless(
            lambda c: (
                not _evaluation(c).checkpoint_selector or selector_parts(_evaluation(c).checkpoint_selector) is not None
            ),
            "checkpoint_selector must be in the format of every_k_round or every_k_hour, where k is a positive "
            "integer.",
        ),
        _text('write such as "every_1_round" or "every_2_hour", or leave it out for "every_1_round"'),
        evaluation_only=True,
    ),
    _probability(
        "evaluation_traffic",
        "evaluation",
        lambda c: _evaluation(c).evaluation_traffic,
        "set the share of devices that evaluate, from 0 to 1",
        True,
    ),
    Rule(
        "source_training_task_id",
        "evaluation",
        lambda c: _evaluation(c).source_training_task_id,
        _unless(
            lambda c: _evaluation(c).source_training_task_id > 0,
            "source_training_task_id is required and must be a positive number.",
        ),
        _text("set the id of the training task to evaluate; the first task of a population is 1"),
        evaluation_only=True,
    ),
    _nonnegative(
        "noise_multiplier",
        "differential_privacy",
        lambda c: _dp(c).noise_multiplier,
        "set a number above 0, or leave it out to have it calibrated",
    ),
    Rule(
        "clip_norm",
        "differential_privacy",
        lambda c: _dp(c).clip_norm,
        _unless(
            lambda c: (
                not math.isnan(_dp(c).clip_norm)
                and (_dp(c).type not in _FIXED_TYPES or 0 < _dp(c).clip_norm < math.inf)
            ),
            _clip_norm_detail,
        ),
        _text("set the largest L2 norm of one device's update, such as 0.1"),
    ),
    Rule(
        "init_clip_norm",
        "differential_privacy",
        lambda c: _dp(c).init_clip_norm,
        _unless(
            lambda c: (
                not math.isnan(_dp(c).init_clip_norm)
                and (not is_adaptive(_dp(c).type) or _is_at_least_zero(_dp(c).init_clip_norm))
            ),
            "init_clip_norm must be a positive float or be left empty when using ADAPTIVE_GAUSSIAN or ADAPTIVE_TREE"
            " DP Aggregator.",
        ),
        _text("set a positive number, or leave it out for 0.1"),
    ),
    Rule(
        "estimated_population",
        "differential_privacy",
        lambda c: _dp(c).estimated_population,
        _unless(
            lambda c: _dp(c).estimated_population > 0, "estimated_population must be a positive number of devices."
        ),
        _text("set the number of devices that a round may draw from, or leave it out for the builder's default"),
    ),
    Rule(
        "noise_multiplier",
        "differential_privacy",
        lambda c: _dp(c).noise_multiplier,
        _adaptive_noise,
        _adaptive_noise_remedy,
    ),
    *_artifact_urls(),
)
