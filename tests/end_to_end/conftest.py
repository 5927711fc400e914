"""A real server on a thread of the test process, on a free loopback port."""

import threading
import time
from contextlib import contextmanager

import pytest

from fedcompute.app import server
from fedcompute.server.listening import listen
from fedcompute.server.settings import RetryWindow, Settings

SOON = RetryWindow(0.02, 0.05)


@contextmanager
def _serving(directory, executor=None, **changes):
    listener = listen("127.0.0.1", 0)
    settings = Settings(
        data_dir=directory,
        port=listener.getsockname()[1],
        retry_no_task=SOON,
        retry_no_active_task=SOON,
        workers=1,
        **changes,
    )
    running = server(settings, executor)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield settings
    finally:
        running.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving():
    """`with serving(directory) as settings:` runs a server over that data directory."""
    return _serving


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """A linear classifier of four features into three classes, saved; always with the same weights."""
    import tensorflow as tf

    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.saved_model import save_functional_model

    tf.keras.utils.set_random_seed(5)
    model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])

    def loss(label, output):
        picked = tf.one_hot(tf.reshape(label, [-1]), 3)
        return -tf.reduce_mean(tf.reduce_sum(picked * tf.nn.log_softmax(output), axis=-1))

    spec = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None, 1], tf.int64))
    directory = tmp_path_factory.mktemp("model") / "saved_model"
    save_functional_model(functional_model_from_keras(keras_model=model, loss_fn=loss, input_spec=spec), directory)
    return directory
