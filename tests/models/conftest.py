import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SHARED = Path(__file__).resolve().parents[2] / "../shared"


@pytest.fixture
def reference_model_path():
    path = SHARED / "fixtures/reference-keras/input/keras_model"
    if not path.is_dir():
        pytest.skip("the reference's SavedModel is not here")
    return path


@pytest.fixture
def mnist_path():
    path = SHARED / "data/mnist"
    if not path.is_dir():
        pytest.skip("the MNIST test images are not here")
    return path


@pytest.fixture
def keras():
    import keras

    keras.utils.set_random_seed(3)
    return keras


@pytest.fixture
def tensor_model(keras):
    """Three classes from four numbers; x is a tensor."""
    from fedcompute.models.functional_model import functional_model_from_keras

    layers = [keras.Input((4,)), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential(layers)
    model.compile(loss="sparse_categorical_crossentropy")
    return functional_model_from_keras(keras_model=model)


@pytest.fixture
def dictionary_model(keras):
    """A yes-or-no label from two named features; x is an OrderedDict."""
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras

    features = {name: keras.Input((1,), name=name) for name in ("feature-1", "feature-2")}
    joined = keras.layers.Concatenate()([features["feature-1"], features["feature-2"]])
    model = keras.Model(features, keras.layers.Dense(1, activation="sigmoid")(joined))
    spec = OrderedDict((name, tf.TensorSpec([None, 1], tf.float32)) for name in features)
    return functional_model_from_keras(
        keras_model=model,
        loss_fn=keras.losses.BinaryCrossentropy(),
        input_spec=(spec, tf.TensorSpec([None, 1], tf.int64)),
    )


@pytest.fixture
def batch():
    """Makes a batch of 3 for a model: x of its specification, integer labels 0 or 1."""

    def make(model, seed=0):
        rng = np.random.default_rng(seed)

        def values(spec):
            return rng.normal(size=[3, *spec.shape[1:]]).astype(np.float32)

        x = model.x_spec
        x = OrderedDict((name, values(part)) for name, part in x.items()) if isinstance(x, dict) else values(x)
        return x, rng.integers(0, 2, size=[3, 1])

    return make
