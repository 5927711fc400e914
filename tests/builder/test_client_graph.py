"""What the client graph computes, against plain arithmetic on the same data."""

from collections import OrderedDict

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.builder.client_graph import TARGET_NAME, ClientSettings, client_graph
from fedcompute.builder.client_optimizers import SGD
from fedcompute.builder.tflite import prune
from fedcompute.errors import ArtifactInvalid
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import evaluation_process, initial_state, training_process
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.models.saved_model import load_functional_model
from fedcompute.protos import learning_pb2
from fedcompute.tensors.tree import LeafSpec

METRICS = ("sparse_categorical_accuracy",)
RATE = 0.2


def process_of(model, clip_norm=None, metrics=METRICS):
    aggregator = (
        learning_pb2.UniformMean()
        if clip_norm is None
        else learning_pb2.FixedGaussian(clip_norm=clip_norm, noise_multiplier=1, report_goal=2)
    )
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec(str(i), w.shape, w.dtype) for i, w in enumerate(model.trainable)],
        non_trainable=[LeafSpec(str(i), w.shape, w.dtype) for i, w in enumerate(model.non_trainable)],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=aggregator,
        metrics=metrics,
    )


def settings(batch_size=3, max_batches=-1, label_name="", learning_rate=RATE):
    return ClientSettings(label_name, batch_size, max_batches, SGD, learning_rate, b"")


def received(process, model):
    return client_checkpoint(process, initial_state(process, model.trainable, model.non_trainable))


@pytest.fixture
def model(dense_model):
    return load_functional_model(dense_model)


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    return rng.normal(size=(11, 6)).astype(np.float32), rng.integers(0, 3, (11, 1))


@pytest.fixture
def examples(data, example):
    return [example(x=x, y=y) for x, y in zip(*data, strict=True)]


def train_plainly(model, x, y, batch_size, max_batches=-1):
    """Deltas, correct predictions and the loss sum of one pass of plain stochastic gradient descent."""
    weights = [tf.constant(w) for w in model.trainable]
    correct, loss_sum, seen = 0, 0.0, 0
    starts = list(range(0, len(x), batch_size))[: max_batches if max_batches > 0 else None]
    for start in starts:
        batch_x, batch_y = x[start : start + batch_size], y[start : start + batch_size]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            output = model.predict_on_batch((weights, []), tf.constant(batch_x), training=True)
            loss = model.loss(output, tf.constant(batch_y))
        correct += int(np.sum(np.argmax(output.numpy(), -1) == batch_y[:, 0]))
        loss_sum += float(loss) * len(batch_x)
        seen += len(batch_x)
        weights = [w - RATE * g for w, g in zip(weights, tape.gradient(loss, weights), strict=True)]
    deltas = [before - after.numpy() for before, after in zip(model.trainable, weights, strict=True)]
    return deltas, correct, loss_sum, seen


@pytest.mark.parametrize(("batch_size", "max_batches"), [(3, -1), (4, 2), (20, -1)])
def test_training_equals_plain_gradient_descent(model, data, examples, run_graph, batch_size, max_batches):
    process = process_of(model)
    graph = client_graph(model, process, settings(batch_size, max_batches))
    update = run_graph(graph, received(process, model), examples)
    deltas, correct, loss_sum, seen = train_plainly(model, *data, batch_size, max_batches)
    assert list(update) == sorted(leaf.spec.name for leaf in process.updates)
    assert update["update/0"] == 1
    assert update["update/0"].dtype == np.int32
    for index, delta in enumerate(deltas):
        np.testing.assert_allclose(update[f"update/2/{index}"], delta, atol=1e-6)
    assert update["update/1/sparse_categorical_accuracy/0"] == correct
    assert update["update/1/sparse_categorical_accuracy/1"] == seen
    np.testing.assert_allclose(update["update/1/loss/0"], loss_sum, rtol=1e-5)
    assert update["update/1/loss/1"] == seen


def test_the_update_is_clipped_to_the_received_norm(model, data, examples, run_graph):
    clip_norm = 0.01
    process = process_of(model, clip_norm)
    update = run_graph(client_graph(model, process, settings()), received(process, model), examples)
    deltas, *_ = train_plainly(model, *data, 3)
    norm = np.sqrt(sum(np.sum(np.square(d, dtype=np.float64)) for d in deltas))
    assert norm > clip_norm
    for index, delta in enumerate(deltas):
        np.testing.assert_allclose(update[f"update/1/{index}"], delta * clip_norm / norm, atol=1e-7)


def test_an_update_that_is_not_finite_becomes_zero(model, examples, run_graph):
    process = process_of(model)
    graph = client_graph(model, process, settings(learning_rate=1e38))
    update = run_graph(graph, received(process, model), examples)
    assert all(not update[f"update/2/{index}"].any() for index in range(4))
    assert update["update/0"] == 1


def test_a_device_without_examples_sends_zeros(model, run_graph):
    process = process_of(model, 0.5)
    update = run_graph(client_graph(model, process, settings()), received(process, model), [])
    assert all(not leaf.any() for leaf in update.values())


def test_evaluation_measures_the_received_model(model, data, examples, run_graph):
    process = evaluation_process(process_of(model, 0.5), METRICS)
    update = run_graph(client_graph(model, process, settings()), received(process, model), examples)
    x, y = data
    output = model.predict_on_batch((model.trainable, ()), tf.constant(x), training=False)
    assert update["update/0/sparse_categorical_accuracy/0"] == np.sum(np.argmax(output.numpy(), -1) == y[:, 0])
    np.testing.assert_allclose(update["update/0/loss/0"], float(model.loss(output, tf.constant(y))) * len(x), rtol=1e-5)
    assert list(update) == sorted(leaf.spec.name for leaf in process.updates)


def test_pruning_keeps_only_what_the_update_needs(model, examples, run_graph):
    process = process_of(model)
    graph = client_graph(model, process, settings())
    with tf.Graph().as_default() as other:
        tf.import_graph_def(graph, name="")
        tf.constant(1, name="unused")
        pruned = prune(other.as_graph_def(), TARGET_NAME)
    assert "unused" not in {node.name for node in pruned.node}
    assert len(pruned.library.function) < len(graph.library.function)
    whole, part = (run_graph(g, received(process, model), examples) for g in (graph, pruned))
    assert all((whole[name] == part[name]).all() for name in whole)


def linear(x_spec, y_spec, predict) -> FunctionalModel:
    """A model with one weight [1] and a squared loss, for the forms of input."""

    def loss(output, label):
        return tf.reduce_mean(tf.square(output - tf.cast(label[:, 0], tf.float32)))

    return FunctionalModel((np.array([0.5], np.float32),), (), x_spec, y_spec, predict, loss)


def test_a_dictionary_comes_in_the_order_of_the_model_with_integers_cast(example, run_graph):
    seen = []

    def predict(weights, x, training):
        seen.append((list(x), x["b"].dtype, x["a"].shape.as_list()))
        return weights[0][0] * (tf.cast(x["b"][:, 0], tf.float32) + x["a"][:, 1])

    x_spec = OrderedDict(b=tf.TensorSpec([None, 1], tf.int32), a=tf.TensorSpec([None, 2], tf.float32))
    model = linear(x_spec, tf.TensorSpec([None, 1], tf.int32), predict)
    process = process_of(model, metrics=())
    graph = client_graph(model, process, settings(label_name="clicked"))
    one = example(a=np.array([9, 3], np.float32), b=np.array([4]), clicked=np.array([2]))
    update = run_graph(graph, received(process, model), [one])
    assert seen[0] == (["b", "a"], tf.int32, [None, 2])
    np.testing.assert_allclose(update["update/1/loss/0"], (0.5 * 7 - 2) ** 2)


def test_a_dictionary_of_one_feature_stays_a_dictionary():
    def predict(weights, x, training):
        assert list(x) == ["x"]
        return weights[0][0] * x["x"][:, 0]

    model = linear(OrderedDict(x=tf.TensorSpec([None, 1])), tf.TensorSpec([None, 1], tf.int64), predict)
    client_graph(model, process_of(model, metrics=()), settings(label_name="y"))


def test_a_missing_feature_fails_on_the_device(model, example, run_graph):
    process = process_of(model)
    with pytest.raises(tf.errors.InvalidArgumentError, match="x"):
        run_graph(client_graph(model, process, settings()), received(process, model), [example(y=np.array([1]))])


@pytest.mark.parametrize(
    ("x_spec", "label_name", "words"),
    [
        (OrderedDict(a=tf.TensorSpec([None, 1], tf.float64)), "y", "feature 'a' has type float64"),
        (OrderedDict(a=tf.TensorSpec([None, None])), "y", "feature 'a' has shape"),
        (OrderedDict(a=tf.SparseTensorSpec([None, 1])), "y", "feature 'a' is a SparseTensorSpec"),
        (OrderedDict(a=tf.TensorSpec([None, 1])), "", "Label name cannot be empty"),
        (OrderedDict(a=tf.TensorSpec([None, 1])), "a", "also the name of a feature"),
    ],
)
def test_an_input_that_no_example_can_hold_is_refused_by_name(x_spec, label_name, words):
    model = linear(x_spec, tf.TensorSpec([None, 1], tf.int64), None)
    with pytest.raises(ArtifactInvalid, match=words):
        client_graph(model, process_of(model, metrics=()), settings(label_name=label_name))


def test_non_trainable_weights_are_used_and_never_sent(example, run_graph):
    def predict(weights, x, training):
        return weights[0][0] * x[:, 0] + weights[1][0]

    model = FunctionalModel(
        (np.array([0.5], np.float32),),
        (np.array([10.0], np.float32),),
        tf.TensorSpec([None, 1]),
        tf.TensorSpec([None, 1], tf.int64),
        predict,
        lambda output, label: tf.reduce_mean(output),
    )
    process = process_of(model, metrics=())
    one = example(x=np.array([2], np.float32), y=np.array([0]))
    update = run_graph(client_graph(model, process, settings()), received(process, model), [one])
    assert update["update/1/loss/0"] == 11
    assert set(update) == {"update/0", "update/1/loss/0", "update/1/loss/1", "update/2/0"}
