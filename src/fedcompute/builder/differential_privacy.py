"""Differential privacy of a build: parameters, accounting and the check (spec/task-builder.md 3)."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import TypeVar

import numpy as np

from fedcompute.builder.calibrations import calibrated
from fedcompute.builder.dp_types import DP_TYPES, DpParameters, DpType, bands_of, evaluation_releases, planned, releases
from fedcompute.builder.epsilons import ExactEpsilon, announced
from fedcompute.builder.privacy_rules import (
    dp_type_of,
    noise_problem,
    over_selection_note,
    participation_of,
)
from fedcompute.builder.problem import ConfigProblems, Problem
from fedcompute.builder.rules import MAX_TARGET_EPSILON, adaptive_noise_problem, is_adaptive, problem
from fedcompute.builder.validation import BuildSettings, supported
from fedcompute.errors import Reason
from fedcompute.privacy.bounds import Bounds, epsilon_bounds, parts_upper
from fedcompute.privacy.composition import epsilon, parts_of, unamplified_epsilon
from fedcompute.privacy.planned import calibrated_noise
from fedcompute.protos import learning_pb2, task_builder_pb2

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_PRIVATE = "[Invalid task config]: differential_privacy setup is not private enough to pass DP accounting check."
_NOISE_PATH = "differential_privacy.noise_multiplier"

# More rounds than any task has; the accountant takes minutes for them.
MAX_ACCOUNTED_ROUNDS = 10**9
# Normal numbers only: the state holds clip norm and noise scale as float32.
_MIN_FLOAT32, _MAX_FLOAT32 = 1.2e-38, 3.4e38
# A plan's float32 noise and clip norm, and their product, lie within this of the calibrated number, relative.
_FLOAT32_MARGIN = 4e-7
# An assumption that makes epsilon so many times smaller is worth a warning.
_NOTABLE = 2.0
# The unit of the noise multiplier that a refusal advises, and how near to the target its epsilon should come.
_ADVISED, _NEAR = 1e-4, 3e-3

_Dp = task_builder_pb2.DpAggregator


@dataclass(frozen=True)
class Accounting:
    """The parameters of a build while their exact epsilon is still unknown.

    `parameters.epsilon` is the upper bound. `bounds`: proven limits of the exact value; both the target where the noise
    was calibrated to it. `target`: the configured largest epsilon.
    """

    parameters: DpParameters
    bounds: Bounds
    target: float
    exact: ExactEpsilon | None  # None where the noise was calibrated

    def begin(self) -> None:
        """Starts to compute the exact epsilon beside other work."""
        if self.exact is not None:
            self.exact.begin()

    def result(self, timeout: float | None = None) -> DpParameters:
        """The parameters with their exact epsilon; waits for it, or raises TimeoutError after `timeout` seconds.

        Raises ConfigProblems if the accountant fails.
        """
        exact = self.exact
        if exact is None:
            return self.parameters
        return replace(self.parameters, epsilon=_accounted(self.parameters, lambda: exact.result(timeout)))

    def known(self, seconds: float) -> tuple[DpParameters, Bounds]:
        """What is known after `seconds`: the exact epsilon, twice as bounds, or the upper one with both bounds."""
        try:
            dp = self.result(seconds)
        except TimeoutError:
            return self.parameters, self.bounds
        return dp, Bounds(dp.epsilon, dp.epsilon)


def dp_type(settings: BuildSettings) -> DpType:
    """The configured type; ConfigInvalid naming the field for one that is not supported."""
    number = dp_type_of(settings.config)
    return supported(DP_TYPES, _Dp.Enum, number, "type", "differential_privacy")


def account(settings: BuildSettings) -> Accounting:
    """Bounds the epsilon of a given noise multiplier, or calibrates an unset one to the target.

    Bounds take less than two seconds; calibration may take a minute. Raises ConfigProblems for a type that is not
    supported or parameters that cannot be accounted for.

    Formal guarantees: the exact epsilon, and therefore the upper bound, bounds the loss of `rounds` releases at
    `delta`, for the adjacency of `privacy.composition.epsilon`, if devices come to rounds as `participation` says.
    """
    kind = dp_type(settings)
    _check_rounds(settings.rounds)
    configured = settings.config.differential_privacy
    release = settings.config.policies.model_release_policy
    target = release.dp_target_epsilon or MAX_TARGET_EPSILON
    separation = settings.config.policies.min_separation_policy.minimum_separation
    dp = DpParameters(
        type=configured.type or _Dp.FIXED_GAUSSIAN,
        clip_norm=kind.clip_norm(configured),
        noise_multiplier=configured.noise_multiplier,
        delta=release.dp_delta or 1 / configured.estimated_population,
        epsilon=target,
        rounds=settings.rounds,
        report_goal=settings.report_goal,
        population=configured.estimated_population,
        participation=participation_of(settings.config),
        minimum_separation=separation,
        metrics_clip_norm=configured.metrics_clip_norm,
        # As the plan holds it.
        metrics_noise_multiplier=float(np.float32(configured.metrics_noise_multiplier)),
        bands=bands_of(separation, settings.rounds),
    )
    given = configured.noise_multiplier > 0
    bounds, exact = Bounds(target, target), None
    if given:
        bounds = _accounted(dp, lambda: epsilon_bounds(releases(dp), dp.delta))
        dp = replace(dp, epsilon=bounds.upper)
        key = (planned(dp), dp.assumption, dp.delta)
        exact = ExactEpsilon(lambda: epsilon(releases(dp), dp.delta), key, (bounds.lower, bounds.upper))
    else:
        _check_metrics(dp, target)
        noise = _accounted(dp, lambda: _calibrated(dp, target))
        dp = replace(dp, noise_multiplier=float(np.float32(noise * (1 + _FLOAT32_MARGIN))))
    for found in (
        noise_problem(dp.type, dp.noise_multiplier, dp.rounds),
        adaptive_noise_problem(dp.noise_multiplier, dp.report_goal) if is_adaptive(dp.type) else None,
    ):
        if found is not None:
            raise ConfigProblems(Reason.CONFIG_INVALID, [found])
    _check_range(dp)
    return Accounting(dp, bounds, target, exact)


def check_dp(accounting: Accounting) -> None:
    """Refuses a given noise multiplier whose epsilon exceeds the target; raises ConfigProblems.

    Decides by the bounds, or by an exact epsilon computed now where they leave it open; calibrated noise passes.
    """
    dp, bounds, target, exact = accounting.parameters, accounting.bounds, accounting.target, accounting.exact
    if exact is None or bounds.upper <= target:
        return
    if bounds.lower > target:
        shown = _interval(bounds.lower, bounds.upper)
    else:
        value = _accounted(dp, exact.fresh)
        if value <= target:
            return
        shown = f"{value:.6g}"
    rule = (
        f"noise_multiplier {dp.noise_multiplier:g} gives epsilon {shown} at delta {dp.delta:.6g} after "
        f"{dp.rounds} rounds; the target is {target:g}."
    )
    raise ConfigProblems(
        Reason.CONFIG_INVALID,
        [Problem(f"{_NOT_PRIVATE} {rule}", _NOISE_PATH, str(dp.noise_multiplier), rule, _remedy(dp, target))],
    )


def dp_notes(settings: BuildSettings, dp: DpParameters) -> list[str]:
    """What a reader of `dp.epsilon` should know besides: what it assumes and what it would be without."""
    notes = []
    honest = unamplified_epsilon(releases(dp), dp.delta)
    if dp.rounds and honest > _NOTABLE * dp.epsilon:
        notes.append(
            f"epsilon {dp.epsilon:.4g} holds under participation {dp.participation.name}; without that assumption, for "
            f"a device in every one of {dp.rounds} rounds, it is {honest:.4g}"
        )
    if settings.evaluation is not None and (evaluated := evaluation_releases(dp, settings.evaluation.report_goal)):
        tasks = [*(releases(dp) if settings.trains else ()), *evaluated]
        they = "with the training they" if settings.trains else "they"
        epsilon_of_all = epsilon_bounds(tasks, dp.delta).upper
        notes.append(
            f"{dp.rounds} rounds of evaluation release noised metrics: {they} come to epsilon {epsilon_of_all:.4g}"
        )
    if text := over_selection_note(settings.config):
        notes.append(text)
    return notes


def privacy_claim(dp: DpParameters) -> learning_pb2.PrivacyClaim:
    """The promise as the plan carries it."""
    return learning_pb2.PrivacyClaim(
        participation=dp.participation.name,
        estimated_population=dp.population,
        minimum_separation=dp.minimum_separation,
        delta=dp.delta,
        epsilon=dp.epsilon,
        rounds=dp.rounds,
    )


def evaluation_claim(dp: DpParameters, report_goal: int) -> learning_pb2.PrivacyClaim:
    """The promise of an evaluation's plan: its noised metrics', epsilon 0 where they are exact and outside it."""
    claim = privacy_claim(dp)
    claim.minimum_separation = 0
    claim.epsilon = epsilon_bounds(evaluation_releases(dp, report_goal), dp.delta).upper
    return claim


def metric_noise(dp: DpParameters) -> learning_pb2.MetricNoise | None:
    """The bound and the noise of metric sums as the plan carries them; None where metrics are exact."""
    if not dp.metrics_noise_multiplier:
        return None
    return learning_pb2.MetricNoise(clip_norm=dp.metrics_clip_norm, noise_multiplier=dp.metrics_noise_multiplier)


def log_parameters(dp: DpParameters) -> None:
    """The line of the log that sums it up (spec/task-builder.md 3.1)."""
    logger.info(
        "DP Parameters: noise_multiplier=%s, dp_clip_norm=%s, dp_delta=%s, dp_epsilon=%s, num_training_rounds=%s, "
        "dp_aggregator_type=%s, participation=%s",
        *(dp.noise_multiplier, dp.clip_norm, dp.delta, dp.epsilon, dp.rounds, _Dp.Enum.Name(dp.type)),
        dp.participation.name,
    )


def _calibration_key(dp: DpParameters) -> tuple[str, tuple[object, ...]]:
    rounds = replace(planned(dp), noise_multiplier=0.0)
    return rounds.kind, (rounds, dp.assumption, dp.delta)


def _calibrated(dp: DpParameters, target: float) -> float:
    with announced("The calibration of the noise multiplier"):
        kind, arguments = _calibration_key(dp)
        return calibrated(
            *(kind, arguments, target),
            calibrate=lambda: calibrated_noise(planned(dp), dp.assumption, target, dp.delta),
            epsilon=lambda noise: epsilon(releases(replace(dp, noise_multiplier=noise)), dp.delta),
        )


def _check_metrics(dp: DpParameters, target: float) -> None:
    """Refuses noise on metrics that alone is too little; no noise on the model would mend it."""
    if not dp.metrics_noise_multiplier or not dp.rounds:
        return
    alone = replace(dp, noise_multiplier=math.inf)
    spent = _accounted(dp, lambda: epsilon(releases(alone), dp.delta))
    if spent < target:
        return
    rule = (
        f"metrics_noise_multiplier {dp.metrics_noise_multiplier:g} alone gives epsilon {spent:.6g} at delta "
        f"{dp.delta:.6g} after {dp.rounds} rounds; the target is {target:g}, and the model needs a part of it."
    )
    found = problem(
        *("metrics_noise_multiplier", dp.metrics_noise_multiplier, "differential_privacy", rule),
        "raise metrics_noise_multiplier, or leave it and metrics_clip_norm out to release metrics as they are",
    )
    raise ConfigProblems(Reason.CONFIG_INVALID, [found])


def _accounted(dp: DpParameters, work: Callable[[], T]) -> T:
    """Runs the accountant; whatever it raises, it speaks about these parameters."""
    try:
        return work()
    except (ConfigProblems, TimeoutError):
        raise
    except Exception as error:
        raise _not_accountable(dp, error) from error


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


def _interval(lower: float, upper: float) -> str:
    """Both limits in four digits, rounded outwards; one number where they agree in six."""
    if f"{lower:.6g}" == f"{upper:.6g}":
        return f"{lower:.6g}"
    low, high = (
        float(Context(prec=4, rounding=rounding).create_decimal(value))
        for value, rounding in ((lower, ROUND_FLOOR), (upper, ROUND_CEILING))
    )
    return f"above {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"


def _remedy(dp: DpParameters, target: float) -> str:
    advice = "leave noise_multiplier out to have it calibrated, or skip the check with skip_dp_check"
    try:
        passing = _passing_noise(dp, target)
    except Exception as error:
        # The refusal stands whether or not its advice can be computed.
        logger.warning("No noise multiplier was found for the target: %s", error)
        return advice
    if passing is None:
        return f"raise metrics_noise_multiplier, whose epsilon alone exceeds the target, or {advice}"
    shown = _advised(passing)
    if is_adaptive(dp.type) and adaptive_noise_problem(shown, dp.report_goal) is not None:
        return f"raise report_goal above {10 * shown:.6g} and set noise_multiplier to {shown:.6g} or more"
    return f"set noise_multiplier to {shown:.6g} or more, {advice}"


def _passing_noise(dp: DpParameters, target: float) -> float | None:
    """A noise multiplier, a little above the smallest, whose bounds pass; None if there is none."""

    def upper(noise: float) -> float:
        return parts_upper(parts_of(releases(replace(dp, noise_multiplier=noise))), dp.delta)

    if dp.metrics_noise_multiplier and upper(math.inf) > target:
        return None
    # Epsilon falls like a power of the noise, nearly: the chord of the logarithms soon hits its root.
    low, high = dp.noise_multiplier, math.inf
    last, noise = (low, upper(low)), low * 2
    while True:
        found = upper(noise)
        low, high = (noise, high) if found > target else (low, noise)
        if found <= target and (found >= target * (1 - _NEAR) or high - low < 2 * _ADVISED):
            return noise
        # Rounded up, so that what is read off the message passes.
        guess = _advised(_on_chord(last, (noise, found), target))
        last = (noise, found)
        noise = guess if low < guess < high else 2 * low if math.isinf(high) else math.sqrt(low * high)


def _advised(noise: float) -> float:
    """Up to the unit in which noise is advised, unless it is there already."""
    return noise if math.isnan(noise) else round(math.ceil(round(noise / _ADVISED, 6)) * _ADVISED, 4)


def _on_chord(first: tuple[float, float], second: tuple[float, float], goal: float) -> float:
    """Where the power law through two points (noise, epsilon) is `goal`; NaN where none passes through them."""
    if not 0 < second[1] < math.inf or not 0 < first[1] < math.inf or first[1] == second[1]:
        return math.nan
    exponent = math.log(second[0] / first[0]) / math.log(second[1] / first[1])
    return second[0] * math.exp(min(1.0, max(-1.0, exponent * math.log(goal / second[1]))))


def _check_range(dp: DpParameters) -> None:
    for key, value in (
        ("clip_norm", dp.clip_norm),
        ("noise_multiplier", dp.noise_multiplier * dp.clip_norm),
        ("metrics_clip_norm", dp.metrics_clip_norm),
        ("metrics_noise_multiplier", dp.metrics_noise_multiplier * dp.metrics_clip_norm),
    ):
        if value > _MAX_FLOAT32 or 0 < value < _MIN_FLOAT32:
            detail = f"{key} is out of the range of a plan's 32-bit numbers."
            found = problem(key, value, "differential_privacy", detail, "choose clip norm and noise near 1")
            raise ConfigProblems(Reason.CONFIG_INVALID, [found])
