import math
import re

import pytest

from fedcompute.builder.config import read_config
from fedcompute.builder.privacy_rules import (
    PARTICIPATIONS,
    noise_bound,
    noise_problem,
    over_selection_note,
    participation_of,
)
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.validation import validate
from fedcompute.privacy.participation import Participation
from fedcompute.protos import learning_pb2, task_builder_pb2

NO_FLAGS = task_builder_pb2.ExperimentFlags()
Dp = task_builder_pb2.DpAggregator
TYPES = ("FIXED_GAUSSIAN", "ADAPTIVE_GAUSSIAN", "TREE_AGGREGATION", "ADAPTIVE_TREE", "BANDED_MF")


def of_type(config, name, participation="UNKNOWN"):
    config.differential_privacy.type = Dp.Enum.Value(name)
    config.differential_privacy.participation = task_builder_pb2.Participation.Enum.Value(participation)
    return config


def test_the_enum_has_the_same_numbers_in_configuration_plan_and_accounting():
    configured = task_builder_pb2.Participation.Enum
    claimed = learning_pb2.PrivacyClaim.Participation
    for member in Participation:
        assert configured.Value(member.name) == claimed.Value(member.name) == member
    assert len(configured.values()) == len(claimed.values()) == len(Participation) + 1


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("participation", list(Participation))
def test_a_type_is_accounted_for_under_the_assumptions_that_fit_it(config, name, participation):
    of_type(config, name, participation.name)
    gaussian = "GAUSSIAN" in name
    fits = {
        Participation.POISSON: name != "BANDED_MF",
        Participation.FIXED_SIZE: gaussian,
        Participation.MIN_SEPARATION: True,
        Participation.NO_AMPLIFICATION: True,
    }[participation]
    if fits:
        assert participation_of(validate(config, NO_FLAGS).config) == participation
        return
    with pytest.raises(ConfigProblems) as caught:
        validate(config, NO_FLAGS)
    (problem,) = caught.value.problems
    assert problem.path == "differential_privacy.participation"
    assert problem.value == participation.name
    assert f"not under {participation.name}" in problem.rule
    assert f"or leave it out for {PARTICIPATIONS[Dp.Enum.Value(name)][0].name}" in problem.remedy


def test_an_unset_participation_is_the_reference_s_claim_where_it_has_one(config):
    assert {name: participation_of(of_type(config, name)).name for name in TYPES} == {
        **dict.fromkeys(TYPES, "POISSON"),
        "BANDED_MF": "MIN_SEPARATION",
    }
    assert participation_of(of_type(config, "UNKNOWN")) == Participation.POISSON


def test_a_participation_that_does_not_exist_is_refused(config):
    config.differential_privacy.participation = 9
    with pytest.raises(ConfigProblems, match="participation must be POISSON, FIXED_SIZE, MIN_SEPARATION or NO_AMPLIFI"):
        validate(config, NO_FLAGS)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("text", "participation: MIN_SEPARATION metrics_clip_norm: 20 metrics_noise_multiplier: 5"),
        ("JSON", '"participation": "MIN_SEPARATION", "metricsClipNorm": 20, "metricsNoiseMultiplier": 5'),
        ("JSON", '"participation": 3, "metrics_clip_norm": 20.0, "metrics_noise_multiplier": 5e0'),
    ],
)
def test_the_fields_are_read_in_every_form(form, text):
    whole = f'{{"differentialPrivacy": {{{text}}}}}' if form == "JSON" else f"differential_privacy {{ {text} }}"
    dp = read_config(whole.encode()).config.differential_privacy
    assert (dp.participation, dp.metrics_clip_norm, dp.metrics_noise_multiplier) == (3, 20, 5)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"metrics_clip_norm": 1.0}, "metrics_noise_multiplier"),
        ({"metrics_noise_multiplier": 1.0}, "metrics_clip_norm"),
        ({"metrics_clip_norm": -1.0, "metrics_noise_multiplier": 1.0}, "metrics_clip_norm"),
        ({"metrics_clip_norm": 1.0, "metrics_noise_multiplier": -1e-9}, "metrics_noise_multiplier"),
        ({"metrics_clip_norm": 1.0, "metrics_noise_multiplier": math.inf}, "metrics_noise_multiplier"),
        ({"metrics_clip_norm": math.nan, "metrics_noise_multiplier": 1.0}, "metrics_clip_norm"),
        ({"metrics_clip_norm": 1.0, "metrics_noise_multiplier": 2.0**18 + 1}, "metrics_noise_multiplier"),
    ],
)
def test_metrics_are_noised_with_two_positive_numbers_or_not_at_all(config, given, wrong):
    for name, value in given.items():
        setattr(config.differential_privacy, name, value)
    with pytest.raises(ConfigProblems) as caught:
        validate(config, NO_FLAGS)
    (problem,) = caught.value.problems
    assert problem.path == f"differential_privacy.{wrong}"
    config.differential_privacy.metrics_clip_norm = config.differential_privacy.metrics_noise_multiplier = 1e-9
    validate(config, NO_FLAGS)


@pytest.mark.parametrize(
    ("name", "rounds", "bound"),
    [
        ("FIXED_GAUSSIAN", 10**6, 2.0**18),
        ("BANDED_MF", 10**6, 2.0**18),
        ("TREE_AGGREGATION", 512, 2.0**18),
        ("TREE_AGGREGATION", 1024, 2.0**17),
        ("TREE_AGGREGATION", 1025, 2.0**16),
        ("ADAPTIVE_TREE", 10**6, 2.0**17),
    ],
)
def test_noise_beyond_the_arithmetic_of_a_type_is_refused(config, name, rounds, bound):
    kind = Dp.Enum.Value(name)
    highest = noise_bound(kind, rounds)
    assert bound * (1 - 1e-12) < highest <= bound
    assert noise_problem(kind, highest, rounds) is None
    of_type(config, name).differential_privacy.noise_multiplier = bound * 1.01
    config.policies.model_release_policy.num_max_training_rounds = rounds
    config.federated_learning.learning_process.runtime_config.report_goal = 10**7
    config.differential_privacy.estimated_population = 10**8
    config.policies.model_release_policy.dp_delta = 0
    with pytest.raises(ConfigProblems) as caught:
        validate(config, NO_FLAGS)
    (found,) = [problem for problem in caught.value.problems if re.search(r"must be at most|2\*\*27", problem.rule)]
    assert found.path == "differential_privacy.noise_multiplier"
    assert found.remedy
    config.differential_privacy.noise_multiplier = highest
    validate(config, NO_FLAGS)


@pytest.mark.parametrize(
    ("name", "participation", "separation", "rounds", "expected"),
    [
        ("TREE_AGGREGATION", "UNKNOWN", 20, 20, []),
        ("TREE_AGGREGATION", "POISSON", 19, 20, ["minimum_separation to 20"]),
        ("ADAPTIVE_TREE", "UNKNOWN", 128, 128, []),
        ("ADAPTIVE_TREE", "UNKNOWN", 129, 129, ["restarts"]),
        ("ADAPTIVE_TREE", "UNKNOWN", 0, 129, ["minimum_separation to 129", "restarts"]),
        ("ADAPTIVE_TREE", "MIN_SEPARATION", 20, 129, []),
        ("TREE_AGGREGATION", "NO_AMPLIFICATION", 0, 20, []),
        ("FIXED_GAUSSIAN", "UNKNOWN", 0, 1000, []),
        ("ADAPTIVE_GAUSSIAN", "UNKNOWN", 0, 1000, []),
        ("FIXED_GAUSSIAN", "MIN_SEPARATION", 1, 1000, ["in every round; raise"]),
        ("BANDED_MF", "UNKNOWN", 0, 1000, ["in every round; its noise is not correlated"]),
        ("BANDED_MF", "UNKNOWN", 2, 1000, []),
        ("BANDED_MF", "UNKNOWN", 0, 1, []),
    ],
)
def test_a_configuration_warns_of_what_its_accounting_takes_for_granted(
    config, name, participation, separation, rounds, expected
):
    of_type(config, name, participation)
    config.policies.min_separation_policy.minimum_separation = separation
    config.policies.model_release_policy.num_max_training_rounds = rounds
    warnings = validate(config, NO_FLAGS).warnings
    assert len(warnings) == len(expected)
    assert all(words in warning for words, warning in zip(expected, warnings, strict=True))


def test_over_selection_is_explained_where_devices_are_assigned_beyond_the_goal(config):
    note = over_selection_note(config)
    assert "up to 75 devices are assigned to a round, of which the first 50 that report count" in note
    assert "fast devices" in note
    assert "fast devices" not in over_selection_note(of_type(config, "FIXED_GAUSSIAN", "NO_AMPLIFICATION"))
    config.federated_learning.learning_process.runtime_config.over_selection_rate = 0.01
    assert over_selection_note(config) == ""
