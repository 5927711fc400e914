"""Audits in one run: canaries through the server's code, on digits that real devices train on.

Verdicts: where noise is as claimed, the draws and coins are the operating system's and the confidence is 1 - 1e-6, so
by the theorem each such test fails for a correct mechanism at most once in a million runs. Elsewhere draws and coins
are seeded, and nothing is left to chance.
"""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from fedcompute.learning.audit import WeakenedNoise, audit
from fedcompute.learning.specification import training_process
from fedcompute.models.softmax_regression import accuracy, local_update, zero_weights
from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.privacy.banded import optimal_coefficients
from fedcompute.privacy.noise import SeededNoise
from fedcompute.protos import learning_pb2
from fedcompute.tensors.tree import LeafSpec

CANARIES = 600
DELTA = 1e-5
GOAL = 20 + CANARIES // 2
CLIP = {"clip_norm": 0.5, "report_goal": GOAL}
ADAPTIVE = {"initial_clip_norm": 0.5, "report_goal": GOAL, "target_quantile": 0.5, "learning_rate": 0.2}
# Mechanism, rounds, separation of a canary's rounds; claims lie between 0.9 and 2.3.
PRIVATE = {
    "fixed Gaussian": (learning_pb2.FixedGaussian(**CLIP, noise_multiplier=4), 4, 1),
    "adaptive Gaussian": (learning_pb2.AdaptiveGaussian(**ADAPTIVE, noise_multiplier=4), 4, 1),
    "tree, every round": (learning_pb2.TreeAggregation(**CLIP, noise_multiplier=10, zeroing_norm=50), 5, 1),
    "tree, one round": (learning_pb2.TreeAggregation(**CLIP, noise_multiplier=4, zeroing_norm=50), 5, 5),
    "adaptive tree": (
        learning_pb2.AdaptiveTree(
            **ADAPTIVE, noise_multiplier=4, zeroing_norm=50, restart_period=1024, restart_offset=128
        ),
        5,
        5,
    ),
    "banded": (
        learning_pb2.BandedMatrixFactorization(**CLIP, noise_multiplier=3, coefficients=optimal_coefficients(6, 3)),
        6,
        3,
    ),
}


@pytest.fixture(scope="module")
def digits():
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the digits")
    source = sklearn.load_digits()
    return source.images / 16, source.target


@pytest.fixture(scope="module")
def audited(digits):
    """Returns run(aggregator, rounds, separation, ...) -> AuditResult over 20 devices that share 1,600 digits."""
    x, y = digits

    def devices(weights):
        return [local_update(weights, x[i:1600:20], y[i:1600:20], 0.5, 5) for i in range(20)]

    def run(aggregator, rounds, separation=1, *, optimizer=None, canaries=CANARIES, **options):
        weights = zero_weights(64, 10)
        process = training_process(
            algorithm=learning_pb2.LearningProcess.FED_AVG,
            trainable=[LeafSpec("", weight.shape, weight.dtype) for weight in weights],
            non_trainable=[],
            server_optimizer=optimizer or learning_pb2.Sgd(learning_rate=1.0),
            aggregator=aggregator,
            metrics=["sparse_categorical_accuracy"],
        )
        options = {"rounds": rounds, "canaries": canaries, "delta": DELTA, "separation": separation, **options}
        return audit(process, weights, devices, **options)

    return run


def coins(seed):
    return np.random.default_rng(seed).random(CANARIES) < 0.5


def test_without_noise_the_audit_shows_nearly_all_that_its_canaries_can(audited, digits):
    result = audited(learning_pb2.FixedGaussian(**CLIP, noise_multiplier=0), 4, included=coins(0))
    assert math.isinf(result.claimed_epsilon)
    assert math.isinf(result.separation)
    assert result.correct == result.guesses
    assert 0.9 * result.largest_epsilon < result.epsilon <= result.largest_epsilon
    assert not result.refuted, "without noise nothing is claimed"
    x, y = digits
    assert accuracy(result.weights, x[1600:], y[1600:]) > 0.7, "the devices beside the canaries train a real model"


@pytest.mark.parametrize("name", PRIVATE)
def test_noise_as_claimed_is_never_refuted(audited, name):
    result = audited(*PRIVATE[name], confidence=1 - 1e-6)
    assert 0.9 < result.claimed_epsilon < 2.3
    assert not result.refuted
    assert result.epsilon < result.claimed_epsilon


@pytest.mark.parametrize("name", PRIVATE)
def test_a_tenth_of_the_noise_that_is_claimed_is_caught(audited, name):
    result = audited(*PRIVATE[name], noise=WeakenedNoise(SeededNoise(1), 0.1), included=coins(1))
    assert result.refuted
    assert result.epsilon > 1.5 * result.claimed_epsilon


@pytest.mark.parametrize("name", ["fixed Gaussian", "tree, every round", "tree, one round", "banded"])
def test_the_auditor_uses_all_that_the_claim_grants(audited, name):
    result = audited(*PRIVATE[name], noise=SeededNoise(2), included=coins(2))
    # The scores of the auditor's own run are as far apart as the Gaussian release that the claim amounts to.
    assert gaussian_epsilon(1 / result.separation, DELTA) == pytest.approx(result.claimed_epsilon, rel=0.1)


@pytest.mark.parametrize("name", PRIVATE)
def test_guesses_are_right_as_often_as_noise_as_claimed_lets_them(audited, name):
    result = audited(*PRIVATE[name])
    # Scores follow a half and half mixture of normal distributions at 0 and `separation`.
    share = result.guesses / 2 / CANARIES
    cut = optimize.brentq(
        lambda value: (stats.norm.sf(value) + stats.norm.sf(value - result.separation)) / 2 - share, -9, 9
    )
    right = stats.norm.sf(cut - result.separation) / 2 / share
    # Five standard deviations, and 2 % for the auditor's estimate of the noise: fails once in a million runs.
    tolerance = 5 * math.sqrt(result.guesses * right * (1 - right)) + 0.02 * result.guesses
    assert result.correct == pytest.approx(result.guesses * right, abs=tolerance)


def test_the_bound_is_positive_and_below_the_claim_where_noise_is_weak(audited):
    result = audited(learning_pb2.FixedGaussian(**CLIP, noise_multiplier=1), 4, noise=SeededNoise(3), included=coins(3))
    assert 1 < result.epsilon < result.gaussian_epsilon < result.claimed_epsilon


def test_without_a_signal_guesses_are_right_by_luck_alone(audited):
    # All noise and no canary: half the guesses are "included" and wrong.
    result = audited(
        learning_pb2.FixedGaussian(**CLIP, noise_multiplier=4), 2, noise=SeededNoise(4), included=np.zeros(600, bool)
    )
    assert result.correct == result.guesses // 2
    assert result.epsilon == result.gaussian_epsilon == 0


def test_equal_seeds_and_coins_give_the_same_audit(audited):
    first, second = (
        audited(*PRIVATE["fixed Gaussian"], noise=SeededNoise(5), included=coins(5)).correct for _ in range(2)
    )
    assert first == second


def test_what_cannot_be_audited_is_refused(audited):
    gaussian = PRIVATE["fixed Gaussian"][0]
    with pytest.raises(ValueError, match="bounds no update"):
        audited(learning_pb2.UniformMean(), 1)
    with pytest.raises(ValueError, match="SGD"):
        audited(gaussian, 1, optimizer=learning_pb2.Adam(learning_rate=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-7))
    with pytest.raises(ValueError, match="rounds"):
        audited(gaussian, 1, separation=0)
    for canaries in (0, 1, 651):
        with pytest.raises(ValueError, match="canaries"):
            audited(gaussian, 1, canaries=canaries)
