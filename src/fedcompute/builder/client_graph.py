"""The client graph: checkpoint and examples in, update file out (spec/artifacts.md 4, 16.4).

Everything with a name on the wire comes from the LearningProcess, so that device and server cannot disagree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from fedcompute.builder.client_optimizers import ClientOptimizer
from fedcompute.builder.client_work import ALGORITHMS, MetricSpec, Tensors, Weights, Work, evaluation
from fedcompute.builder.example_source import batched_examples, example_format
from fedcompute.learning.specification import state_specs
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2

TOKEN_NAME = "data_token"
INPUT_NAME = "input_filepath"
OUTPUT_NAME = "output_filepath"
TARGET_NAME = "save_client_update_tensors"

_UpdateLeaf = learning_pb2.UpdateLeaf


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
        weights = Weights(
            tuple(received[spec.name] for spec in process.trainable),
            tuple(received[spec.name] for spec in process.non_trainable),
        )
        work = Work(model, _metric_specs(process), settings.optimizer, settings.learning_rate)
        evaluating = process.kind == learning_pb2.LearningProcess.EVALUATION
        result = (evaluation if evaluating else ALGORITHMS[process.algorithm])(work, weights, batches)
        deltas = result.deltas
        if not evaluating:
            deltas = POSTPROCESSORS[process.WhichOneof("aggregator")](deltas, _extras(process, received))
        _save(process, output_path, deltas, result.metrics)
    return graph.as_graph_def()


def _plain(deltas: Tensors, extras: Sequence[tf.Tensor]) -> Tensors:
    return deltas


def _clipped(deltas: Tensors, extras: Sequence[tf.Tensor]) -> Tensors:
    """Scales the whole update to an L2 norm of at most the broadcast clip norm.

    Formal guarantees: none that the server relies on; float32 arithmetic may exceed the norm by about 1e-6 relative,
    and a device may run anything. The server clips again before it adds (spec/artifacts.md 9, consequence 4).
    """
    (clip_norm,) = extras
    clipped, _ = tf.clip_by_global_norm(deltas, clip_norm)
    return tuple(clipped)


# Aggregator of the process -> what it asks of the device. `extras` are the broadcast leaves beside the model.
POSTPROCESSORS: Mapping[str, Callable[[Tensors, Sequence[tf.Tensor]], Tensors]] = {
    "uniform_mean": _plain,
    "fixed_gaussian": _clipped,
}


def _restore(process: learning_pb2.LearningProcess, path: tf.Tensor) -> dict[str, tf.Tensor]:
    """State leaf name -> received tensor, for every broadcast leaf."""
    specs = {spec.name: spec for spec in state_specs(process)}
    received = {}
    for leaf in process.broadcasts:
        spec = specs[leaf.state_name]
        (tensor,) = tf.raw_ops.RestoreV2(
            prefix=path, tensor_names=[leaf.client_name], shape_and_slices=[""], dtypes=[tf.as_dtype(spec.dtype)]
        )
        # RestoreV2 knows no shapes, and gradients and the converter need them.
        tensor.set_shape(spec.shape)
        received[leaf.state_name] = tensor
    return received


def _extras(process: learning_pb2.LearningProcess, received: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
    model_leaves = {spec.name for spec in (*process.trainable, *process.non_trainable)}
    return [received[leaf.state_name] for leaf in process.broadcasts if leaf.state_name not in model_leaves]


def _metric_specs(process: learning_pb2.LearningProcess) -> list[MetricSpec]:
    leaves = {leaf.spec.name: leaf.spec for leaf in process.updates}

    def spec(name: str) -> tf.TensorSpec:
        return tf.TensorSpec([dim.size for dim in leaves[name].shape.dim], tf.as_dtype(leaves[name].dtype))

    # Released metrics without update leaves, such as update_non_finite, are the server's own.
    return [MetricSpec(m.name, tuple(map(spec, m.update_names))) for m in process.metrics if m.update_names]


def _save(process: learning_pb2.LearningProcess, path: tf.Tensor, deltas: Tensors, metrics: Sequence[Tensors]) -> None:
    by_name = {
        name: tensor
        for metric, state in zip([m for m in process.metrics if m.update_names], metrics, strict=True)
        for name, tensor in zip(metric.update_names, state, strict=True)
    }
    remaining = iter(deltas)
    for leaf in process.updates:
        if leaf.role == _UpdateLeaf.DELTA:
            by_name[leaf.spec.name] = next(remaining)
        elif leaf.role == _UpdateLeaf.COUNT:
            by_name[leaf.spec.name] = tf.constant(1, tf.int32)
    names = [leaf.spec.name for leaf in process.updates]
    tf.raw_ops.SaveSlices(
        filename=path,
        tensor_names=names,
        shapes_and_slices=[""] * len(names),
        data=[by_name[name] for name in names],
        name=TARGET_NAME,
    )
