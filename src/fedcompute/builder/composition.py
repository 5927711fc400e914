"""The learning process of a configuration: what this builder offers, as tables (spec/task-builder.md 4)."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.builder.client_metrics import METRIC_UPDATES
from fedcompute.builder.client_optimizers import CLIENT_OPTIMIZERS, ClientOptimizer
from fedcompute.builder.validation import BuildSettings, supported
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.metrics import LOSS, METRICS
from fedcompute.learning.specification import AggregatorSettings, training_process
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2, task_builder_pb2
from fedcompute.tensors.tree import LeafSpec

_Algo = task_builder_pb2.LearningAlgo
_Optimizer = task_builder_pb2.Optimizer
_ServerOptimizer = learning_pb2.Sgd | learning_pb2.Adam


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of plans, and how it aggregates where no DP type does."""

    number: learning_pb2.LearningProcess.Algorithm
    plain: AggregatorSettings


ALGORITHMS: Mapping[int, Algorithm] = {
    _Algo.FED_AVG: Algorithm(learning_pb2.LearningProcess.FED_AVG, learning_pb2.UniformMean()),
    _Algo.FED_SGD: Algorithm(learning_pb2.LearningProcess.FED_SGD, learning_pb2.WeightedMean()),
}
SERVER_OPTIMIZERS: Mapping[int, Callable[[float], _ServerOptimizer]] = {
    _Optimizer.SGD: lambda rate: learning_pb2.Sgd(learning_rate=rate),
    _Optimizer.ADAM: lambda rate: learning_pb2.Adam(learning_rate=rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7),
}
# A metric needs both halves: its update on the device and its finalizer on the server.
ALLOWED_METRICS = tuple(name for name in METRICS if name in METRIC_UPDATES)
# A beginning that fits more names than this suggests nothing.
_MOST_SUGGESTIONS = 3


@dataclass(frozen=True)
class Choices:
    """The entries that a configuration selects."""

    algorithm: Algorithm
    client_optimizer: ClientOptimizer
    server_optimizer: _ServerOptimizer


@dataclass(frozen=True)
class MetricChoice:
    """Configured metric names, split by the allow-list; `warnings` names the nearest allowed name of each rejected."""

    accepted: tuple[str, ...]
    rejected: tuple[str, ...]
    warnings: tuple[str, ...]


def choose(settings: BuildSettings) -> Choices:
    """Looks up algorithm and optimizers; ConfigInvalid names the field whose value this builder does not offer."""
    entity = "learning_process"
    return Choices(
        supported(ALGORITHMS, _Algo.Enum, settings.algorithm, "type", entity),
        supported(CLIENT_OPTIMIZERS, _Optimizer.Enum, settings.client_optimizer, "client_optimizer", entity),
        supported(SERVER_OPTIMIZERS, _Optimizer.Enum, settings.server_optimizer, "server_optimizer", entity)(
            settings.server_learning_rate
        ),
    )


def choose_metrics(names: Sequence[str]) -> MetricChoice:
    """Splits configured names by the allow-list, in their order; of a name that comes twice the first counts.

    Rejected names do not fail a build; they are left out and reported. So is `loss`, which is measured in any case.
    """
    distinct = tuple(dict.fromkeys(names))
    rejected = tuple(name for name in distinct if name not in ALLOWED_METRICS)
    return MetricChoice(
        accepted=tuple(name for name in distinct if name in ALLOWED_METRICS),
        rejected=rejected,
        warnings=tuple(f"metric {name!r} is left out: {_nearest(name)}" for name in rejected),
    )


def compose(
    choices: Choices,
    model: FunctionalModel,
    aggregator: AggregatorSettings,
    metrics: Sequence[str],
    metric_noise: learning_pb2.MetricNoise | None = None,
) -> learning_pb2.LearningProcess:
    """The training process of a model, without a privacy claim.

    Raises ArtifactInvalid (MODEL_UNSUPPORTED) for weights it cannot train.
    """
    for index, weight in enumerate(model.trainable):
        if weight.dtype != np.float32:
            raise ArtifactInvalid(
                Reason.MODEL_UNSUPPORTED,
                f"trainable weight {index} is {weight.dtype}; only float32 weights are trained",
            )
    return training_process(
        algorithm=choices.algorithm.number,
        trainable=_specs(model.trainable),
        non_trainable=_specs(model.non_trainable),
        server_optimizer=choices.server_optimizer,
        aggregator=aggregator,
        metrics=metrics,
        metric_noise=metric_noise,
    )


def _specs(weights: Sequence[NDArray[Any]]) -> list[LeafSpec]:
    return [LeafSpec(str(index), tuple(weight.shape), weight.dtype) for index, weight in enumerate(weights)]


def _nearest(name: str) -> str:
    if name == LOSS.name:
        return "it is always measured and need not be named"
    wanted = name.strip().lower().replace(" ", "_").replace("-", "_")
    near = [m for m in ALLOWED_METRICS if wanted in (_plain(m), _initials(m)) or (wanted and m.startswith(wanted))]
    if not near:
        plain = {_plain(metric): metric for metric in ALLOWED_METRICS}
        near = [plain[close] for close in difflib.get_close_matches(wanted, plain, n=1, cutoff=0.5)]
    if not near or len(near) > _MOST_SUGGESTIONS:
        return f"allowed are {', '.join(ALLOWED_METRICS)}"
    return f"did you mean {' or '.join(map(repr, near))}?"


def _plain(metric: str) -> str:
    return metric.replace("-", "_")


def _initials(metric: str) -> str:
    """The usual short form: mse for mean_squared_error."""
    return "".join(word[0] for word in metric.split("_"))
