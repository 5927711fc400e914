import pytest

from fedcompute.builder.differential_privacy import check_dp, dp_parameters
from fedcompute.builder.validation import validate
from fedcompute.errors import ConfigInvalid
from fedcompute.privacy.accounting import poisson_epsilon, tree_epsilon
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


def test_noise_too_small_for_the_target_is_refused_with_both_numbers(config):
    config.differential_privacy.estimated_population = 50
    config.policies.model_release_policy.dp_delta = 0
    settings = validate(config, NO_FLAGS)
    with pytest.raises(ConfigInvalid) as caught:
        check_dp(settings, dp_parameters(settings))
    assert caught.value.detail.startswith(
        "[Invalid task config]: differential_privacy setup is not private enough to pass DP accounting check."
    )
    assert "the target is 10" in caught.value.detail


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
