from fedcompute.protos import tensorflow_pb2 as _tensorflow_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LearningProcess(_message.Message):
    __slots__ = ("version", "kind", "algorithm", "trainable", "non_trainable", "broadcasts", "updates", "metrics", "sgd", "adam", "uniform_mean", "fixed_gaussian", "weighted_mean", "adaptive_gaussian", "tree_aggregation", "adaptive_tree", "banded_mf", "privacy_claim", "metric_noise")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[LearningProcess.Kind]
        TRAINING: _ClassVar[LearningProcess.Kind]
        EVALUATION: _ClassVar[LearningProcess.Kind]
    KIND_UNSPECIFIED: LearningProcess.Kind
    TRAINING: LearningProcess.Kind
    EVALUATION: LearningProcess.Kind
    class Algorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ALGORITHM_UNSPECIFIED: _ClassVar[LearningProcess.Algorithm]
        FED_AVG: _ClassVar[LearningProcess.Algorithm]
        FED_SGD: _ClassVar[LearningProcess.Algorithm]
    ALGORITHM_UNSPECIFIED: LearningProcess.Algorithm
    FED_AVG: LearningProcess.Algorithm
    FED_SGD: LearningProcess.Algorithm
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    NON_TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    BROADCASTS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SGD_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_MEAN_FIELD_NUMBER: _ClassVar[int]
    FIXED_GAUSSIAN_FIELD_NUMBER: _ClassVar[int]
    WEIGHTED_MEAN_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_GAUSSIAN_FIELD_NUMBER: _ClassVar[int]
    TREE_AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_TREE_FIELD_NUMBER: _ClassVar[int]
    BANDED_MF_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_CLAIM_FIELD_NUMBER: _ClassVar[int]
    METRIC_NOISE_FIELD_NUMBER: _ClassVar[int]
    version: int
    kind: LearningProcess.Kind
    algorithm: LearningProcess.Algorithm
    trainable: _containers.RepeatedCompositeFieldContainer[_tensorflow_pb2.TensorSpecProto]
    non_trainable: _containers.RepeatedCompositeFieldContainer[_tensorflow_pb2.TensorSpecProto]
    broadcasts: _containers.RepeatedCompositeFieldContainer[BroadcastLeaf]
    updates: _containers.RepeatedCompositeFieldContainer[UpdateLeaf]
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    sgd: Sgd
    adam: Adam
    uniform_mean: UniformMean
    fixed_gaussian: FixedGaussian
    weighted_mean: WeightedMean
    adaptive_gaussian: AdaptiveGaussian
    tree_aggregation: TreeAggregation
    adaptive_tree: AdaptiveTree
    banded_mf: BandedMatrixFactorization
    privacy_claim: PrivacyClaim
    metric_noise: MetricNoise
    def __init__(self, version: _Optional[int] = ..., kind: _Optional[_Union[LearningProcess.Kind, str]] = ..., algorithm: _Optional[_Union[LearningProcess.Algorithm, str]] = ..., trainable: _Optional[_Iterable[_Union[_tensorflow_pb2.TensorSpecProto, _Mapping]]] = ..., non_trainable: _Optional[_Iterable[_Union[_tensorflow_pb2.TensorSpecProto, _Mapping]]] = ..., broadcasts: _Optional[_Iterable[_Union[BroadcastLeaf, _Mapping]]] = ..., updates: _Optional[_Iterable[_Union[UpdateLeaf, _Mapping]]] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., sgd: _Optional[_Union[Sgd, _Mapping]] = ..., adam: _Optional[_Union[Adam, _Mapping]] = ..., uniform_mean: _Optional[_Union[UniformMean, _Mapping]] = ..., fixed_gaussian: _Optional[_Union[FixedGaussian, _Mapping]] = ..., weighted_mean: _Optional[_Union[WeightedMean, _Mapping]] = ..., adaptive_gaussian: _Optional[_Union[AdaptiveGaussian, _Mapping]] = ..., tree_aggregation: _Optional[_Union[TreeAggregation, _Mapping]] = ..., adaptive_tree: _Optional[_Union[AdaptiveTree, _Mapping]] = ..., banded_mf: _Optional[_Union[BandedMatrixFactorization, _Mapping]] = ..., privacy_claim: _Optional[_Union[PrivacyClaim, _Mapping]] = ..., metric_noise: _Optional[_Union[MetricNoise, _Mapping]] = ...) -> None: ...

class PrivacyClaim(_message.Message):
    __slots__ = ("participation", "estimated_population", "minimum_separation", "delta", "epsilon", "rounds")
    class Participation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PARTICIPATION_UNSPECIFIED: _ClassVar[PrivacyClaim.Participation]
        POISSON: _ClassVar[PrivacyClaim.Participation]
        FIXED_SIZE: _ClassVar[PrivacyClaim.Participation]
        MIN_SEPARATION: _ClassVar[PrivacyClaim.Participation]
        NO_AMPLIFICATION: _ClassVar[PrivacyClaim.Participation]
    PARTICIPATION_UNSPECIFIED: PrivacyClaim.Participation
    POISSON: PrivacyClaim.Participation
    FIXED_SIZE: PrivacyClaim.Participation
    MIN_SEPARATION: PrivacyClaim.Participation
    NO_AMPLIFICATION: PrivacyClaim.Participation
    PARTICIPATION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_POPULATION_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_SEPARATION_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    participation: PrivacyClaim.Participation
    estimated_population: int
    minimum_separation: int
    delta: float
    epsilon: float
    rounds: int
    def __init__(self, participation: _Optional[_Union[PrivacyClaim.Participation, str]] = ..., estimated_population: _Optional[int] = ..., minimum_separation: _Optional[int] = ..., delta: _Optional[float] = ..., epsilon: _Optional[float] = ..., rounds: _Optional[int] = ...) -> None: ...

class MetricNoise(_message.Message):
    __slots__ = ("clip_norm", "noise_multiplier")
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    clip_norm: float
    noise_multiplier: float
    def __init__(self, clip_norm: _Optional[float] = ..., noise_multiplier: _Optional[float] = ...) -> None: ...

class BroadcastLeaf(_message.Message):
    __slots__ = ("client_name", "state_name", "constant")
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_NAME_FIELD_NUMBER: _ClassVar[int]
    CONSTANT_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    state_name: str
    constant: float
    def __init__(self, client_name: _Optional[str] = ..., state_name: _Optional[str] = ..., constant: _Optional[float] = ...) -> None: ...

class UpdateLeaf(_message.Message):
    __slots__ = ("spec", "role")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ROLE_UNSPECIFIED: _ClassVar[UpdateLeaf.Role]
        DELTA: _ClassVar[UpdateLeaf.Role]
        METRIC: _ClassVar[UpdateLeaf.Role]
        COUNT: _ClassVar[UpdateLeaf.Role]
        WEIGHT: _ClassVar[UpdateLeaf.Role]
        BELOW_ESTIMATE: _ClassVar[UpdateLeaf.Role]
        ZEROED: _ClassVar[UpdateLeaf.Role]
    ROLE_UNSPECIFIED: UpdateLeaf.Role
    DELTA: UpdateLeaf.Role
    METRIC: UpdateLeaf.Role
    COUNT: UpdateLeaf.Role
    WEIGHT: UpdateLeaf.Role
    BELOW_ESTIMATE: UpdateLeaf.Role
    ZEROED: UpdateLeaf.Role
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    spec: _tensorflow_pb2.TensorSpecProto
    role: UpdateLeaf.Role
    def __init__(self, spec: _Optional[_Union[_tensorflow_pb2.TensorSpecProto, _Mapping]] = ..., role: _Optional[_Union[UpdateLeaf.Role, str]] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "stat_name", "update_names")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STAT_NAME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_NAMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    stat_name: str
    update_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., stat_name: _Optional[str] = ..., update_names: _Optional[_Iterable[str]] = ...) -> None: ...

class Sgd(_message.Message):
    __slots__ = ("learning_rate",)
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    def __init__(self, learning_rate: _Optional[float] = ...) -> None: ...

class Adam(_message.Message):
    __slots__ = ("learning_rate", "beta_1", "beta_2", "epsilon")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA_1_FIELD_NUMBER: _ClassVar[int]
    BETA_2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta_1: float
    beta_2: float
    epsilon: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta_1: _Optional[float] = ..., beta_2: _Optional[float] = ..., epsilon: _Optional[float] = ...) -> None: ...

class UniformMean(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FixedGaussian(_message.Message):
    __slots__ = ("clip_norm", "noise_multiplier", "report_goal")
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    REPORT_GOAL_FIELD_NUMBER: _ClassVar[int]
    clip_norm: float
    noise_multiplier: float
    report_goal: int
    def __init__(self, clip_norm: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., report_goal: _Optional[int] = ...) -> None: ...

class WeightedMean(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdaptiveGaussian(_message.Message):
    __slots__ = ("initial_clip_norm", "noise_multiplier", "report_goal", "target_quantile", "learning_rate")
    INITIAL_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    REPORT_GOAL_FIELD_NUMBER: _ClassVar[int]
    TARGET_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    initial_clip_norm: float
    noise_multiplier: float
    report_goal: int
    target_quantile: float
    learning_rate: float
    def __init__(self, initial_clip_norm: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., report_goal: _Optional[int] = ..., target_quantile: _Optional[float] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class TreeAggregation(_message.Message):
    __slots__ = ("clip_norm", "noise_multiplier", "report_goal", "zeroing_norm")
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    REPORT_GOAL_FIELD_NUMBER: _ClassVar[int]
    ZEROING_NORM_FIELD_NUMBER: _ClassVar[int]
    clip_norm: float
    noise_multiplier: float
    report_goal: int
    zeroing_norm: float
    def __init__(self, clip_norm: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., report_goal: _Optional[int] = ..., zeroing_norm: _Optional[float] = ...) -> None: ...

class AdaptiveTree(_message.Message):
    __slots__ = ("initial_clip_norm", "noise_multiplier", "report_goal", "zeroing_norm", "target_quantile", "learning_rate", "restart_period", "restart_offset")
    INITIAL_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    REPORT_GOAL_FIELD_NUMBER: _ClassVar[int]
    ZEROING_NORM_FIELD_NUMBER: _ClassVar[int]
    TARGET_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    RESTART_PERIOD_FIELD_NUMBER: _ClassVar[int]
    RESTART_OFFSET_FIELD_NUMBER: _ClassVar[int]
    initial_clip_norm: float
    noise_multiplier: float
    report_goal: int
    zeroing_norm: float
    target_quantile: float
    learning_rate: float
    restart_period: int
    restart_offset: int
    def __init__(self, initial_clip_norm: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., report_goal: _Optional[int] = ..., zeroing_norm: _Optional[float] = ..., target_quantile: _Optional[float] = ..., learning_rate: _Optional[float] = ..., restart_period: _Optional[int] = ..., restart_offset: _Optional[int] = ...) -> None: ...

class BandedMatrixFactorization(_message.Message):
    __slots__ = ("clip_norm", "noise_multiplier", "report_goal", "coefficients")
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    REPORT_GOAL_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    clip_norm: float
    noise_multiplier: float
    report_goal: int
    coefficients: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, clip_norm: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., report_goal: _Optional[int] = ..., coefficients: _Optional[_Iterable[float]] = ...) -> None: ...

class PartialSum(_message.Message):
    __slots__ = ("version", "num_inputs", "plan_digest", "leaves")
    class Leaf(_message.Message):
        __slots__ = ("name", "shape", "lattice", "real", "lattice_step")
        NAME_FIELD_NUMBER: _ClassVar[int]
        SHAPE_FIELD_NUMBER: _ClassVar[int]
        LATTICE_FIELD_NUMBER: _ClassVar[int]
        REAL_FIELD_NUMBER: _ClassVar[int]
        LATTICE_STEP_FIELD_NUMBER: _ClassVar[int]
        name: str
        shape: _containers.RepeatedScalarFieldContainer[int]
        lattice: bytes
        real: bytes
        lattice_step: float
        def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., lattice: _Optional[bytes] = ..., real: _Optional[bytes] = ..., lattice_step: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_INPUTS_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    version: int
    num_inputs: int
    plan_digest: bytes
    leaves: _containers.RepeatedCompositeFieldContainer[PartialSum.Leaf]
    def __init__(self, version: _Optional[int] = ..., num_inputs: _Optional[int] = ..., plan_digest: _Optional[bytes] = ..., leaves: _Optional[_Iterable[_Union[PartialSum.Leaf, _Mapping]]] = ...) -> None: ...
