"""Fixtures of the builder tests: a valid configuration, small saved models, and a way to run a client graph."""

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from fedcompute.builder.config import read_config
from fedcompute.protos import tensorflow_pb2

REFERENCE = Path(__file__).resolve().parents[2] / "../shared/fixtures/reference-keras"

CONFIG = b"""
# A configuration that satisfies every rule.
mode: TRAINING_AND_EVAL
population_name: "digits"
label_name: "label"
policies {
  min_separation_policy { minimum_separation: 3 }
  data_availability_policy { min_example_count: 5 }
  model_release_policy { num_max_training_rounds: 20 dp_target_epsilon: 10 dp_delta: 0.000001 }
  dataset_policy { batch_size: 4 max_training_batches_per_client: 6 }
}
federated_learning {
  learning_process {
    type: FED_AVG
    client_optimizer: SGD
    client_learning_rate: 0.1
    server_optimizer: ADAM
    server_learning_rate: 0.5
    runtime_config { report_goal: 50 over_selection_rate: 0.5 example_selector_uri: "app://digits/train" }
    metrics { name: "sparse_categorical_accuracy" }
  }
  evaluation {
    source_training_task_id: 1
    checkpoint_selector: "every_2_hour"
    evaluation_traffic: 0.2
    report_goal: 4
    example_selector_uri: "app://digits/eval"
  }
}
differential_privacy { type: FIXED_GAUSSIAN noise_multiplier: 1.0 clip_norm: 0.25 }
"""


@pytest.fixture
def reference() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip("the reference's artifacts are not beside this checkout")
    return REFERENCE


@pytest.fixture
def config():
    return read_config(CONFIG).config


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory) -> Path:
    """A saved model: 6 numbers `x`, 3 classes `y` int64 [?, 1], probabilities out."""
    import keras
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model

    keras.utils.set_random_seed(1)
    layers = [keras.Input((6,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    model = functional_model_from_keras(
        keras_model=keras.Sequential(layers),
        loss_fn=_allowed_sparse_crossentropy,
        input_spec=(tf.TensorSpec([None, 6], tf.float32), tf.TensorSpec([None, 1], tf.int64)),
    )
    path = tmp_path_factory.mktemp("dense") / "model"
    save_functional_model(model, path)
    return path


def _allowed_sparse_crossentropy(label, output):
    """Sparse cross-entropy from ops that devices have; the stock one needs an op that they lack."""
    import tensorflow as tf

    hot = tf.one_hot(tf.squeeze(label, -1), 3)
    return -tf.reduce_mean(tf.reduce_sum(hot * tf.math.log(output + 1e-7), axis=-1))


@pytest.fixture(scope="session")
def cnn_model(tmp_path_factory) -> Path:
    """A saved model with a convolution, whose gradient devices have only in other operations."""
    import keras

    return _saved_image_model(tmp_path_factory.mktemp("cnn"), [keras.layers.Conv2D(2, 3)])


@pytest.fixture(scope="session")
def refused_model(tmp_path_factory) -> Path:
    """A saved model with a layer whose gradient no device has in any form."""
    import keras

    layers = [keras.layers.Conv2D(2, 3), keras.layers.UpSampling2D(interpolation="bilinear")]
    return _saved_image_model(tmp_path_factory.mktemp("refused"), layers)


def _saved_image_model(directory, layers) -> Path:
    import keras
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model

    model = functional_model_from_keras(
        keras_model=keras.Sequential([keras.Input((8, 8, 1)), *layers, keras.layers.Flatten(), keras.layers.Dense(3)]),
        loss_fn=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        input_spec=(tf.TensorSpec([None, 8, 8, 1], tf.float32), tf.TensorSpec([None, 1], tf.int64)),
    )
    path = directory / "model"
    save_functional_model(model, path)
    return path


@pytest.fixture
def example():
    """`example(x=array, y=array)` is a serialized tf.train.Example."""

    def make(**features) -> bytes:
        message = tensorflow_pb2.Example()
        for name, value in features.items():
            values = np.asarray(value).reshape(-1)
            feature = message.features.feature[name]
            if values.dtype.kind == "f":
                feature.float_list.value.extend(values)
            elif values.dtype.kind == "i":
                feature.int64_list.value.extend(values)
            else:
                feature.bytes_list.value.extend(values)
        return message.SerializeToString()

    return make


@pytest.fixture
def run_graph(tmp_path):
    """`run_graph(graph_def, received, examples)` runs a client graph in a session and reads its update file.

    The example source is TensorFlow's own record reader, put in the place of ExternalDataset.
    """
    import tensorflow as tf

    from fedcompute.builder.client_graph import TARGET_NAME
    from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

    def run(graph_def, received, examples):
        records, model, update = (str(tmp_path / name) for name in ("examples", "model", "update"))
        with tf.io.TFRecordWriter(records) as writer:
            for serialized in examples:
                writer.write(serialized)
        Path(model).write_bytes(write_checkpoint(received))
        runnable = tf.compat.v1.GraphDef()
        runnable.CopyFrom(graph_def)
        (source,) = [node for node in runnable.node if node.op == "ExternalDataset"]
        source.op = "TFRecordDataset"
        source.ClearField("attr")
        token = source.input[0]
        for name, value in (("no_compression", tf.constant(b"")), ("buffer_size", tf.constant(0, tf.int64))):
            node = runnable.node.add(name=name, op="Const")
            node.attr["dtype"].type = value.dtype.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value.numpy(), value.dtype, []))
        del source.input[:]
        source.input.extend([token, "no_compression", "buffer_size"])
        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(runnable, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            feed = {"data_token:0": records, "input_filepath:0": model, "output_filepath:0": update}
            session.run(TARGET_NAME, feed)
        return read_checkpoint(Path(update).read_bytes())

    return run


@pytest.fixture(scope="session")
def serve():
    """`with serve(app) as base_url:` runs an ASGI application on a free port of this machine, in a thread."""
    import uvicorn

    @contextmanager
    def run(app):
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://localhost:{port}"
        finally:
            server.should_exit = True
            thread.join()

    return run
