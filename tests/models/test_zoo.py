import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.models.functional_model import functional_model_from_keras
from fedcompute.models.zoo import (
    DEFAULT_MODEL,
    SAMPLE_MODELS,
    create_dense_model,
    create_original_fedavg_cnn_model,
    sparse_cross_entropy,
)

# spec/artifacts.md 4.1: what a gradient may need beyond TFLite's own operations.
ALLOWED_IN_GRADIENTS = {"BroadcastGradientArgs", "ReluGrad", "StridedSliceGrad", "ConcatOffset", "ShapeN", "Split"}


@pytest.mark.parametrize("name", SAMPLE_MODELS)
def test_every_sample_model_converts_and_starts_at_the_loss_of_a_guess(keras, batch, name):
    sample = SAMPLE_MODELS[name]
    model = functional_model_from_keras(sample.build(), sample.loss_fn(), sample.input_spec())
    x, y = batch(model)
    output = model.predict_on_batch(model.weights, np.abs(x) / 10, training=True)
    guess = np.log(2 if name == "dense-784-256-2" else 10)
    assert 0.3 * guess < float(model.loss(output, y)) < 2 * guess
    assert name == sample.name


@pytest.mark.parametrize(("only_digits", "parameters"), [(True, 1_663_370), (False, 1_690_046)])
def test_the_tutorials_cnn_has_the_published_number_of_parameters(keras, only_digits, parameters):
    assert create_original_fedavg_cnn_model(only_digits=only_digits).count_params() == parameters


def test_the_dense_model_is_the_reference_model(keras, reference_model_path):
    from fedcompute.models.functional_model import assign_weights
    from fedcompute.models.saved_model import load_functional_model

    reference = load_functional_model(reference_model_path)
    model = create_dense_model()
    assign_weights(model, reference.trainable)
    x = np.random.default_rng(0).random((3, 784), np.float32)
    output = reference.predict_on_batch(reference.weights, x, training=True)
    np.testing.assert_allclose(model(x), output, rtol=1e-5)
    y = np.array([[1], [0], [1]])
    loss = SAMPLE_MODELS["dense-784-256-2"].loss_fn()(y, output)
    np.testing.assert_allclose(loss, reference.loss(output, y), rtol=1e-5)


def test_the_cross_entropy_is_that_of_keras(keras):
    output = keras.ops.softmax(np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32) * 9)
    y = np.array([[0], [9], [3], [3], [1]])
    expected = keras.losses.SparseCategoricalCrossentropy()(y, output)
    np.testing.assert_allclose(sparse_cross_entropy(y, output), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "digits-dense", "dense-784-256-2"])
def test_the_gradient_of_a_small_sample_needs_no_operation_that_phones_lack(keras, name):
    sample = SAMPLE_MODELS[name]
    model = functional_model_from_keras(sample.build(), sample.loss_fn(), sample.input_spec())
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        weights = [tf.compat.v1.placeholder(tf.float32, array.shape) for array in model.trainable]
        x, y = (tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in (model.x_spec, model.y_spec))
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = model.loss(model.predict_on_batch((weights, ()), x, training=True), y)
        outputs = [loss, *tape.gradient(loss, weights)]
        converter = tf.compat.v1.lite.TFLiteConverter.from_session(session, [*weights, x, y], outputs)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
        flatbuffer = converter.convert()
    flex = {name.decode() for name in re.findall(rb"Flex(\w+)", flatbuffer)}
    assert flex <= ALLOWED_IN_GRADIENTS


def test_the_registry_and_the_data_sets_load_without_tensorflow():
    program = (
        "import sys; import fedcompute.models.zoo, fedcompute.models.datasets; "
        "print([name for name in ('tensorflow', 'keras', 'sklearn', 'h5py') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"
