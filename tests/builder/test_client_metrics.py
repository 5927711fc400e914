import keras
import numpy as np
import pytest
import tensorflow as tf

from fedcompute.builder.client_metrics import METRIC_UPDATES, Batch

RNG = np.random.default_rng(5)


def measured(name, label, prediction):
    batch = Batch(tf.constant(label), tf.constant(prediction), tf.constant(2.0), tf.constant(float(len(label))))
    state = METRIC_UPDATES[name]((tf.constant(1.0), tf.constant(1.0)), batch)
    return [float(leaf) - 1 for leaf in state]


def keras_state(metric, label, prediction):
    metric.update_state(label, prediction)
    return [float(variable.numpy()) for variable in metric.variables]


@pytest.mark.parametrize("label_shape", [(7, 1), (7,)])
def test_sparse_categorical_accuracy_adds_what_keras_adds(label_shape):
    label, prediction = RNG.integers(0, 4, label_shape), RNG.random((7, 4), np.float32)
    expected = keras_state(keras.metrics.SparseCategoricalAccuracy(), label, prediction)
    assert measured("sparse_categorical_accuracy", label, prediction) == expected


@pytest.mark.parametrize(("label_shape", "shape"), [((7, 1), (7, 1)), ((7, 3), (7, 3)), ((7,), (7, 1))])
def test_binary_accuracy_adds_what_keras_adds(label_shape, shape):
    label, prediction = RNG.integers(0, 2, label_shape), RNG.random(shape, np.float32)
    expected = keras_state(keras.metrics.BinaryAccuracy(), label, prediction)
    np.testing.assert_allclose(measured("binary_accuracy", label, prediction), expected, rtol=1e-6)


def test_binary_accuracy_counts_examples_when_outputs_are_a_plain_vector():
    label, prediction = np.array([[1], [0], [1]]), np.array([0.9, 0.8, 0.7], np.float32)
    assert measured("binary_accuracy", label, prediction) == [2, 3]


def test_a_label_and_outputs_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError):
        measured("binary_accuracy", np.zeros((7, 1), np.int64), np.zeros((7, 3), np.float32))
    with pytest.raises(ValueError):
        measured("sparse_categorical_accuracy", np.zeros((7, 1), np.int64), np.zeros(7, np.float32))


def test_loss_is_weighted_by_the_size_of_the_batch():
    assert measured("loss", np.zeros((7, 1), np.int64), np.zeros((7, 1), np.float32)) == [14, 7]
