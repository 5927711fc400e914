"""Differential privacy of a build: parameters, accounting and the check (spec/task-builder.md 3)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedcompute.builder.rules import MAX_TARGET_EPSILON, problem
from fedcompute.builder.validation import BuildSettings, supported
from fedcompute.errors import ConfigInvalid, Reason
from fedcompute.learning.specification import AggregatorSettings
from fedcompute.privacy.adaptive import LEARNING_RATE, TARGET_QUANTILE
from fedcompute.protos import learning_pb2, task_builder_pb2

logger = logging.getLogger(__name__)

# Normal numbers only: the state holds clip norm and noise scale as float32.
_MIN_FLOAT32, _MAX_FLOAT32 = 1.2e-38, 3.4e38

_Dp = task_builder_pb2.DpAggregator
_DEFAULT_INITIAL_CLIP_NORM = 0.1
_ZEROING_FACTOR = 100
# The reference's restart rule, in rounds (spec/artifacts.md 9.4).
_RESTART_PERIOD, _RESTART_OFFSET = 1024, 128


@dataclass(frozen=True)
class DpParameters:
    """What a build promises about its releases. Training values, in every mode."""

    type: task_builder_pb2.DpAggregator.Enum
    clip_norm: float  # L2, model units
    noise_multiplier: float  # noise standard deviation / clip_norm
    delta: float
    epsilon: float
    rounds: int
    report_goal: int  # devices
    population: int  # devices that a round samples from

    @property
    def sampling_probability(self) -> float:
        return self.report_goal / self.population


@dataclass(frozen=True)
class DpType:
    """A kind of DP aggregation: where its clip norm stands, how it is accounted for, what the plan says of it."""

    clip_norm: Callable[[task_builder_pb2.DifferentialPrivacy], float]
    epsilon: Callable[[DpParameters], float]
    calibrate: Callable[[DpParameters, float], float]  # parameters, target epsilon -> noise multiplier
    aggregator: Callable[[DpParameters], AggregatorSettings]


def _poisson_epsilon(dp: DpParameters) -> float:
    from fedcompute.privacy.accounting import poisson_epsilon

    return poisson_epsilon(dp.noise_multiplier, dp.rounds, dp.sampling_probability, dp.delta)


def _calibrate_poisson(dp: DpParameters, target_epsilon: float) -> float:
    from fedcompute.privacy.accounting import calibrate_noise

    return calibrate_noise(target_epsilon, dp.rounds, dp.sampling_probability, dp.delta)


def _fixed_gaussian(dp: DpParameters) -> learning_pb2.FixedGaussian:
    return learning_pb2.FixedGaussian(
        clip_norm=dp.clip_norm, noise_multiplier=dp.noise_multiplier, report_goal=dp.report_goal
    )


def _adaptive_gaussian(dp: DpParameters) -> learning_pb2.AdaptiveGaussian:
    return learning_pb2.AdaptiveGaussian(
        initial_clip_norm=dp.clip_norm,
        noise_multiplier=dp.noise_multiplier,
        report_goal=dp.report_goal,
        target_quantile=TARGET_QUANTILE,
        learning_rate=LEARNING_RATE,
    )


def _tree(dp: DpParameters) -> learning_pb2.TreeAggregation:
    return learning_pb2.TreeAggregation(
        clip_norm=dp.clip_norm,
        noise_multiplier=dp.noise_multiplier,
        report_goal=dp.report_goal,
        zeroing_norm=_ZEROING_FACTOR * dp.clip_norm,
    )


def _adaptive_tree(dp: DpParameters) -> learning_pb2.AdaptiveTree:
    return learning_pb2.AdaptiveTree(
        initial_clip_norm=dp.clip_norm,
        noise_multiplier=dp.noise_multiplier,
        report_goal=dp.report_goal,
        zeroing_norm=_ZEROING_FACTOR * dp.clip_norm,
        target_quantile=TARGET_QUANTILE,
        learning_rate=LEARNING_RATE,
        restart_period=_RESTART_PERIOD,
        restart_offset=_RESTART_OFFSET,
    )


def _tree_epsilon(dp: DpParameters) -> float:
    from fedcompute.privacy.accounting import tree_epsilon

    return tree_epsilon(dp.noise_multiplier, (dp.rounds,), dp.delta)


def _calibrate_tree(dp: DpParameters, target_epsilon: float) -> float:
    from fedcompute.privacy.accounting import calibrate_tree_noise

    return calibrate_tree_noise(target_epsilon, dp.rounds, dp.delta)


def _initial_clip_norm(dp: task_builder_pb2.DifferentialPrivacy) -> float:
    return dp.init_clip_norm or _DEFAULT_INITIAL_CLIP_NORM


DP_TYPES: Mapping[int, DpType] = {
    _Dp.FIXED_GAUSSIAN: DpType(lambda dp: dp.clip_norm, _poisson_epsilon, _calibrate_poisson, _fixed_gaussian),
    _Dp.ADAPTIVE_GAUSSIAN: DpType(_initial_clip_norm, _poisson_epsilon, _calibrate_poisson, _adaptive_gaussian),
    _Dp.TREE_AGGREGATION: DpType(lambda dp: dp.clip_norm, _tree_epsilon, _calibrate_tree, _tree),
    _Dp.ADAPTIVE_TREE: DpType(_initial_clip_norm, _tree_epsilon, _calibrate_tree, _adaptive_tree),
}


def dp_type(settings: BuildSettings) -> DpType:
    """The configured type; ConfigInvalid naming the field for one that is not supported."""
    number = settings.config.differential_privacy.type or _Dp.FIXED_GAUSSIAN
    return supported(DP_TYPES, _Dp.Enum, number, "type", "differential_privacy")


def dp_parameters(settings: BuildSettings) -> DpParameters:
    """Parameters with their epsilon: the given noise is accounted for, an unset one is calibrated to the target.

    Calibration may take a minute. Raises ConfigInvalid for a type that is not supported or parameters that cannot be
    accounted for.

    Formal guarantees: `epsilon` bounds the loss of `rounds` releases at `delta` for add-or-remove-one device, if each
    round's devices are a Poisson sample of `population` with rate report goal / population.
    """
    kind = dp_type(settings)
    configured = settings.config.differential_privacy
    release = settings.config.policies.model_release_policy
    target = release.dp_target_epsilon or MAX_TARGET_EPSILON
    dp = DpParameters(
        type=configured.type or _Dp.FIXED_GAUSSIAN,
        clip_norm=kind.clip_norm(configured),
        noise_multiplier=configured.noise_multiplier,
        delta=release.dp_delta or 1 / configured.estimated_population,
        epsilon=target,
        rounds=settings.rounds,
        report_goal=settings.report_goal,
        population=configured.estimated_population,
    )
    try:
        if configured.noise_multiplier:
            dp = replace(dp, epsilon=kind.epsilon(dp))
        else:
            dp = replace(dp, noise_multiplier=kind.calibrate(dp, target))
    except Exception as error:
        # Whatever the accountant raises, it speaks about these parameters.
        raise ConfigInvalid(Reason.CONFIG_INVALID, f"[Invalid task config]: DP accounting failed: {error}") from error
    _check_range(dp)
    logger.info(
        "DP Parameters: noise_multiplier=%s, dp_clip_norm=%s, dp_delta=%s, dp_epsilon=%s, num_training_rounds=%s, "
        "dp_aggregator_type=%s",
        *(dp.noise_multiplier, dp.clip_norm, dp.delta, dp.epsilon, dp.rounds, _Dp.Enum.Name(dp.type)),
    )
    return dp


def check_dp(settings: BuildSettings, dp: DpParameters) -> None:
    """Refuses a given noise multiplier whose epsilon exceeds the target; raises ConfigInvalid."""
    target = settings.config.policies.model_release_policy.dp_target_epsilon or MAX_TARGET_EPSILON
    if not settings.config.differential_privacy.noise_multiplier or dp.epsilon <= target:
        return
    raise ConfigInvalid(
        Reason.CONFIG_INVALID,
        "[Invalid task config]: differential_privacy setup is not private enough to pass DP accounting check. "
        f"Noise multiplier {dp.noise_multiplier} gives epsilon {dp.epsilon:.6g} at delta {dp.delta:.6g}; the target is "
        f"{target:g}. Leave noise_multiplier out to have it calibrated.",
    )


def _check_range(dp: DpParameters) -> None:
    for key, value in (("clip_norm", dp.clip_norm), ("noise_multiplier", dp.noise_multiplier * dp.clip_norm)):
        if value > _MAX_FLOAT32 or 0 < value < _MIN_FLOAT32:
            raise ConfigInvalid(
                Reason.CONFIG_INVALID,
                problem(key, value, "differential_privacy", f"{key} is out of the range of a plan's 32-bit numbers."),
            )
