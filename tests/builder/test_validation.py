import math

import pytest
from google.protobuf import text_format

from fedcompute.builder.validation import validate
from fedcompute.errors import ConfigInvalid, Reason
from fedcompute.protos import task_builder_pb2

NO_FLAGS = task_builder_pb2.ExperimentFlags()
GOAL = "report_goal is required and must be set to an integer strictly greater than zero."
POPULATION = "population_name is required and must be set to an non-empty string."
EPSILON = "dp_target_epsilon must be a float number between 0 and 10.000000"
DELTA = "dp_delta must be a float number between 0 and 1.000000E-06"
SOURCE = "source_training_task_id is required and must be a positive number."
INIT_CLIP = (
    "init_clip_norm must be a positive float or be left empty when using ADAPTIVE_GAUSSIAN or ADAPTIVE_TREE "
    "DP Aggregator."
)
SELECTOR = "checkpoint_selector must be in the format of every_k_round or every_k_hour, where k is a positive integer."
CLIP = "clip_norm is required and must be a positive float when using FIXED_GAUSSIAN or TREE_AGGREGATION DP Aggregator."


def with_changes(config, changes: str):
    """The configuration with the fields of a text-format fragment put over it."""
    fragment = text_format.Parse(changes, task_builder_pb2.TaskConfig())
    changed = task_builder_pb2.TaskConfig()
    changed.CopyFrom(config)
    changed.MergeFrom(fragment)
    return changed


def nonnegative(key: str) -> str:
    return f"{key} must be a nonnegative number."


def probability(key: str) -> str:
    return f"{key} must be a probability."


# Where each block stands in the configuration.
BLOCKS = {
    "min_separation_policy": "policies {{ min_separation_policy {{ {} }} }}",
    "data_availability_policy": "policies {{ data_availability_policy {{ {} }} }}",
    "model_release_policy": "policies {{ model_release_policy {{ {} }} }}",
    "dataset_policy": "policies {{ dataset_policy {{ {} }} }}",
    "learning_process": "federated_learning {{ learning_process {{ {} }} }}",
    "runtime_config": "federated_learning {{ learning_process {{ runtime_config {{ {} }} }} }}",
    "evaluation": "federated_learning {{ evaluation {{ {} }} }}",
    "differential_privacy": "differential_privacy {{ {} }}",
}
RELEASE, PROCESS, RUNTIME = (BLOCKS[name] for name in ("model_release_policy", "learning_process", "runtime_config"))
EVALUATION, DP = BLOCKS["evaluation"], BLOCKS["differential_privacy"]

BROKEN = [
    ("min_separation_policy", "minimum_separation: -1", "-1", nonnegative),
    ("data_availability_policy", "min_example_count: -1", "-1", nonnegative),
    ("model_release_policy", "dp_target_epsilon: 10.1", "10.1", EPSILON),
    ("model_release_policy", "dp_target_epsilon: -0.1", "-0.1", EPSILON),
    ("model_release_policy", "dp_delta: 1.1e-6", "1.1e-06", DELTA),
    ("model_release_policy", "num_max_training_rounds: -1", "-1", nonnegative),
    ("dataset_policy", "batch_size: -1", "-1", nonnegative),
    ("learning_process", "client_learning_rate: 1.1", "1.1", probability),
    ("learning_process", "server_learning_rate: -0.1", "-0.1", probability),
    ("runtime_config", "report_goal: -1", "-1", GOAL),
    ("runtime_config", "over_selection_rate: -0.1", "-0.1", nonnegative),
    ("evaluation", "report_goal: -1", "-1", GOAL),
    ("evaluation", "over_selection_rate: -0.1", "-0.1", nonnegative),
    ("evaluation", 'checkpoint_selector: "every_0_round"', "every_0_round", SELECTOR),
    ("evaluation", 'checkpoint_selector: "every_2_rounds"', "every_2_rounds", SELECTOR),
    ("evaluation", "evaluation_traffic: 1.1", "1.1", probability),
    ("evaluation", "source_training_task_id: -1", "-1", SOURCE),
    ("differential_privacy", "noise_multiplier: -0.1", "-0.1", nonnegative),
    ("differential_privacy", "clip_norm: -1", "-1.0", CLIP),
    ("differential_privacy", "clip_norm: -1 type: TREE_AGGREGATION", "-1.0", CLIP),
    ("differential_privacy", "init_clip_norm: -1 type: ADAPTIVE_GAUSSIAN", "-1.0", INIT_CLIP),
]


@pytest.mark.parametrize(("entity", "change", "value", "detail"), BROKEN)
def test_a_broken_rule_fails_alone_with_its_literal_message(config, entity, change, value, detail):
    key = change.split(":")[0]
    text = detail if isinstance(detail, str) else detail(key)
    with pytest.raises(ConfigInvalid) as caught:
        validate(with_changes(config, BLOCKS[entity].format(change)), NO_FLAGS)
    assert caught.value.reason == Reason.CONFIG_INVALID
    assert caught.value.detail == (
        f"[Invalid task config]: key `{key}` has a bad value: `{value}` in `{entity}`. {text}"
    )


@pytest.mark.parametrize(
    "changes",
    [
        "policies { min_separation_policy { minimum_separation: 0 } dataset_policy { batch_size: 1 } }",
        RELEASE.format("dp_target_epsilon: 10 dp_delta: 1e-6 num_max_training_rounds: 1"),
        PROCESS.format("client_learning_rate: 1 server_learning_rate: 1"),
        RUNTIME.format("report_goal: 1000000"),
        EVALUATION.format('report_goal: 1 evaluation_traffic: 1 checkpoint_selector: "every_1_round"'),
        DP.format("noise_multiplier: 1e-3 clip_norm: 1e-6"),
        DP.format("type: ADAPTIVE_TREE clip_norm: -1"),
    ],
)
def test_values_at_their_limits_pass(config, changes):
    validate(with_changes(config, changes), NO_FLAGS)


@pytest.mark.parametrize(
    "changes",
    [
        RELEASE.format("dp_target_epsilon: nan"),
        RELEASE.format("dp_delta: nan"),
        PROCESS.format("client_learning_rate: nan"),
        PROCESS.format("server_learning_rate: nan"),
        RUNTIME.format("over_selection_rate: nan"),
        RUNTIME.format("over_selection_rate: inf"),
        EVALUATION.format("over_selection_rate: 1e300"),
        EVALUATION.format("evaluation_traffic: nan"),
        DP.format("noise_multiplier: nan"),
        DP.format("clip_norm: nan"),
        DP.format("clip_norm: inf"),
        DP.format("type: ADAPTIVE_TREE init_clip_norm: nan"),
    ],
)
def test_no_rule_lets_a_number_through_that_is_none(config, changes):
    with pytest.raises(ConfigInvalid, match="Invalid task config"):
        validate(with_changes(config, changes), NO_FLAGS)


def test_every_problem_is_listed_in_the_order_of_the_rules(config):
    config.population_name = ""
    config.differential_privacy.clip_norm = 0
    config.federated_learning.evaluation.report_goal = 0
    with pytest.raises(ConfigInvalid) as caught:
        validate(config, NO_FLAGS)
    first, second, third = caught.value.detail.split("\n")
    assert first.endswith(POPULATION)
    assert second.endswith(GOAL)
    assert third.endswith(CLIP)


@pytest.mark.parametrize("name", ["a/b", " a", "a ", "a" * 65, "a\nb"])
def test_a_population_name_that_no_storage_key_can_hold_is_refused(config, name):
    config.population_name = name
    with pytest.raises(ConfigInvalid, match="population_name"):
        validate(config, NO_FLAGS)


def test_evaluation_rules_are_skipped_when_only_training(config):
    config.mode = task_builder_pb2.TaskMode.TRAINING_ONLY
    config.federated_learning.ClearField("evaluation")
    assert validate(config, NO_FLAGS).evaluation is None
    config.mode = task_builder_pb2.TaskMode.TRAINING_AND_EVAL
    with pytest.raises(ConfigInvalid, match="`evaluation`"):
        validate(config, NO_FLAGS)


def test_evaluation_alone_still_needs_the_training_report_goal(config):
    config.mode = task_builder_pb2.TaskMode.EVAL_ONLY
    config.federated_learning.ClearField("learning_process")
    with pytest.raises(ConfigInvalid, match="key `report_goal` has a bad value: `0` in `runtime_config`"):
        validate(config, NO_FLAGS)


def test_an_unset_mode_follows_the_evaluation_block_and_says_so(config):
    config.mode = task_builder_pb2.TaskMode.UNKNOWN
    settings = validate(config, NO_FLAGS)
    assert settings.mode == task_builder_pb2.TaskMode.TRAINING_AND_EVAL
    assert "TRAINING_AND_EVAL" in settings.warnings[0]
    config.federated_learning.ClearField("evaluation")
    assert validate(config, NO_FLAGS).mode == task_builder_pb2.TaskMode.TRAINING_ONLY


def test_the_bound_of_delta_is_one_over_the_estimated_population(config):
    config.differential_privacy.estimated_population = 3_000_000
    with pytest.raises(ConfigInvalid, match=r"between 0 and 3\.333333E-07"):
        validate(config, NO_FLAGS)
    settings = validate(config, task_builder_pb2.ExperimentFlags(skip_dp_check=True))
    assert "dp_delta" in settings.warnings[0]


def test_a_report_goal_above_the_population_is_refused(config):
    config.differential_privacy.estimated_population = 49
    config.policies.model_release_policy.dp_delta = 0
    with pytest.raises(ConfigInvalid, match=r"`report_goal` has a bad value: `50`.*49 devices"):
        validate(config, NO_FLAGS)


def test_zero_rounds_pass_only_for_an_evaluation_with_given_noise(config):
    config.policies.model_release_policy.num_max_training_rounds = 0
    with pytest.raises(ConfigInvalid, match="num_max_training_rounds is required"):
        validate(config, NO_FLAGS)
    config.mode = task_builder_pb2.TaskMode.EVAL_ONLY
    validate(config, NO_FLAGS)
    config.differential_privacy.noise_multiplier = 0
    with pytest.raises(ConfigInvalid, match="num_max_training_rounds is required"):
        validate(config, NO_FLAGS)


def test_unset_values_take_their_documented_defaults():
    config = text_format.Parse(
        'population_name: "p" mode: TRAINING_AND_EVAL policies { model_release_policy { num_max_training_rounds: 1 } }'
        "federated_learning { learning_process { runtime_config { report_goal: 1 } }"
        " evaluation { report_goal: 1 source_training_task_id: 7 } } differential_privacy { clip_norm: 1 }",
        task_builder_pb2.TaskConfig(),
    )
    settings = validate(config, NO_FLAGS)
    assert (settings.algorithm, settings.client_optimizer, settings.server_optimizer) == (1, 1, 1)
    assert (settings.client_learning_rate, settings.server_learning_rate) == (0.1, 1.0)
    assert (settings.batch_size, settings.max_batches, settings.over_selection_rate) == (3, -1, 0.3)
    assert settings.config.differential_privacy.estimated_population == 1_000_000
    evaluation = settings.evaluation
    assert (evaluation.source_population, evaluation.selector, evaluation.traffic) == ("p", (1, "round"), 0.0)
    assert math.isclose(evaluation.over_selection_rate, 0.3)


def test_a_metric_named_twice_is_kept_once_with_a_warning(config):
    config.federated_learning.learning_process.metrics.add(name="sparse_categorical_accuracy")
    settings = validate(config, NO_FLAGS)
    assert settings.metrics == ("sparse_categorical_accuracy",)
    assert "more than once" in settings.warnings[0]
