"""The client graph: checkpoint and examples in, update file out (spec/artifacts.md 4, 16.4).

Everything with a name on the wire comes from the LearningProcess, so that device and server cannot disagree.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from fedcompute.builder.client_optimizers import ClientOptimizer
from fedcompute.builder.client_reports import POSTPROCESSORS, Sent
from fedcompute.builder.client_work import ALGORITHMS, Batches, MetricSpec, Tensors, Weights, Work, evaluation
from fedcompute.builder.example_source import batched_examples, example_format
from fedcompute.learning.specification import state_specs
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2
from fedcompute.tensors.tree import LeafSpec

TOKEN_NAME = "data_token"
INPUT_NAME = "input_filepath"
OUTPUT_NAME = "output_filepath"
TARGET_NAME = "save_client_update_tensors"

# A broadcast that is no state: a float32 scalar.
_CONSTANT = LeafSpec("", (), np.dtype(np.float32))


@dataclass(frozen=True)
class ClientSettings:
    """What the configuration says about the work on one device."""

    label_name: str
    batch_size: int
    max_batches: int  # -1: all
    optimizer: ClientOptimizer
    learning_rate: float
    selector: bytes  # serialized ExampleSelector, possibly empty


def client_graph(
    model: FunctionalModel, process: learning_pb2.LearningProcess, settings: ClientSettings
) -> tf.compat.v1.GraphDef:
    """The graph that a device runs for `process`: feeds the three placeholders, runs TARGET_NAME, has no outputs.

    Raises ArtifactInvalid (MODEL_UNSUPPORTED) for a model whose examples cannot be read.
    """
    layout = example_format(model.x_spec, model.y_spec, settings.label_name)
    graph = tf.Graph()
    with graph.as_default():
        token, input_path, output_path = (
            tf.compat.v1.placeholder(tf.string, [], name=name) for name in (TOKEN_NAME, INPUT_NAME, OUTPUT_NAME)
        )
        received = _restore(process, input_path)
        batches = batched_examples(
            token, settings.selector, layout, batch_size=settings.batch_size, max_batches=settings.max_batches
        )
        update = client_update(process, model, settings, received, batches)
        _save(update, output_path)
    return graph.as_graph_def()


def client_update(
    process: learning_pb2.LearningProcess,
    model: FunctionalModel,
    settings: ClientSettings,
    received: Mapping[str, tf.Tensor],
    batches: Batches,
) -> dict[str, tf.Tensor]:
    """What a device makes of its batches: update leaf -> tensor, in the order of the update file.

    `received`: client leaf -> tensor, for every broadcast leaf, in their order.
    """
    weights = Weights(
        tuple(received[name] for name in _client_names(process, process.trainable)),
        tuple(received[name] for name in _client_names(process, process.non_trainable)),
    )
    work = Work(model, _metric_specs(process), settings.optimizer, settings.learning_rate)
    evaluating = process.kind == learning_pb2.LearningProcess.EVALUATION
    result = (evaluation if evaluating else ALGORITHMS[process.algorithm])(work, weights, batches)
    sent: Sent = {}
    if not evaluating:
        sent = POSTPROCESSORS[process.WhichOneof("aggregator")](result, _extras(process, received))
    return _by_leaf(process, sent, result.metrics)


def _restore(process: learning_pb2.LearningProcess, path: tf.Tensor) -> dict[str, tf.Tensor]:
    """Client leaf name -> received tensor, for every broadcast leaf."""
    specs = {spec.name: spec for spec in state_specs(process)}
    received = {}
    for leaf in process.broadcasts:
        spec = specs.get(leaf.state_name, _CONSTANT)
        (tensor,) = tf.raw_ops.RestoreV2(
            prefix=path, tensor_names=[leaf.client_name], shape_and_slices=[""], dtypes=[tf.as_dtype(spec.dtype)]
        )
        # RestoreV2 knows no shapes, and gradients and the converter need them.
        tensor.set_shape(spec.shape)
        received[leaf.client_name] = tensor
    return received


def _client_names(process: learning_pb2.LearningProcess, specs: Iterable[Any]) -> list[str]:
    told = {leaf.state_name: leaf.client_name for leaf in process.broadcasts}
    return [told[spec.name] for spec in specs]


def _extras(process: learning_pb2.LearningProcess, received: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
    """What devices are told beside the model, in the order of the client checkpoint."""
    model = {*_client_names(process, process.trainable), *_client_names(process, process.non_trainable)}
    return [tensor for name, tensor in received.items() if name not in model]


def _metric_specs(process: learning_pb2.LearningProcess) -> list[MetricSpec]:
    leaves = {leaf.spec.name: leaf.spec for leaf in process.updates}

    def spec(name: str) -> tf.TensorSpec:
        return tf.TensorSpec([dim.size for dim in leaves[name].shape.dim], tf.as_dtype(leaves[name].dtype))

    # Released metrics without update leaves, such as update_non_finite, are the server's own.
    return [MetricSpec(m.name, tuple(map(spec, m.update_names))) for m in process.metrics if m.update_names]


def _by_leaf(process: learning_pb2.LearningProcess, sent: Sent, metrics: Sequence[Tensors]) -> dict[str, tf.Tensor]:
    by_name = {
        name: tensor
        for metric, state in zip([m for m in process.metrics if m.update_names], metrics, strict=True)
        for name, tensor in zip(metric.update_names, state, strict=True)
    }
    remaining = {role: iter(tensors) for role, tensors in sent.items()}
    for leaf in process.updates:
        if leaf.role in remaining:
            by_name[leaf.spec.name] = next(remaining[leaf.role])
    return {leaf.spec.name: by_name[leaf.spec.name] for leaf in process.updates}


def _save(update: Mapping[str, tf.Tensor], path: tf.Tensor) -> None:
    tf.raw_ops.SaveSlices(
        filename=path,
        tensor_names=list(update),
        shapes_and_slices=[""] * len(update),
        data=list(update.values()),
        name=TARGET_NAME,
    )
