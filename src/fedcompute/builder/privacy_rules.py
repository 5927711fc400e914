"""Rules and warnings on participation, noise and the privacy of metrics (spec/task-builder.md 3.3)."""

import math
from collections.abc import Mapping

from fedcompute.builder.problem import Problem
from fedcompute.builder.rules import Config, Rule, aggregation_size, problem
from fedcompute.privacy.participation import Participation
from fedcompute.privacy.planned import RESTART_OFFSET, RESTART_PERIOD
from fedcompute.protos import task_builder_pb2

_Dp = task_builder_pb2.DpAggregator
_TREE_TYPES = (_Dp.TREE_AGGREGATION, _Dp.ADAPTIVE_TREE)
_ENTITY = "differential_privacy"

# Beyond these the sums of a round, and the noise of a tree, leave the integers in which they are exact.
MAX_NOISE_MULTIPLIER = 2.0**18
MAX_TREE_NOISE = 2.0**27

_UNSAMPLED = (Participation.MIN_SEPARATION, Participation.NO_AMPLIFICATION)
PARTICIPATIONS: Mapping[int, tuple[Participation, ...]] = {
    _Dp.FIXED_GAUSSIAN: tuple(Participation),
    _Dp.ADAPTIVE_GAUSSIAN: tuple(Participation),
    _Dp.TREE_AGGREGATION: (Participation.POISSON, *_UNSAMPLED),
    _Dp.ADAPTIVE_TREE: (Participation.POISSON, *_UNSAMPLED),
    _Dp.BANDED_MF: _UNSAMPLED,
}
"""What a DP type can be accounted under; the first is what an unset participation means."""


def dp_type_of(config: Config) -> int:
    """The configured type of aggregation, or its default."""
    return config.differential_privacy.type or _Dp.FIXED_GAUSSIAN


def participation_of(config: Config) -> Participation:
    """The assumption of the promised epsilon, or its type's default; ValueError for a number that is none."""
    configured = config.differential_privacy.participation
    return Participation(configured) if configured else PARTICIPATIONS[dp_type_of(config)][0]


def tree_rounds(dp_type: int, rounds: int) -> int:
    """Rounds of the longest tree of noise that `rounds` rounds of a tree type make."""
    return min(rounds, RESTART_PERIOD) if dp_type == _Dp.ADAPTIVE_TREE else rounds


def noise_bound(dp_type: int, rounds: int) -> float:
    """The largest noise multiplier whose noise the arithmetic of a type holds, inclusive."""
    if dp_type not in _TREE_TYPES:
        return MAX_NOISE_MULTIPLIER
    leaves = 1 << max(0, tree_rounds(dp_type, rounds) - 1).bit_length()
    return min(MAX_NOISE_MULTIPLIER, math.nextafter(MAX_TREE_NOISE / leaves, 0))


def noise_problem(dp_type: int, noise_multiplier: float, rounds: int) -> Problem | None:
    """The problem of noise that a type's arithmetic cannot hold, given or calibrated; None if it can."""
    bound = noise_bound(dp_type, rounds)
    if noise_multiplier <= bound:
        return None
    detail = f"noise_multiplier must be at most {bound:.6g}, the most that the arithmetic of a round holds exactly."
    remedy = "set noise near 1: more than this drowns every model"
    if bound < MAX_NOISE_MULTIPLIER:
        detail = f"noise_multiplier must be below {bound:.6g}, 2**27 over the {rounds} rounds of a tree, rounded up."
        remedy = "lower the noise or num_max_training_rounds, or use FIXED_GAUSSIAN or BANDED_MF"
    return problem("noise_multiplier", noise_multiplier, _ENTITY, detail, remedy)


def _dp(config: Config) -> task_builder_pb2.DifferentialPrivacy:
    return config.differential_privacy


def _rounds(config: Config) -> int:
    return config.policies.model_release_policy.num_max_training_rounds


def _separation(config: Config) -> int:
    return config.policies.min_separation_policy.minimum_separation


def _names(participations: tuple[Participation, ...]) -> str:
    *first, last = (participation.name for participation in participations)
    return f"{', '.join(first)} or {last}"


def _shown(number: int) -> str:
    return Participation(number).name if _exists(number) else str(number)


def _exists(number: int) -> bool:
    return number in {member.value for member in Participation}


def _fitting(config: Config) -> tuple[Participation, ...]:
    # Another rule speaks of a type that does not exist.
    return PARTICIPATIONS.get(dp_type_of(config), tuple(Participation))


def _participation(config: Config) -> str:
    given = _dp(config).participation
    if not given:
        return ""
    if not _exists(given):
        return f"participation must be {_names(tuple(Participation))}."
    fitting = _fitting(config)
    if given in {member.value for member in fitting}:
        return ""
    name = _Dp.Enum.Name(dp_type_of(config))
    return f"{name} can be accounted for under {_names(fitting)}, not under {_shown(given)}."


def _participation_remedy(config: Config) -> str:
    fitting = _fitting(config)
    return f"set {_names(fitting)}, or leave it out for {fitting[0].name}"


def _noise(config: Config) -> str:
    noise = _dp(config).noise_multiplier
    # Another rule speaks of noise that is no number.
    found = noise_problem(dp_type_of(config), noise, _rounds(config)) if 0 < noise < math.inf else None
    return found.rule if found else ""


def _noise_remedy(config: Config) -> str:
    found = noise_problem(dp_type_of(config), _dp(config).noise_multiplier, _rounds(config))
    return found.remedy if found else ""


def _metric_pair(config: Config, key: str, other: str) -> str:
    value, second = getattr(_dp(config), key), getattr(_dp(config), other)
    if not 0 <= value < math.inf:
        return f"{key} must be a positive number, or be left out."
    if value == 0 and second > 0:
        return f"{key} is required and must be a positive number where {other} is set."
    return ""


def _metrics_clip_norm(config: Config) -> str:
    return _metric_pair(config, "metrics_clip_norm", "metrics_noise_multiplier")


def _metrics_noise(config: Config) -> str:
    found = _metric_pair(config, "metrics_noise_multiplier", "metrics_clip_norm")
    if not found and _dp(config).metrics_noise_multiplier > MAX_NOISE_MULTIPLIER:
        return f"metrics_noise_multiplier must be at most {MAX_NOISE_MULTIPLIER:.6g}."
    return found


PRIVACY_RULES: tuple[Rule, ...] = (
    Rule("participation", _ENTITY, lambda c: _shown(_dp(c).participation), _participation, _participation_remedy),
    Rule("noise_multiplier", _ENTITY, lambda c: _dp(c).noise_multiplier, _noise, _noise_remedy),
    Rule(
        "metrics_clip_norm",
        _ENTITY,
        lambda c: _dp(c).metrics_clip_norm,
        _metrics_clip_norm,
        lambda c: "set the largest L2 norm of one device's metric sums, such as its number of examples, or neither",
    ),
    Rule(
        "metrics_noise_multiplier",
        _ENTITY,
        lambda c: _dp(c).metrics_noise_multiplier,
        _metrics_noise,
        lambda c: "set the deviation of the metrics' noise in metrics_clip_norm, such as 5, or neither",
    ),
)
"""Further rows of the table; they see what its first rows see."""


def privacy_warnings(config: Config) -> list[str]:
    """What a valid configuration takes for granted and does not ensure."""
    if dp_type_of(config) not in PARTICIPATIONS:
        # Refused where types are looked up.
        return []
    claim, name = participation_of(config), _Dp.Enum.Name(dp_type_of(config))
    rounds, separation = _rounds(config), _separation(config)
    warnings = []
    if dp_type_of(config) in _TREE_TYPES and claim == Participation.POISSON:
        if separation < rounds:
            warnings.append(
                f"{name} is accounted for one contribution per device, but minimum_separation {separation} lets a "
                f"device take part more than once in {rounds} rounds; set minimum_separation to {rounds} or more, or "
                "participation to MIN_SEPARATION"
            )
        if dp_type_of(config) == _Dp.ADAPTIVE_TREE and rounds > RESTART_OFFSET:
            warnings.append(
                f"ADAPTIVE_TREE starts its tree anew after {RESTART_OFFSET} rounds; the epsilon of {rounds} rounds "
                "does not count the restarts"
            )
    if claim == Participation.MIN_SEPARATION and separation <= 1 < rounds:
        bands = "; its noise is not correlated between rounds" if name == "BANDED_MF" else ""
        warnings.append(
            f"participation MIN_SEPARATION with minimum_separation {separation} means that a device may take part in "
            f"every round{bands}; raise minimum_separation as far as the number of devices allows"
        )
    return warnings


def over_selection_note(config: Config) -> str:
    """What over-selection means for the privacy of a round; empty where no device is assigned beyond the goal."""
    runtime = config.federated_learning.learning_process.runtime_config
    goal, most = runtime.report_goal, aggregation_size(runtime.report_goal, runtime.over_selection_rate)
    if most <= goal:
        return ""
    note = f"up to {most} devices are assigned to a round, of which the first {goal} that report count"
    if participation_of(config) in (Participation.POISSON, Participation.FIXED_SIZE):
        note += "; that favours fast devices, and epsilon assumes a sample that favours none"
    return note
