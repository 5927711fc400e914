import re
from contextlib import nullcontext
from dataclasses import replace

import pytest

from fedcompute.builder.differential_privacy import DP_TYPES, MAX_ACCOUNTED_ROUNDS, check_dp, dp_parameters
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.validation import validate
from fedcompute.errors import ConfigInvalid
from fedcompute.privacy.accounting import calibrate_noise, poisson_epsilon, tree_epsilon
from fedcompute.protos import task_builder_pb2

NO_FLAGS = task_builder_pb2.ExperimentFlags()


def test_given_noise_is_accounted_for(config):
    dp = dp_parameters(validate(config, NO_FLAGS))
    assert (dp.noise_multiplier, dp.clip_norm, dp.delta, dp.rounds) == (1.0, 0.25, 1e-6, 20)
    assert dp.epsilon == poisson_epsilon(1.0, 20, 50 / 1_000_000, 1e-6)


def test_unset_noise_is_calibrated_to_the_target(config):
    config.differential_privacy.noise_multiplier = 0
    config.differential_privacy.estimated_population = 50
    config.policies.model_release_policy.dp_target_epsilon = 1
    config.policies.model_release_policy.dp_delta = 0
    config.policies.model_release_policy.num_max_training_rounds = 2
    dp = dp_parameters(validate(config, NO_FLAGS))
    assert (dp.epsilon, dp.delta) == (1, 0.02)
    assert poisson_epsilon(dp.noise_multiplier, 2, 1.0, 0.02) <= 1
    assert poisson_epsilon(dp.noise_multiplier * 0.99, 2, 1.0, 0.02) > 1


def test_noise_too_small_for_the_target_is_refused_with_the_numbers_and_the_smallest_noise_that_passes(config):
    config.differential_privacy.estimated_population = 50
    config.policies.model_release_policy.dp_delta = 0
    settings = validate(config, NO_FLAGS)
    dp = dp_parameters(settings)
    with pytest.raises(ConfigProblems) as caught:
        check_dp(settings, dp)
    assert caught.value.detail.startswith(
        "[Invalid task config]: differential_privacy setup is not private enough to pass DP accounting check. "
        f"noise_multiplier 1 gives epsilon {dp.epsilon:.6g} at delta 0.02 after 20 rounds; the target is 10."
    )
    (problem,) = caught.value.problems
    assert problem.path == "differential_privacy.noise_multiplier"
    smallest = float(re.search(r"set noise_multiplier to (\S+) or more", problem.remedy)[1])
    assert poisson_epsilon(smallest, 20, 1.0, 0.02) <= 10 < poisson_epsilon(smallest - 2e-4, 20, 1.0, 0.02)
    config.differential_privacy.noise_multiplier = smallest
    settings = validate(config, NO_FLAGS)
    check_dp(settings, dp_parameters(settings))


@pytest.mark.parametrize("noise", [0, 3.0])
def test_the_same_numbers_are_accounted_for_once(config, noise):
    config.differential_privacy.noise_multiplier = noise
    config.differential_privacy.estimated_population = 60
    config.policies.model_release_policy.dp_delta = 0
    first = dp_parameters(validate(config, NO_FLAGS))
    before = poisson_epsilon.cache_info().misses, calibrate_noise.cache_info().misses
    config.population_name = "another"
    config.differential_privacy.clip_norm = 2
    assert dp_parameters(validate(config, NO_FLAGS)).epsilon == first.epsilon
    assert (poisson_epsilon.cache_info().misses, calibrate_noise.cache_info().misses) == before


def test_more_rounds_than_can_be_accounted_for_are_refused(config):
    config.policies.model_release_policy.num_max_training_rounds = MAX_ACCOUNTED_ROUNDS
    dp_parameters(validate(config, NO_FLAGS))
    config.policies.model_release_policy.num_max_training_rounds += 1
    with pytest.raises(ConfigProblems, match="num_max_training_rounds must be at most 1000000000"):
        dp_parameters(validate(config, NO_FLAGS))


def test_what_the_accountant_raises_is_a_problem_of_the_configuration(config, monkeypatch):
    # No setting that the rules admit is known to fail, so the failure is made.
    def fail(*arguments):
        raise ValueError("no bracket")

    monkeypatch.setattr("fedcompute.privacy.accounting.poisson_epsilon", fail)
    with pytest.raises(ConfigProblems, match="DP accounting failed: no bracket"):
        dp_parameters(validate(config, NO_FLAGS))


def test_calibrated_noise_that_an_adaptive_type_cannot_split_is_refused(config, monkeypatch):
    # The types themselves are no part of this: any entry with the number of an adaptive one serves.
    kind = DP_TYPES[task_builder_pb2.DpAggregator.FIXED_GAUSSIAN]
    adaptive = task_builder_pb2.DpAggregator.ADAPTIVE_GAUSSIAN
    config.differential_privacy.type = adaptive
    config.differential_privacy.noise_multiplier = 0
    for noise, refused in ((4.99, False), (5.0, True)):
        entry = replace(kind, calibrate=lambda dp, target, noise=noise: noise)
        monkeypatch.setattr("fedcompute.builder.differential_privacy.DP_TYPES", {adaptive: entry})
        with pytest.raises(ConfigProblems, match="raise report_goal above 50") if refused else nullcontext():
            assert dp_parameters(validate(config, NO_FLAGS)).noise_multiplier == noise


@pytest.mark.parametrize("name", ["TREE_AGGREGATION", "ADAPTIVE_TREE"])
def test_tree_types_are_accounted_for_as_one_tree_of_all_rounds(config, name):
    config.differential_privacy.type = task_builder_pb2.DpAggregator.Enum.Value(name)
    dp = dp_parameters(validate(config, NO_FLAGS))
    assert dp.epsilon == tree_epsilon(dp.noise_multiplier, (dp.rounds,), dp.delta)


def test_adaptive_types_begin_with_their_own_clip_norm_and_a_default(config):
    config.differential_privacy.type = task_builder_pb2.DpAggregator.ADAPTIVE_TREE
    assert dp_parameters(validate(config, NO_FLAGS)).clip_norm == 0.1
    config.differential_privacy.init_clip_norm = 0.7
    assert dp_parameters(validate(config, NO_FLAGS)).clip_norm == 0.7


def test_a_clip_norm_that_a_plan_cannot_hold_is_refused(config):
    config.differential_privacy.clip_norm = 1e300
    with pytest.raises(ConfigInvalid, match="clip_norm"):
        dp_parameters(validate(config, NO_FLAGS))
