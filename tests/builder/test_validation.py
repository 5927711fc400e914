import math

import pytest
from google.protobuf import text_format

from fedcompute.builder.privacy_rules import PRIVACY_RULES
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.rules import PATHS, RULES
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
BANDED_CLIP = "clip_norm is required and must be a positive float when using BANDED_MF DP Aggregator."

ROUNDS = "num_max_training_rounds is required and must be a positive number."
TOO_MANY = "report_goal must be at most the estimated population of 1000000 devices."
POSITIVE = "estimated_population must be a positive number of devices."
SPLIT = (
    "noise_multiplier must be below 5, a tenth of the report_goal 50, "
    "when using ADAPTIVE_GAUSSIAN or ADAPTIVE_TREE DP Aggregator."
)
TOO_LOUD = "noise_multiplier must be at most 262144, the most that the arithmetic of a round holds exactly."
NAN = [("nan", "nan")]
INFINITE = [("inf", "inf")]
BELOW = [("-1e-9", "-1e-09")]
ABOVE_1 = [("1.0000001", "1.0000001")]
NO_CLIP = [("0", "0.0"), ("-1", "-1.0")]
BAD_SELECTORS = [
    (f'"{text}"', text)
    for text in (
        *("every_0_round", "every_1_rounds", "every_-1_hour", "every_1_Round", "every_01_round", "every__round"),
        *("every_1", "every_1_round_", " every_1_round", "every_\u0661_round", "every_1.5_hour", "1"),
    )
]


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


# block, field, values just inside, values just outside as (written, shown), published text
LIMITS = [
    ("min_separation_policy", "minimum_separation", ["0", str(2**63 - 1)], [("-1", "-1")], nonnegative),
    ("data_availability_policy", "min_example_count", ["0", str(2**31 - 1)], [("-1", "-1")], nonnegative),
    ("model_release_policy", "dp_target_epsilon", ["0", "10"], [("10.0000001", "10.0000001"), *BELOW, *NAN], EPSILON),
    ("model_release_policy", "dp_delta", ["0", "1e-6"], [("1.0000001e-6", "1.0000001e-06"), *BELOW, *NAN], DELTA),
    ("model_release_policy", "num_max_training_rounds", ["1"], [("-1", "-1")], nonnegative),
    ("model_release_policy", "num_max_training_rounds", ["1"], [("0", "0")], ROUNDS),
    ("dataset_policy", "batch_size", ["0", "1"], [("-1", "-1")], nonnegative),
    ("dataset_policy", "max_training_batches_per_client", ["-7", "0", "1"], [], nonnegative),
    ("learning_process", "client_learning_rate", ["0", "1"], [*ABOVE_1, *BELOW, *NAN], probability),
    ("learning_process", "server_learning_rate", ["0", "1"], [*ABOVE_1, *BELOW, *NAN], probability),
    ("runtime_config", "report_goal", ["1", "1000000"], [("0", "0"), ("-1", "-1")], GOAL),
    ("runtime_config", "report_goal", ["1000000"], [("1000001", "1000001")], TOO_MANY),
    ("runtime_config", "over_selection_rate", ["0", "5"], [*BELOW, *INFINITE, ("1e300", "1e+300"), *NAN], nonnegative),
    ("evaluation", "report_goal", ["1"], [("0", "0"), ("-1", "-1")], GOAL),
    ("evaluation", "over_selection_rate", ["0", "5"], [*BELOW, *INFINITE, ("1e300", "1e+300"), *NAN], nonnegative),
    ("evaluation", "checkpoint_selector", ['""', '"every_1_round"', '"every_24_hour"'], BAD_SELECTORS, SELECTOR),
    ("evaluation", "evaluation_traffic", ["0", "1"], [*ABOVE_1, *BELOW, *NAN], probability),
    ("evaluation", "source_training_task_id", ["1"], [("0", "0"), ("-1", "-1")], SOURCE),
    ("differential_privacy", "noise_multiplier", ["0", "1e-9", "262144"], [*BELOW, *INFINITE, *NAN], nonnegative),
    ("differential_privacy", "noise_multiplier", ["262144"], [("262144.01", "262144.01")], TOO_LOUD),
    ("differential_privacy", "type: FIXED_GAUSSIAN clip_norm", ["1e-9"], [*NO_CLIP, *INFINITE, *NAN], CLIP),
    ("differential_privacy", "type: TREE_AGGREGATION clip_norm", ["1e-9"], [*NO_CLIP, *NAN], CLIP),
    ("differential_privacy", "type: BANDED_MF clip_norm", ["1e-9"], [*NO_CLIP, *INFINITE, *NAN], BANDED_CLIP),
    ("differential_privacy", "type: UNKNOWN clip_norm", ["1e-9"], [*NO_CLIP, *NAN], CLIP),
    ("differential_privacy", "type: ADAPTIVE_TREE clip_norm", ["0", "-1"], NAN, CLIP),
    ("differential_privacy", "type: ADAPTIVE_GAUSSIAN init_clip_norm", ["0"], [*BELOW, *INFINITE, *NAN], INIT_CLIP),
    ("differential_privacy", "type: ADAPTIVE_TREE init_clip_norm", ["0", "1e-9"], [*BELOW, *NAN], INIT_CLIP),
    ("differential_privacy", "type: FIXED_GAUSSIAN init_clip_norm", ["-1"], NAN, INIT_CLIP),
    ("differential_privacy", "estimated_population", ["0", "50", "1000000"], [("-1", "-1")], POSITIVE),
    (
        "differential_privacy",
        "type: ADAPTIVE_GAUSSIAN noise_multiplier",
        ["4.999"],
        [("5", "5.0"), ("7", "7.0")],
        SPLIT,
    ),
    ("differential_privacy", "type: ADAPTIVE_TREE noise_multiplier", ["4.999"], [("5", "5.0")], SPLIT),
    ("differential_privacy", "type: TREE_AGGREGATION noise_multiplier", ["5", "500"], [], SPLIT),
]
INSIDE = [(block, field, value) for block, field, inside, _, _ in LIMITS for value in inside]
OUTSIDE = [(block, field, *value, text) for block, field, _, outside, text in LIMITS for value in outside]


def set_field(config, block: str, field: str, value: str):
    """A copy of the configuration with the fields that the text names as it says, explicit zeros included."""
    changes = text_format.Parse(BLOCKS[block].format(f"{field}: {value}"), task_builder_pb2.TaskConfig())
    changed = task_builder_pb2.TaskConfig()
    changed.CopyFrom(config)
    source, target = changes, changed
    for name in PATHS[block].split(".")[:-1]:
        source, target = getattr(source, name), getattr(target, name)
    for name in {field.split(":")[0], field.split()[-1]}:
        setattr(target, name, getattr(source, name))
    return changed


@pytest.mark.parametrize(("block", "field", "value"), INSIDE)
def test_a_value_just_inside_its_limits_passes(config, block, field, value):
    config.policies.model_release_policy.dp_delta = 0
    validate(set_field(config, block, field, value), NO_FLAGS)


@pytest.mark.parametrize(("block", "field", "value", "shown", "text"), OUTSIDE)
def test_a_value_just_outside_its_limits_fails_alone_with_the_published_line(config, block, field, value, shown, text):
    key = field.split()[-1]
    rule = text(key) if callable(text) else text
    with pytest.raises(ConfigProblems) as caught:
        validate(set_field(config, block, field, value), NO_FLAGS)
    assert caught.value.reason == Reason.CONFIG_INVALID
    (problem,) = caught.value.problems
    assert problem.message == f"[Invalid task config]: key `{key}` has a bad value: `{shown}` in `{block}`. {rule}"
    assert (problem.path, problem.value, problem.rule) == (PATHS[block] + key, shown, rule)
    assert problem.remedy
    assert caught.value.detail == f"{problem.message}\n    {problem.path}: {problem.remedy}"


def test_every_rule_speaks_of_a_field_that_exists():
    for rule in (*RULES, *PRIVACY_RULES):
        descriptor = task_builder_pb2.TaskConfig.DESCRIPTOR
        *blocks, field = ((rule.prefix or PATHS[rule.entity]) + rule.key).split(".")
        for block in blocks:
            descriptor = descriptor.fields_by_name[block].message_type
        assert field in descriptor.fields_by_name


def test_a_mode_that_does_not_exist_is_refused(config):
    config.mode = 9
    with pytest.raises(ConfigInvalid, match="key `mode` has a bad value: `9`"):
        validate(config, NO_FLAGS)


def test_the_remedy_for_noise_that_an_adaptive_type_cannot_split_names_the_goal_it_needs(config):
    changed = set_field(config, "differential_privacy", "type: ADAPTIVE_TREE noise_multiplier", "7.5")
    with pytest.raises(ConfigProblems) as caught:
        validate(changed, NO_FLAGS)
    assert caught.value.problems[0].remedy == (
        "raise report_goal above 75 (10 times noise_multiplier), or lower the noise"
    )
    changed.federated_learning.learning_process.runtime_config.report_goal = 76
    validate(changed, NO_FLAGS)


@pytest.mark.parametrize("block", ["learning_process", "evaluation"])
@pytest.mark.parametrize("key", ["plan_url", "client_plan_url", "checkpoint_url"])
def test_a_placeholder_left_in_an_artifact_s_place_is_refused(config, block, key):
    urls = getattr(config.federated_learning, block).artifact_building
    setattr(urls, key, "/models/plan.pb")
    validate(config, NO_FLAGS)
    setattr(urls, key, "{storage_path}/plan.pb")
    with pytest.raises(ConfigProblems) as caught:
        validate(config, NO_FLAGS)
    (problem,) = caught.value.problems
    assert problem.path == f"federated_learning.{block}.artifact_building.{key}"
    assert "`{storage_path}/plan.pb` in `artifact_building`" in problem.message


def test_a_placeholder_of_a_task_that_is_not_built_does_no_harm(config):
    config.mode = task_builder_pb2.TaskMode.EVAL_ONLY
    config.federated_learning.learning_process.artifact_building.plan_url = "{storage_path}/plan.pb"
    validate(config, NO_FLAGS)


def test_every_problem_is_listed_in_the_order_of_the_rules(config):
    config.population_name = ""
    config.differential_privacy.clip_norm = 0
    config.federated_learning.evaluation.report_goal = 0
    with pytest.raises(ConfigInvalid) as caught:
        validate(config, NO_FLAGS)
    lines = caught.value.detail.split("\n")
    assert [line.rpartition("`. ")[2] for line in lines[::2]] == [POPULATION, GOAL, CLIP]
    assert [line.split(":")[0].strip() for line in lines[1::2]] == [
        "population_name",
        "federated_learning.evaluation.report_goal",
        "differential_privacy.clip_norm",
    ]


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
