"""Learning processes as data: leaf names, state trees and initial states (spec/artifacts.md 3.2, 3.3, 9).

A builder describes a process here; devices' graphs, aggregation and updates all follow the description.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcompute.learning.aggregators import COUNT, DELTA, METRIC, ZEROED, Role
from fedcompute.learning.catalogue import aggregator_of
from fedcompute.learning.metrics import LOSS, definition
from fedcompute.learning.optimizers import OPTIMIZERS
from fedcompute.protos import learning_pb2, tensorflow_pb2
from fedcompute.tensors.tree import LeafSpec, Tensors, spec_from_proto, spec_to_proto

Process = learning_pb2.LearningProcess
ServerOptimizerSettings = learning_pb2.Sgd | learning_pb2.Adam
AggregatorSettings = (
    learning_pb2.UniformMean
    | learning_pb2.WeightedMean
    | learning_pb2.FixedGaussian
    | learning_pb2.AdaptiveGaussian
    | learning_pb2.TreeAggregation
    | learning_pb2.AdaptiveTree
    | learning_pb2.BandedMatrixFactorization
)

VERSION = 1
TRAINABLE = "server/global_model_weights/trainable"
NON_TRAINABLE = "server/global_model_weights/non_trainable"
FINALIZER = "server/finalizer"
# Release names: `server/<path>` as a key of the metrics file, `metrics/<path>` as a checkpoint leaf.
NON_FINITE_STAT = "server/finalizer/update_non_finite"
# Leaves of our own: accepted where they are, not asked for.
OWN = "server/fedcompute/"
# Their first dimension is the number of levels of a noise tree.
_GROWING = "/tree_state/level_buffer"
_SCALAR_DTYPES = {COUNT: np.int32, ZEROED: np.int32}


def training_process(
    *,
    algorithm: learning_pb2.LearningProcess.Algorithm,
    trainable: Sequence[LeafSpec],
    non_trainable: Sequence[LeafSpec],
    server_optimizer: ServerOptimizerSettings,
    aggregator: AggregatorSettings,
    metrics: Sequence[str],
    privacy_claim: learning_pb2.PrivacyClaim | None = None,
    metric_noise: learning_pb2.MetricNoise | None = None,
) -> Process:
    """The process of a training task; `trainable` and `non_trainable` give shapes and dtypes in model order.

    `metrics`: accepted names without `loss`, which is always added last. KeyError for a name without definition.
    `privacy_claim`: what the task promises, None without a DP aggregator. `metric_noise`: None where metrics are exact.
    """
    process = Process(
        version=VERSION,
        kind=Process.TRAINING,
        algorithm=algorithm,
        privacy_claim=privacy_claim,
        metric_noise=metric_noise,
    )
    process.trainable.extend(_named(TRAINABLE, trainable))
    process.non_trainable.extend(_named(NON_TRAINABLE, non_trainable))
    if isinstance(server_optimizer, learning_pb2.Adam):
        process.adam.CopyFrom(server_optimizer)
    else:
        process.sgd.CopyFrom(server_optimizer)
    (member,) = (
        field.name
        for field in Process.DESCRIPTOR.oneofs_by_name["aggregator"].fields
        if field.message_type is aggregator.DESCRIPTOR
    )
    getattr(process, member).CopyFrom(aggregator)
    # An empty message copied is a member still unset.
    getattr(process, member).SetInParent()
    rules = aggregator_of(process)
    for part, leaves in (("trainable", process.trainable), ("non_trainable", process.non_trainable)):
        for index, leaf in enumerate(leaves):
            process.broadcasts.add(client_name=f"client/0/{part}/{index}", state_name=leaf.name)
    for client, source in rules.told:
        if callable(source):
            process.broadcasts.add(client_name=f"client/{client}", constant=source(process))
        else:
            process.broadcasts.add(client_name=f"client/{client}", state_name=f"server/{source}")
    for path, role in rules.layout:
        if role == METRIC:
            _add_metrics(process, metrics, f"update/{path}", "server/client_work/train")
        elif role == DELTA:
            for index, weight in enumerate(trainable):
                _add_update(process, LeafSpec(f"update/{path}/{index}", weight.shape, weight.dtype), role)
        else:
            dtype = np.dtype(_SCALAR_DTYPES.get(role, np.float32))
            _add_update(process, LeafSpec(f"update/{path}", (), dtype), role)
    return process


def evaluation_process(training: Process, metrics: Sequence[str]) -> Process:
    """The process of an evaluation task over the state of `training`, whose checkpoints it reads."""
    process = Process()
    process.CopyFrom(training)
    process.kind = Process.EVALUATION
    for field in ("broadcasts", "updates", "metrics"):
        process.ClearField(field)
    for part, leaves in (("0", process.trainable), ("1", process.non_trainable)):
        for index, leaf in enumerate(leaves):
            process.broadcasts.add(client_name=f"client/0/{part}/{index}", state_name=leaf.name)
    _add_metrics(process, metrics, "update/0", "server/eval")
    return process


def initial_state(
    process: Process,
    trainable: Sequence[NDArray[np.generic]],
    non_trainable: Sequence[NDArray[np.generic]],
) -> dict[str, NDArray[np.generic]]:
    """The server state before round 1, leaf name -> array, with the model's initial weights.

    Without noise: that of mechanisms whose noise outlives a round begins on the server, see `noise_state`.
    """
    optimizer = OPTIMIZERS[str(process.WhichOneof("server_optimizer"))]
    weights = [np.asarray(weight, np.float32) for weight in trainable]
    return {
        **{leaf.name: np.asarray(value) for leaf, value in zip(process.trainable, trainable, strict=True)},
        **{leaf.name: np.asarray(value) for leaf, value in zip(process.non_trainable, non_trainable, strict=True)},
        **_prefixed("server", aggregator_of(process).init(process)),
        **_prefixed(FINALIZER, optimizer.init(process, weights)),
    }


def state_specs(process: Process) -> list[LeafSpec]:
    """Name, shape and dtype of every leaf that a server state must have; -1 is a dimension that changes."""
    state = initial_state(
        process,
        [_zeros(spec_from_proto(leaf)) for leaf in process.trainable],
        [_zeros(spec_from_proto(leaf)) for leaf in process.non_trainable],
    )
    return [
        LeafSpec(name, (-1, *value.shape[1:]) if _GROWING in name else value.shape, value.dtype)
        for name, value in state.items()
        if not name.startswith(OWN)
    ]


def zero_state(process: Process) -> dict[str, NDArray[np.generic]]:
    """The state tree filled with zeros, empty strings and false: an evaluation task's initial checkpoint.

    A dimension that changes is 0.
    """
    return {spec.name: _zeros(spec) for spec in state_specs(process)}


def metric_leaf(stat_name: str) -> str:
    """The checkpoint leaf of a released metric: `metrics/<path>` for `server/<path>`."""
    return "metrics/" + stat_name.removeprefix("server/")


def _zeros(spec: LeafSpec) -> NDArray[np.generic]:
    shape = tuple(max(0, size) for size in spec.shape)
    return np.full(shape, b"", object) if spec.dtype == object else np.zeros(shape, spec.dtype)


def _named(prefix: str, leaves: Sequence[LeafSpec]) -> list[tensorflow_pb2.TensorSpecProto]:
    return [spec_to_proto(LeafSpec(f"{prefix}/{i}", leaf.shape, leaf.dtype)) for i, leaf in enumerate(leaves)]


def _prefixed(prefix: str, leaves: Tensors) -> Mapping[str, NDArray[np.generic]]:
    return {f"{prefix}/{name}": value for name, value in leaves.items()}


def _add_update(process: Process, spec: LeafSpec, role: Role) -> None:
    process.updates.add(spec=spec_to_proto(spec), role=role)


def _add_metrics(process: Process, names: Sequence[str], update_prefix: str, stat_prefix: str) -> None:
    for name in (*names, LOSS.name):
        metric = process.metrics.add(name=name, stat_name=f"{stat_prefix}/{name}")
        for leaf in definition(name).state:
            spec = LeafSpec(f"{update_prefix}/{name}/{leaf.name}", leaf.shape, leaf.dtype)
            _add_update(process, spec, METRIC)
            metric.update_names.append(spec.name)
