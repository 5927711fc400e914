"""Sample models, with the settings under which each of them learns. Keras is imported when one is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

IMAGE_SHAPE = (28, 28, 1)


@dataclass(frozen=True)
class SampleModel:
    """A model to try, and suggestions for a task that trains it.

    `build` makes the Keras model, `loss_fn` its loss as a function of (label, output), `input_spec` the pair (x, y).
    `metrics` are names of the task configuration. `clip_norm` is L2, in model units; `batch_size` counts examples.
    """

    name: str
    description: str
    build: Callable[[], Any]
    loss_fn: Callable[[], Any]
    input_spec: Callable[[], tuple[Any, Any]]
    metrics: tuple[str, ...]
    client_learning_rate: float
    server_learning_rate: float
    clip_norm: float
    batch_size: int


def create_linear_model() -> Any:
    """Softmax regression on 28x28 images averaged to 14x14: 1,970 parameters, so little noise in all."""
    import keras

    image = keras.Input(IMAGE_SHAPE, name="x")
    pixels = keras.layers.Flatten()(_halved(image))
    return keras.Model(image, keras.layers.Dense(10, activation="softmax")(pixels), name="digits_linear")


def create_hidden_layer_model() -> Any:
    """One hidden layer of 32 units on 28x28 images averaged to 14x14: 6,634 parameters."""
    import keras

    image = keras.Input(IMAGE_SHAPE, name="x")
    pixels = keras.layers.Flatten()(_halved(image))
    hidden = keras.layers.Dense(32, activation="relu")(pixels)
    return keras.Model(image, keras.layers.Dense(10, activation="softmax")(hidden), name="digits_dense")


def create_original_fedavg_cnn_model(only_digits: bool = True) -> Any:
    """The convolutional network of the federated averaging paper (arXiv 1602.05629), for 28x28 images.

    1,663,370 parameters for the 10 digits, 1,690,046 for the 62 classes of EMNIST. Returns an uncompiled Keras model
    whose output are class probabilities [batch, 10 or 62].
    """
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(IMAGE_SHAPE, name="x"),
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(512, activation="relu"),
            layers.Dense(10 if only_digits else 62, activation="softmax"),
        ],
        name="original_fedavg_cnn",
    )


def create_dense_model() -> Any:
    """Two dense layers, 784-256-2, whose output [batch] is the probability of the first of two classes."""
    import keras

    pixels = keras.Input((784,), name="x")
    hidden = keras.layers.Dense(256, activation="relu")(pixels)
    scores = keras.layers.Dense(2, activation="sigmoid")(hidden)
    return keras.Model(pixels, keras.layers.Softmax()(scores)[:, 0], name="dense_784_256_2")


def sparse_cross_entropy(label: Any, output: Any) -> Any:
    """Mean cross-entropy of class probabilities [batch, classes] against integer labels [batch, 1].

    Equal to Keras' SparseCategoricalCrossentropy, in operations that every phone's runtime has (spec/artifacts.md 4.1).
    """
    import tensorflow as tf

    picked = tf.one_hot(tf.reshape(label, [-1]), output.shape[-1], dtype=output.dtype)
    return -tf.reduce_mean(tf.reduce_sum(picked * tf.math.log(tf.maximum(output, 1e-7)), axis=-1))


def binary_cross_entropy(label: Any, output: Any) -> Any:
    """Mean cross-entropy of probabilities [batch] against labels 0 or 1, [batch, 1]."""
    import tensorflow as tf

    truth = tf.cast(tf.reshape(label, [-1]), output.dtype)
    likelihood = truth * output + (1 - truth) * (1 - output)
    return -tf.reduce_mean(tf.math.log(tf.maximum(likelihood, 1e-7)))


def build_seeded(sample: SampleModel, seed: int) -> Any:
    """The sample's Keras model with initial weights that `seed` decides."""
    import keras

    keras.utils.set_random_seed(seed)
    return sample.build()


def _halved(image: Any) -> Any:
    import keras

    # As reshape and mean: both are builtins of every runtime, and the mean needs no pooling gradient.
    return keras.ops.mean(keras.ops.reshape(image, (-1, 14, 2, 14, 2)), axis=(2, 4))


def _image_spec() -> tuple[Any, Any]:
    import tensorflow as tf

    return tf.TensorSpec([None, *IMAGE_SHAPE], tf.float32), tf.TensorSpec([None, 1], tf.int64)


def _pixel_spec() -> tuple[Any, Any]:
    import tensorflow as tf

    return tf.TensorSpec([None, 784], tf.float32), tf.TensorSpec([None, 1], tf.int64)


_SAMPLES = (
    SampleModel(
        name="digits-linear",
        description="softmax regression on 14x14 averages; learns under strong noise",
        build=create_linear_model,
        loss_fn=lambda: sparse_cross_entropy,
        input_spec=_image_spec,
        metrics=("sparse_categorical_accuracy",),
        client_learning_rate=0.3,
        server_learning_rate=1.0,
        clip_norm=1.0,
        batch_size=5,
    ),
    SampleModel(
        name="digits-dense",
        description="one hidden layer of 32 units; for little noise",
        build=create_hidden_layer_model,
        loss_fn=lambda: sparse_cross_entropy,
        input_spec=_image_spec,
        metrics=("sparse_categorical_accuracy",),
        client_learning_rate=0.1,
        server_learning_rate=1.0,
        clip_norm=1.0,
        batch_size=5,
    ),
    SampleModel(
        name="emnist-cnn",
        description="the tutorial's convolutional network; 1.7 million parameters, for no noise or very many devices",
        build=create_original_fedavg_cnn_model,
        loss_fn=lambda: sparse_cross_entropy,
        input_spec=_image_spec,
        metrics=("sparse_categorical_accuracy",),
        client_learning_rate=0.05,
        server_learning_rate=1.0,
        clip_norm=1.0,
        batch_size=5,
    ),
    SampleModel(
        name="dense-784-256-2",
        description="two dense layers for a yes-or-no label",
        build=create_dense_model,
        loss_fn=lambda: binary_cross_entropy,
        input_spec=_pixel_spec,
        metrics=("binary_accuracy",),
        client_learning_rate=0.1,
        server_learning_rate=1.0,
        clip_norm=1.0,
        batch_size=3,
    ),
)

SAMPLE_MODELS: Mapping[str, SampleModel] = {sample.name: sample for sample in _SAMPLES}
DEFAULT_MODEL = "digits-linear"
