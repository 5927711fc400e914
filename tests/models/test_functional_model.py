from collections import OrderedDict

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.functional_model import assign_weights, functional_model_from_keras

IMAGE_SPEC = (tf.TensorSpec([None, 28, 28, 1], tf.float32), tf.TensorSpec([None, 1], tf.int64))
PAIR_SPEC = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None, 1], tf.int64))


def refused(model, loss_fn="mse", input_spec=PAIR_SPEC):
    import keras

    with pytest.raises(ArtifactInvalid) as refusal:
        functional_model_from_keras(model, loss_fn=keras.losses.get(loss_fn), input_spec=input_spec)
    assert refusal.value.reason == Reason.MODEL_UNSUPPORTED
    return refusal.value.detail


def test_the_functional_model_predicts_and_loses_what_the_keras_model_does(keras, batch):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    loss = keras.losses.SparseCategoricalCrossentropy()
    functional = functional_model_from_keras(keras_model=model, loss_fn=loss, input_spec=PAIR_SPEC)
    x, y = batch(functional)
    output = functional.predict_on_batch(functional.weights, x, training=False)
    np.testing.assert_array_equal(output, model(x))
    assert float(functional.loss(output, y)) == pytest.approx(float(loss(y, model(x))), rel=1e-6)


def test_loss_and_input_specification_follow_from_a_compiled_model(tensor_model):
    assert (tensor_model.x_spec, tensor_model.y_spec) == PAIR_SPEC


def test_a_model_with_several_inputs_gets_a_dictionary_sorted_by_name(keras):
    inputs = [keras.Input((1,), name="b"), keras.Input((2,), name="a")]
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Concatenate()(inputs)))
    model.compile(loss="mse")
    functional = functional_model_from_keras(model)
    assert list(functional.x_spec) == ["a", "b"]
    assert functional.y_spec == tf.TensorSpec([None, 1], tf.float32)
    x = OrderedDict(a=np.ones((3, 2), np.float32), b=np.zeros((3, 1), np.float32))
    output = functional.predict_on_batch(functional.weights, x, training=True)
    np.testing.assert_allclose(output, model([x["b"], x["a"]]), rtol=1e-6)


def test_a_model_may_be_given_as_its_constructor(keras):
    def build():
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])

    functional = functional_model_from_keras(build, keras.losses.MeanSquaredError(), PAIR_SPEC)
    assert [array.shape for array in functional.trainable] == [(4, 1), (1,)]


def test_an_unbuilt_model_is_built_from_the_input_specification(keras):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    functional = functional_model_from_keras(Net(), keras.losses.MeanSquaredError(), PAIR_SPEC)
    assert functional.trainable[0].shape == (4, 1)


def test_dropout_inside_a_model_that_takes_no_training_argument_is_active_in_training(keras):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.drop, self.dense = keras.layers.Dropout(0.5), keras.layers.Dense(64)

        def call(self, x):
            return self.drop(self.dense(x))

    functional = functional_model_from_keras(Net(), keras.losses.MeanSquaredError(), PAIR_SPEC)
    outputs = [functional.predict_on_batch(functional.weights, np.ones((3, 4), np.float32), t) for t in (True, False)]
    assert np.count_nonzero(outputs[0]) < np.count_nonzero(outputs[1])


def test_a_loss_that_a_layer_adds_is_refused(keras):
    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(x))
            return x

    detail = refused(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1), Penalty()]))
    assert "would be lost" in detail


def test_a_model_whose_metrics_are_compiled_in_converts(keras):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    model.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0)
    assert len(functional_model_from_keras(model).trainable) == 2


def test_dropout_draws_fresh_masks_in_training_and_none_in_inference(keras):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(64, use_bias=False)])
    functional = functional_model_from_keras(model, keras.losses.MeanSquaredError(), PAIR_SPEC)
    assert functional.non_trainable == ()
    x = np.ones((3, 4), np.float32)

    def predict(training):
        return np.asarray(functional.predict_on_batch(functional.weights, x, training=training))

    np.testing.assert_array_equal(predict(False), predict(False))
    assert any(not np.array_equal(predict(True), predict(True)) for _ in range(5))


def test_batch_normalisation_is_refused_by_name(keras):
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(1)])
    assert "norm/moving_mean" in refused(model)


def test_a_frozen_layer_is_refused(keras):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, trainable=False), keras.layers.Dense(1)])
    assert "2 non-trainable weights" in refused(model)


def test_every_reason_of_a_refusal_is_named(keras):
    norm = keras.layers.BatchNormalization()
    dense = keras.layers.Dense(1, kernel_regularizer="l2")
    detail = refused(keras.Sequential([keras.Input((4,)), norm, dense]))
    assert "non-trainable" in detail
    assert "regularisation" in detail


def test_layers_that_share_a_variable_are_refused_and_one_layer_called_twice_is_not(keras):
    class Tied(keras.layers.Layer):
        def __init__(self, source):
            super().__init__()
            self.kernel = source.kernel

        def call(self, x):
            return keras.ops.matmul(x, self.kernel)

    dense = keras.layers.Dense(4)
    dense.build((None, 4))
    assert "share variables" in refused(keras.Sequential([keras.Input((4,)), dense, Tied(dense)]))
    x = keras.Input((4,))
    twice = keras.layers.Dense(4)
    functional = functional_model_from_keras(
        keras.Model(x, twice(twice(x))), keras.losses.MeanSquaredError(), PAIR_SPEC
    )
    assert len(functional.trainable) == 2


def test_a_loss_that_reads_a_variable_is_refused(keras):
    scale = tf.Variable(np.ones(200_000, np.float32))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(ArtifactInvalid, match="no weights"):
        functional_model_from_keras(model, lambda y, output: tf.reduce_mean(output) * scale[0], PAIR_SPEC)


def test_a_dictionary_of_outputs_is_refused(keras):
    x = keras.Input((4,))
    assert "neither a tensor nor" in refused(keras.Model(x, {"a": keras.layers.Dense(1)(x)}))


@pytest.mark.parametrize(
    "input_spec",
    [
        IMAGE_SPEC,
        (tf.TensorSpec([3, 4], tf.float32), tf.TensorSpec([None, 1], tf.int64)),
        (tf.TensorSpec([None, 4], tf.float32),),
        ([None, 4], [None, 1]),
        {"x": PAIR_SPEC[0], "z": PAIR_SPEC[1]},
    ],
)
def test_an_input_specification_that_cannot_be_used_is_refused(keras, input_spec):
    refused(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), input_spec=input_spec)


def test_a_model_without_a_known_loss_or_input_is_refused(keras):
    with pytest.raises(ArtifactInvalid, match="loss_fn="):
        functional_model_from_keras(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
    with pytest.raises(ArtifactInvalid, match="input_spec="):
        functional_model_from_keras(keras.Sequential([keras.layers.Dense(1)]), keras.losses.MeanSquaredError())
    with pytest.raises(ArtifactInvalid, match="no Keras 3 model"):
        functional_model_from_keras("model")


def test_trained_weights_go_back_into_the_keras_model(keras):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assign_weights(model, [np.full((4, 2), 3.0, np.float32), np.ones(2, np.float32)])
    np.testing.assert_array_equal(model(np.ones((1, 4), np.float32)), [[13.0, 13.0]])
    for wrong in ([np.zeros((4, 2))], [np.zeros((2, 4)), np.zeros(2)]):
        with pytest.raises(ArtifactInvalid) as refusal:
            assign_weights(model, wrong)
        assert refusal.value.reason == Reason.STATE_MISMATCH
    np.testing.assert_array_equal(model.weights[1], np.ones(2))
