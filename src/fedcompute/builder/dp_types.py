"""The kinds of DP aggregation: where the clip norm stands, what a plan says, what is released (spec 3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedcompute.learning.specification import AggregatorSettings
from fedcompute.privacy.adaptive import LEARNING_RATE, TARGET_QUANTILE
from fedcompute.privacy.composition import TaskReleases
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.planned import RESTART_OFFSET, RESTART_PERIOD, PlannedRounds, planned_rounds
from fedcompute.protos import learning_pb2, task_builder_pb2

_Dp = task_builder_pb2.DpAggregator
_DEFAULT_INITIAL_CLIP_NORM = 0.1
_ZEROING_FACTOR = 100
# More bands gain little, and each is one more copy of the model in the server's state, in 64 bits.
_MAX_BANDS = 64
# A server's default limit of a checkpoint, uncompressed.
CHECKPOINT_BYTES = 512 << 20
_MAX_BANDS_BYTES = 128 << 20


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
    participation: Participation = Participation.POISSON
    minimum_separation: int = 0  # rounds; 0 and 1: none
    metrics_clip_norm: float = 0.0  # L2, units of the metric sums; 0: metrics are exact
    metrics_noise_multiplier: float = 0.0
    bands: int = 1  # of BANDED_MF

    @property
    def assumption(self) -> Assumption:
        """Who is assumed to take part when."""
        return Assumption(self.participation, self.population, self.report_goal, self.minimum_separation)


@dataclass(frozen=True)
class DpType:
    """A kind of DP aggregation: where its clip norm stands, what the plan says of it, what its rounds release.

    `mechanism`: its name in `privacy.planned`.
    """

    clip_norm: Callable[[task_builder_pb2.DifferentialPrivacy], float]
    aggregator: Callable[[DpParameters], AggregatorSettings]
    mechanism: str


def planned(dp: DpParameters) -> PlannedRounds:
    """What the rounds of a build will release."""
    return planned_rounds(
        DP_TYPES[dp.type].mechanism,
        dp.noise_multiplier,
        dp.rounds,
        report_goal=dp.report_goal,
        bands=dp.bands,
        metrics_noise_multiplier=dp.metrics_noise_multiplier,
    )


def releases(dp: DpParameters) -> list[TaskReleases]:
    """The same with who is assumed to take part, as accountants take it."""
    return [TaskReleases(planned(dp), dp.assumption)]


def evaluation_releases(dp: DpParameters, report_goal: int) -> list[TaskReleases]:
    """What the noised metrics of as many evaluation rounds release; nothing where metrics are exact.

    An evaluation has no eligibility policies: whatever is assumed otherwise, no device stays away from one round for
    having been in another.
    """
    if not dp.metrics_noise_multiplier:
        return []
    rounds = planned_rounds("fixed_gaussian", dp.metrics_noise_multiplier, dp.rounds, report_goal=report_goal)
    return [TaskReleases(rounds, replace(dp.assumption, report_goal=report_goal, minimum_separation=0))]


def bands_of(minimum_separation: int, rounds: int) -> int:
    """The bands of a factorization: as many as rounds lie between two participations, within reason."""
    return max(1, min(minimum_separation, rounds, _MAX_BANDS))


def tree_bytes(rounds: int, parameters: int) -> int:
    """What a server checkpoint holds at most, uncompressed, for a tree over so many rounds of such a model.

    Per level a node of 64 bits and the reference's leaf of 32, and as much for what was added so far.
    """
    return 12 * (rounds.bit_length() + 1) * parameters


def bands_in_memory(bands: int, parameters: int) -> int:
    """At most `bands`, so that the noise of the rounds before fits beside a model of so many numbers."""
    return max(1, min(bands, 1 + _MAX_BANDS_BYTES // (8 * max(1, parameters))))


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
        restart_period=RESTART_PERIOD,
        restart_offset=RESTART_OFFSET,
    )


def _banded(dp: DpParameters) -> learning_pb2.BandedMatrixFactorization:
    from fedcompute.privacy.banded import optimal_coefficients

    return learning_pb2.BandedMatrixFactorization(
        clip_norm=dp.clip_norm,
        noise_multiplier=dp.noise_multiplier,
        report_goal=dp.report_goal,
        coefficients=optimal_coefficients(max(1, dp.rounds), dp.bands),
    )


def _clip_norm(dp: task_builder_pb2.DifferentialPrivacy) -> float:
    return dp.clip_norm


def _initial_clip_norm(dp: task_builder_pb2.DifferentialPrivacy) -> float:
    return dp.init_clip_norm or _DEFAULT_INITIAL_CLIP_NORM


DP_TYPES: Mapping[int, DpType] = {
    _Dp.FIXED_GAUSSIAN: DpType(_clip_norm, _fixed_gaussian, "fixed_gaussian"),
    _Dp.ADAPTIVE_GAUSSIAN: DpType(_initial_clip_norm, _adaptive_gaussian, "adaptive_gaussian"),
    _Dp.TREE_AGGREGATION: DpType(_clip_norm, _tree, "tree_aggregation"),
    _Dp.ADAPTIVE_TREE: DpType(_initial_clip_norm, _adaptive_tree, "adaptive_tree"),
    _Dp.BANDED_MF: DpType(_clip_norm, _banded, "banded_mf"),
}
