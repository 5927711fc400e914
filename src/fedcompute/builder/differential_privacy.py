"""Differential privacy of a build: parameters, accounting and the check (spec/task-builder.md 3)."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedcompute.builder.calibrations import calibrated
from fedcompute.builder.problem import ConfigProblems, Problem
from fedcompute.builder.rules import MAX_TARGET_EPSILON, adaptive_noise_problem, is_adaptive, problem
from fedcompute.builder.validation import BuildSettings, supported
from fedcompute.errors import Reason
from fedcompute.learning.specification import AggregatorSettings
from fedcompute.privacy.adaptive import LEARNING_RATE, TARGET_QUANTILE
from fedcompute.protos import learning_pb2, task_builder_pb2

logger = logging.getLogger(__name__)

_NOT_PRIVATE = "[Invalid task config]: differential_privacy setup is not private enough to pass DP accounting check."
_NOISE_PATH = "differential_privacy.noise_multiplier"

# Beyond it the accountant does not come to an end.
MAX_ACCOUNTED_ROUNDS = 10**9
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

    arguments = (dp.rounds, dp.sampling_probability, dp.delta)
    return calibrated(
        *("poisson", arguments, target_epsilon),
        calibrate=lambda: calibrate_noise(target_epsilon, *arguments),
        epsilon=lambda noise: _poisson_epsilon(replace(dp, noise_multiplier=noise)),
    )


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

    return calibrated(
        *("tree", (dp.rounds, dp.delta), target_epsilon),
        calibrate=lambda: calibrate_tree_noise(target_epsilon, dp.rounds, dp.delta),
        epsilon=lambda noise: _tree_epsilon(replace(dp, noise_multiplier=noise)),
    )


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

    Calibration may take a minute. Raises ConfigProblems for a type that is not supported or parameters that cannot be
    accounted for.

    Formal guarantees: `epsilon` bounds the loss of `rounds` releases at `delta` for add-or-remove-one device, if each
    round's devices are a Poisson sample of `population` with rate report goal / population.
    """
    kind = dp_type(settings)
    _check_rounds(settings.rounds)
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
        raise _not_accountable(dp, error) from error
    if is_adaptive(dp.type) and (found := adaptive_noise_problem(dp.noise_multiplier, dp.report_goal)) is not None:
        raise ConfigProblems(Reason.CONFIG_INVALID, [found])
    _check_range(dp)
    logger.info(
        "DP Parameters: noise_multiplier=%s, dp_clip_norm=%s, dp_delta=%s, dp_epsilon=%s, num_training_rounds=%s, "
        "dp_aggregator_type=%s",
        *(dp.noise_multiplier, dp.clip_norm, dp.delta, dp.epsilon, dp.rounds, _Dp.Enum.Name(dp.type)),
    )
    return dp


def _check_rounds(rounds: int) -> None:
    if rounds > MAX_ACCOUNTED_ROUNDS:
        detail = f"num_max_training_rounds must be at most {MAX_ACCOUNTED_ROUNDS} to be accounted for."
        found = problem(
            "num_max_training_rounds", rounds, "model_release_policy", detail, "set the rounds you will run"
        )
        raise ConfigProblems(Reason.CONFIG_INVALID, [found])


def _not_accountable(dp: DpParameters, error: Exception) -> ConfigProblems:
    rule = f"DP accounting failed: {error}"
    shown = f"noise_multiplier {dp.noise_multiplier:g}, rounds {dp.rounds}, report goal {dp.report_goal}"
    remedy = f"choose a noise_multiplier near 1 or leave it out, and fewer rounds or devices ({shown})"
    found = Problem(f"[Invalid task config]: {rule}", "differential_privacy", str(dp.noise_multiplier), rule, remedy)
    return ConfigProblems(Reason.CONFIG_INVALID, [found])


def check_dp(settings: BuildSettings, dp: DpParameters) -> None:
    """Refuses a given noise multiplier whose epsilon exceeds the target; raises ConfigProblems.

    The remedy names the smallest noise multiplier that passes, which takes as long as a calibration.
    """
    target = settings.config.policies.model_release_policy.dp_target_epsilon or MAX_TARGET_EPSILON
    if not settings.config.differential_privacy.noise_multiplier or dp.epsilon <= target:
        return
    rule = (
        f"noise_multiplier {dp.noise_multiplier:g} gives epsilon {dp.epsilon:.6g} at delta {dp.delta:.6g} after "
        f"{dp.rounds} rounds; the target is {target:g}."
    )
    remedy = _remedy(dp_type(settings), dp, target)
    raise ConfigProblems(
        Reason.CONFIG_INVALID,
        [Problem(f"{_NOT_PRIVATE} {rule}", _NOISE_PATH, str(dp.noise_multiplier), rule, remedy)],
    )


def _remedy(kind: DpType, dp: DpParameters, target: float) -> str:
    advice = "leave noise_multiplier out to have it calibrated, or skip the check with skip_dp_check"
    try:
        smallest = kind.calibrate(dp, target)
    except Exception as error:
        # The refusal stands whether or not its advice can be computed.
        logger.warning("No noise multiplier was found for the target: %s", error)
        return advice
    # Rounded up, so that what is read off the message passes.
    shown = math.ceil(smallest * 1e4) / 1e4
    if is_adaptive(dp.type) and adaptive_noise_problem(shown, dp.report_goal) is not None:
        return f"raise report_goal above {10 * shown:.6g} and set noise_multiplier to {shown} or more"
    return f"set noise_multiplier to {shown} or more (the smallest that passes), {advice}"


def _check_range(dp: DpParameters) -> None:
    for key, value in (("clip_norm", dp.clip_norm), ("noise_multiplier", dp.noise_multiplier * dp.clip_norm)):
        if value > _MAX_FLOAT32 or 0 < value < _MIN_FLOAT32:
            detail = f"{key} is out of the range of a plan's 32-bit numbers."
            found = problem(key, value, "differential_privacy", detail, "choose clip norm and noise near 1")
            raise ConfigProblems(Reason.CONFIG_INVALID, [found])
