import re
from contextlib import nullcontext

import pytest

from fedcompute.builder import differential_privacy
from fedcompute.builder.differential_privacy import (
    MAX_ACCOUNTED_ROUNDS,
    account,
    check_dp,
    dp_notes,
    metric_noise,
    privacy_claim,
)
from fedcompute.builder.dp_types import bands_in_memory, tree_bytes
from fedcompute.builder.problem import ConfigProblems
from fedcompute.builder.validation import validate
from fedcompute.errors import ConfigInvalid
from fedcompute.privacy.accounting import (
    calibrate_noise,
    fixed_size_epsilon,
    gaussian_epsilon,
    poisson_epsilon,
    tree_epsilon,
)
from fedcompute.protos import learning_pb2, task_builder_pb2

NO_FLAGS = task_builder_pb2.ExperimentFlags()
Dp = task_builder_pb2.DpAggregator
Participation = task_builder_pb2.Participation


def dp_parameters(settings):
    """With the exact epsilon, however long it takes."""
    return account(settings).result()


@pytest.fixture
def parameters(config):
    """`parameters(type, participation, **fields)`: with the exact epsilon; 20 rounds, 50 of 1 000 000 devices."""

    def make(kind="FIXED_GAUSSIAN", participation="UNKNOWN", *, separation=3, **fields):
        config.differential_privacy.type = Dp.Enum.Value(kind)
        config.differential_privacy.participation = Participation.Enum.Value(participation)
        config.policies.min_separation_policy.minimum_separation = separation
        for name, value in fields.items():
            setattr(config.differential_privacy, name, value)
        return dp_parameters(validate(config, NO_FLAGS))

    return make


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


def test_noise_too_small_for_the_target_is_refused_with_the_numbers_and_hardly_more_noise_than_passes(config):
    config.differential_privacy.estimated_population = 50
    config.policies.model_release_policy.dp_delta = 0
    accounting = account(validate(config, NO_FLAGS))
    with pytest.raises(ConfigProblems) as caught:
        check_dp(accounting)
    shown = re.fullmatch(
        r"\[Invalid task config\]: differential_privacy setup is not private enough to pass DP accounting check\. "
        r"noise_multiplier 1 gives epsilon (?:between (\S+) and )?(\S+) at delta 0\.02 after 20 rounds; "
        r"the target is 10\.",
        caught.value.problems[0].message,
    )
    exact = accounting.result().epsilon
    assert float(shown[1] or shown[2]) <= exact * (1 + 1e-5)
    assert exact <= float(shown[2]) * (1 + 1e-5)
    (problem,) = caught.value.problems
    assert problem.path == "differential_privacy.noise_multiplier"
    smallest = float(re.search(r"set noise_multiplier to (\S+) or more", problem.remedy)[1])
    assert poisson_epsilon(smallest, 20, 1.0, 0.02) <= 10 < poisson_epsilon(smallest * 0.995, 20, 1.0, 0.02)
    config.differential_privacy.noise_multiplier = smallest
    check_dp(account(validate(config, NO_FLAGS)))


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

    # Numbers that no other test has had accounted for.
    config.differential_privacy.noise_multiplier = 1.2345
    monkeypatch.setattr("fedcompute.privacy.composition.poisson_epsilon", fail)
    with pytest.raises(ConfigProblems, match="DP accounting failed: no bracket"):
        dp_parameters(validate(config, NO_FLAGS))


def test_calibrated_noise_that_an_adaptive_type_cannot_split_is_refused(config, monkeypatch):
    # The search itself is no part of this.
    config.differential_privacy.type = task_builder_pb2.DpAggregator.ADAPTIVE_GAUSSIAN
    config.differential_privacy.noise_multiplier = 0
    for noise, refused in ((4.99, False), (5.0, True)):
        monkeypatch.setattr(
            "fedcompute.builder.differential_privacy.calibrated_noise", lambda *arguments, noise=noise: noise
        )
        with pytest.raises(ConfigProblems, match="raise report_goal above 50") if refused else nullcontext():
            assert dp_parameters(validate(config, NO_FLAGS)).noise_multiplier == pytest.approx(noise)


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


def test_gaussian_types_are_accounted_for_under_each_participation(parameters):
    for kind in ("FIXED_GAUSSIAN", "ADAPTIVE_GAUSSIAN"):
        assert parameters(kind).epsilon == poisson_epsilon(1.0, 20, 50 / 1_000_000, 1e-6)
        assert parameters(kind, "POISSON").epsilon == parameters(kind).epsilon
        assert parameters(kind, "FIXED_SIZE").epsilon == fixed_size_epsilon(1.0, 20, 50, 1_000_000, 1e-6)
        # Once in three rounds is seven times in twenty.
        assert parameters(kind, "MIN_SEPARATION").epsilon == pytest.approx(gaussian_epsilon(7**-0.5, 1e-6), rel=1e-9)
        unlimited = parameters(kind, "NO_AMPLIFICATION").epsilon
        assert unlimited == pytest.approx(gaussian_epsilon(20**-0.5, 1e-6), rel=1e-9)
        assert parameters(kind, "MIN_SEPARATION", separation=1).epsilon == unlimited


def test_noise_on_metrics_is_a_part_of_the_budget(parameters):
    total = (1.0**-2 + 5.0**-2) ** -0.5
    metrics = {"metrics_clip_norm": 10.0, "metrics_noise_multiplier": 5.0}
    assert parameters(**metrics).epsilon == pytest.approx(poisson_epsilon(total, 20, 50 / 1_000_000, 1e-6), rel=1e-9)
    both = parameters("FIXED_GAUSSIAN", "NO_AMPLIFICATION", **metrics)
    assert both.epsilon == pytest.approx(gaussian_epsilon(total / 20**0.5, 1e-6), rel=1e-9)
    assert parameters("TREE_AGGREGATION", **metrics).epsilon > tree_epsilon(1.0, (20,), 1e-6)


@pytest.mark.parametrize(
    ("kind", "participation"),
    [
        ("FIXED_GAUSSIAN", "FIXED_SIZE"),
        ("ADAPTIVE_GAUSSIAN", "MIN_SEPARATION"),
        ("TREE_AGGREGATION", "POISSON"),
        ("BANDED_MF", "MIN_SEPARATION"),
    ],
)
def test_calibration_leaves_the_metrics_their_part(parameters, config, kind, participation):
    config.federated_learning.learning_process.runtime_config.report_goal = 500
    fields = {"noise_multiplier": 0.0, "metrics_clip_norm": 10.0, "metrics_noise_multiplier": 5.0}
    calibrated = parameters(kind, participation, **fields)
    spent = parameters(kind, participation, **{**fields, "noise_multiplier": calibrated.noise_multiplier}).epsilon
    assert 10 * (1 - 1e-3) < spent <= 10
    alone = parameters(kind, participation, noise_multiplier=0.0, metrics_clip_norm=0, metrics_noise_multiplier=0)
    assert alone.noise_multiplier < calibrated.noise_multiplier


def test_noise_on_metrics_that_alone_overspends_is_refused_by_its_own_name(parameters):
    with pytest.raises(ConfigProblems) as caught:
        parameters("BANDED_MF", noise_multiplier=0.0, metrics_clip_norm=10.0, metrics_noise_multiplier=0.5)
    (problem,) = caught.value.problems
    assert problem.path == "differential_privacy.metrics_noise_multiplier"
    assert "metrics_noise_multiplier 0.5 alone gives epsilon" in problem.rule
    assert "raise metrics_noise_multiplier" in problem.remedy


def test_a_refusal_that_no_noise_on_the_model_would_mend_says_so(config):
    config.differential_privacy.participation = Participation.NO_AMPLIFICATION
    config.differential_privacy.metrics_clip_norm = 1
    config.differential_privacy.metrics_noise_multiplier = 0.5
    with pytest.raises(ConfigProblems) as caught:
        check_dp(account(validate(config, NO_FLAGS)))
    assert "raise metrics_noise_multiplier, whose epsilon alone exceeds" in caught.value.problems[0].remedy


def test_bands_follow_the_minimum_separation_and_the_model_s_size(parameters):
    found = {separation: parameters("BANDED_MF", separation=separation).bands for separation in (0, 1, 3, 20, 90)}
    assert found == {0: 1, 1: 1, 3: 3, 20: 20, 90: 20}
    assert bands_in_memory(64, 1000) == 64
    assert bands_in_memory(64, 10**6) == 17
    assert bands_in_memory(64, 10**9) == 1
    # Whatever the bands, a device that stays away for as long reveals what so many participations reveal.
    assert parameters("BANDED_MF", separation=3).epsilon == pytest.approx(gaussian_epsilon(7**-0.5, 1e-6), rel=1e-9)


def test_the_size_of_a_trees_noise_grows_with_its_levels():
    # 1,000 rounds fill 10 levels; nodes and what was added, in 8 + 4 bytes each.
    assert tree_bytes(1000, 10**6) == 12 * 11 * 10**6
    assert tree_bytes(1, 1) == 24


def test_the_bounds_decide_the_check_and_the_exact_value_is_not_waited_for(config, monkeypatch):
    # An accountant that would never come to an end.
    monkeypatch.setattr(
        differential_privacy, "epsilon", lambda *arguments: pytest.fail("the exact value was asked for")
    )
    config.differential_privacy.noise_multiplier = 0.9
    accounting = account(validate(config, NO_FLAGS))
    check_dp(accounting)
    assert accounting.bounds.lower < accounting.parameters.epsilon == accounting.bounds.upper < 0.01
    config.differential_privacy.noise_multiplier = 0.1
    with pytest.raises(ConfigProblems, match=r"gives epsilon between \d"):
        check_dp(account(validate(config, NO_FLAGS)))


def test_where_the_bounds_leave_it_open_the_exact_value_decides(config):
    config.differential_privacy.noise_multiplier = 0.8
    exact = dp_parameters(validate(config, NO_FLAGS)).epsilon
    config.policies.model_release_policy.dp_target_epsilon = exact
    accounting = account(validate(config, NO_FLAGS))
    assert accounting.bounds.lower < exact < accounting.bounds.upper
    check_dp(accounting)
    config.policies.model_release_policy.dp_target_epsilon = exact * (1 - 1e-7)
    with pytest.raises(ConfigProblems, match=f"gives epsilon {exact:.6g} at"):
        check_dp(account(validate(config, NO_FLAGS)))


def test_an_epsilon_that_rests_on_its_assumption_is_reported_beside_the_one_without(config):
    settings = validate(config, NO_FLAGS)
    dp = dp_parameters(settings)
    honest, over_selection = dp_notes(settings, dp)
    assert f"epsilon {dp.epsilon:.4g} holds under participation POISSON" in honest
    assert honest.endswith(f"it is {gaussian_epsilon(20**-0.5, 1e-6):.4g}")
    assert "up to 75 devices" in over_selection
    config.differential_privacy.participation = Participation.NO_AMPLIFICATION
    config.differential_privacy.noise_multiplier = 10
    settings = validate(config, NO_FLAGS)
    assert len(dp_notes(settings, dp_parameters(settings))) == 1


def test_the_plan_carries_the_promise_and_the_metrics_noise(parameters):
    dp = parameters("BANDED_MF", noise_multiplier=4.0, metrics_clip_norm=10.0, metrics_noise_multiplier=5.0)
    assert privacy_claim(dp) == learning_pb2.PrivacyClaim(
        participation=learning_pb2.PrivacyClaim.MIN_SEPARATION,
        estimated_population=1_000_000,
        minimum_separation=3,
        delta=1e-6,
        epsilon=dp.epsilon,
        rounds=20,
    )
    assert metric_noise(dp) == learning_pb2.MetricNoise(clip_norm=10, noise_multiplier=5)
    assert metric_noise(parameters(metrics_clip_norm=0, metrics_noise_multiplier=0)) is None


@pytest.mark.parametrize(("noise", "rounds"), [(1e-9, 20), (0.02, 10**6), (0.02, 10**9)])
def test_too_little_noise_for_many_rounds_is_refused_at_once_with_noise_that_passes(config, noise, rounds):
    config.differential_privacy.noise_multiplier = noise
    config.policies.model_release_policy.num_max_training_rounds = rounds
    accounting = account(validate(config, NO_FLAGS))
    assert 10 < accounting.bounds.lower < accounting.bounds.upper
    with pytest.raises(ConfigProblems, match=r"(?s)gives epsilon .* set noise_multiplier to \S+ or more") as caught:
        check_dp(accounting)
    config.differential_privacy.noise_multiplier = float(
        re.search(r"set noise_multiplier to (\S+)", str(caught.value))[1]
    )
    check_dp(account(validate(config, NO_FLAGS)))


def test_many_rounds_are_bounded_closely(config):
    config.policies.model_release_policy.num_max_training_rounds = 10**6
    bounds = account(validate(config, NO_FLAGS)).bounds
    assert bounds.lower < poisson_epsilon(1.0, 10**6, 5e-5, 1e-6) < bounds.upper < 1.3 * bounds.lower
