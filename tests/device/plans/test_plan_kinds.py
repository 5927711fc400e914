"""Every kind of plan of our builder: the flatbuffer, as a device runs it, against TensorFlow on its client graph.

Differences are at most 1e-6: absolute for what is learned, relative for sums of metrics.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.builder.build import build_task_group
from fedcompute.builder.client_graph import TARGET_NAME, ClientSettings, client_graph
from fedcompute.builder.client_optimizers import CLIENT_OPTIMIZERS
from fedcompute.builder.config import read_config
from fedcompute.device.developer.examples import training_example
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.learning.metrics import METRICS
from fedcompute.learning.process import client_checkpoint
from fedcompute.models.functional_model import FunctionalModel, functional_model_from_keras
from fedcompute.models.saved_model import load_functional_model, save_functional_model
from fedcompute.models.zoo import create_original_fedavg_cnn_model, sparse_cross_entropy
from fedcompute.protos import learning_pb2, plan_pb2, task_builder_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

BATCH, RATE, CLIP = 3, 0.2, 0.05
RNG = np.random.default_rng(11)
LABEL = tf.TensorSpec([None, 1], tf.int64)
WORDS = ("ash", "birch", "cedar", "", "Ü", "x" * 40)
CONFIG = """
mode: TRAINING_AND_EVAL
population_name: "kinds"
label_name: "label"
policies {{ model_release_policy {{ num_max_training_rounds: 4 }} dataset_policy {{ batch_size: {batch} }} }}
federated_learning {{
  learning_process {{
    type: {algorithm} client_optimizer: {optimizer} client_learning_rate: {rate}
    runtime_config {{ report_goal: 10 }} {metrics}
  }}
  evaluation {{ source_training_task_id: 1 report_goal: 1 }}
}}
differential_privacy {{
  type: {dp} noise_multiplier: 0.5 clip_norm: {clip} init_clip_norm: {clip} estimated_population: 100
}}
"""


@dataclass(frozen=True)
class Kind:
    """A configuration; `dp` None leaves out the DP aggregator."""

    model: str = "dense"
    algorithm: str = "FED_AVG"
    optimizer: str = "SGD"
    dp: str | None = None
    metrics: tuple[str, ...] = ("sparse_categorical_accuracy",)


PER_CLASS = tuple(name for name in METRICS if name.startswith("sparse_") or name == "mean")
ALGORITHMS = ("FED_AVG", "FED_SGD")
DP_TYPES = ("FIXED_GAUSSIAN", "ADAPTIVE_GAUSSIAN", "TREE_AGGREGATION", "ADAPTIVE_TREE", "BANDED_MF")
KINDS = {
    **{f"{algorithm}, {dp}": Kind(algorithm=algorithm, dp=dp) for algorithm in ALGORITHMS for dp in (None, *DP_TYPES)},
    "FED_AVG, Adam": Kind(optimizer="ADAM"),
    "metrics of classes": Kind(metrics=PER_CLASS),
    "metrics of outputs": Kind("yes or no", metrics=tuple(name for name in METRICS if name not in PER_CLASS)),
    "convolutions": Kind("convolutions", dp="FIXED_GAUSSIAN"),
    "string features": Kind("strings", optimizer="ADAM"),
    "hashed features": Kind("hashes", dp="FIXED_GAUSSIAN"),
}


def numbers(*shape):
    return (0.3 * RNG.normal(size=shape)).astype(np.float32)


def picked_loss(output, label):
    hot = tf.one_hot(tf.reshape(label, [-1]), 3)
    return -tf.reduce_mean(tf.reduce_sum(hot * tf.nn.log_softmax(output), axis=-1))


def dense_model():
    def predict(weights, x, training):
        kernel, bias, last = weights[0]
        return tf.nn.relu(x @ kernel + bias) @ last + weights[1][0]

    x_spec = tf.TensorSpec([None, 5], tf.float32)
    return FunctionalModel(
        (numbers(5, 4), numbers(4), numbers(4, 3)), (numbers(3),), x_spec, LABEL, predict, picked_loss
    )


def yes_or_no_model():
    def predict(weights, x, training):
        return tf.sigmoid(x @ weights[0][0])

    def loss(output, label):
        truth = tf.cast(label, tf.float32)
        return -tf.reduce_mean(tf.math.log(truth * output + (1 - truth) * (1 - output)))

    return FunctionalModel((numbers(5, 1),), (), tf.TensorSpec([None, 5], tf.float32), LABEL, predict, loss)


def convolutional_model():
    tf.keras.utils.set_random_seed(4)
    keras_model = create_original_fedavg_cnn_model(only_digits=False)
    return functional_model_from_keras(keras_model, sparse_cross_entropy, (tf.TensorSpec([None, 28, 28, 1]), LABEL))


def string_model():
    def predict(weights, x, training):
        same = tf.cast(tf.equal(x["word"], list(WORDS)), tf.float32)
        return tf.concat([same, x["size"]], 1) @ weights[0][0]

    x_spec = OrderedDict(word=tf.TensorSpec([None, 1], tf.string), size=tf.TensorSpec([None, 2], tf.float32))
    return FunctionalModel((numbers(len(WORDS) + 2, 3),), (), x_spec, LABEL, predict, picked_loss)


def hashing_model():
    def predict(weights, x, training):
        table, last = weights[0]
        texts = (x["word"], tf.strings.as_string(x["number"]))
        buckets = tf.concat([tf.strings.to_hash_bucket_fast(text, 8) for text in texts], 1)
        return tf.reshape(tf.gather(table, buckets), [-1, 6]) @ last

    x_spec = OrderedDict(word=tf.TensorSpec([None, 1], tf.string), number=tf.TensorSpec([None, 1], tf.int32))
    return FunctionalModel((numbers(8, 3), numbers(6, 3)), (), x_spec, LABEL, predict, picked_loss)


# Model, and an example by its number; number 0 is out of all proportion, so that its update is clipped or zeroed.
MODELS = {
    "dense": (dense_model, lambda i: {"x": RNG.normal(size=5) * (1 if i else 1000), "y": i % 3}),
    "yes or no": (yes_or_no_model, lambda i: {"x": RNG.normal(size=5), "y": i % 2}),
    "convolutions": (convolutional_model, lambda i: {"x": RNG.random(784), "y": 7 * i % 62}),
    "strings": (string_model, lambda i: {"word": WORDS[i % 6], "size": RNG.normal(size=2), "label": i % 3}),
    "hashes": (hashing_model, lambda i: {"word": WORDS[i % 6], "number": 3 - i, "label": i % 3}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: the directory of a saved model."""
    made = {}

    def save(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model") / "saved_model"
            save_functional_model(MODELS[name][0](), made[name])
        return made[name]

    return save


@pytest.fixture(scope="module")
def runner():
    runner = PlanRunner()
    yield runner
    runner.close()


def build(saved, kind):
    text = CONFIG.format(
        batch=BATCH,
        rate=RATE,
        clip=CLIP,
        algorithm=kind.algorithm,
        optimizer=kind.optimizer,
        dp=kind.dp or "FIXED_GAUSSIAN",
        metrics=" ".join(f'metrics {{ name: "{name}" }}' for name in kind.metrics),
    )
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True, skip_dp_aggregator=kind.dp is None)
    return build_task_group(saved(kind.model), read_config(text.encode()).config, flags)


def run_by_tensorflow(graph_def, checkpoint, examples, directory):
    """The update of a client graph with a data set of TensorFlow in the place of the device's examples."""
    rest = tf.compat.v1.GraphDef()
    rest.CopyFrom(graph_def)
    (source,) = [node for node in rest.node if node.op == "ExternalDataset"]
    rest.node.remove(source)
    paths = {name: str(directory / name) for name in ("input_filepath", "output_filepath")}
    Path(paths["input_filepath"]).write_bytes(checkpoint)
    with tf.Graph().as_default() as graph:
        data = tf.data.Dataset.from_tensor_slices(tf.constant(examples, tf.string, [len(examples)]))
        tf.import_graph_def(rest, {f"{source.name}:0": data._variant_tensor}, name="")
    with tf.compat.v1.Session(graph=graph) as session:
        session.run(TARGET_NAME, {f"{name}:0": path for name, path in paths.items()})
    return read_checkpoint(Path(paths["output_filepath"]).read_bytes())


def largest_difference(found, expected, sums):
    """Of floating leaves: relative for the leaves called `sums`, absolute for others. Integers must be equal."""
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, leaf in expected.items():
        assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype)
        if leaf.dtype.kind != "f":
            assert (found[name] == leaf).all()
            continue
        scale = np.maximum(1.0, np.abs(leaf)) if name in sums else 1.0
        largest = max(largest, float(np.max(np.abs(found[name].astype(np.float64) - leaf) / scale, initial=0.0)))
    return largest


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print(f"\n{'plan':28} {'training':>9} {'evaluation':>10}")
    for name, training, evaluation in rows:
        print(f"{name:28} {training:9.1e} {evaluation:10.1e}")


@pytest.mark.parametrize("name", KINDS)
def test_a_device_computes_what_tensorflow_computes_from_the_graph(name, saved, runner, table, tmp_path):
    kind = KINDS[name]
    group = build(saved, kind)
    model, state = load_functional_model(saved(kind.model)), read_checkpoint(group.training.checkpoint)
    optimizer = CLIENT_OPTIMIZERS[task_builder_pb2.Optimizer.Enum.Value(kind.optimizer)]
    settings = ClientSettings("label", BATCH, -1, optimizer, RATE, b"")
    examples = [training_example(MODELS[kind.model][1](i)) for i in range(8)]
    differences = []
    for built in (group.training, group.evaluation):
        process = plan_pb2.Plan.FromString(built.plan).learning_process
        checkpoint = write_checkpoint(client_checkpoint(process, state))
        plan = plan_pb2.ClientOnlyPlan.FromString(built.client_plan)
        sums = {leaf for metric in process.metrics for leaf in metric.update_names}
        learned, zeroed = (
            [leaf.spec.name for leaf in process.updates if leaf.role == role]
            for role in (learning_pb2.UpdateLeaf.DELTA, learning_pb2.UpdateLeaf.ZEROED)
        )
        graph = client_graph(model, process, settings)
        differences.append(0.0)
        for used in (examples if kind.dp else examples[3:], examples[1:], examples[1:3], []):
            found = read_checkpoint(runner.run(plan, checkpoint, used).update)
            expected = run_by_tensorflow(graph, checkpoint, used, tmp_path)
            differences[-1] = max(differences[-1], largest_difference(found, expected, sums))
            assert any(found[leaf].any() for leaf in sums) == bool(used)
            outsized = used is examples and bool(zeroed)
            assert all(found[leaf] == outsized for leaf in zeroed)
            assert any(found[leaf].any() for leaf in learned) == bool(used and learned and not outsized)
    table.append((name, *differences))
    assert max(differences) <= 1e-6
