import numpy as np
import pytest
import tensorflow as tf

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.models.saved_model import load_functional_model, save_functional_model

MINUS_ONE = "ff" * 9 + "01"
FLOAT_SCALAR = "22020801"
FLOAT_VECTOR = "220e0801120a" + MINUS_ONE
PIXELS_AND_LABEL = "122b0a14121222100801120c" + MINUS_ONE + "90060a131211220f0809120b" + MINUS_ONE + "01"


@pytest.fixture(params=["tensor_model", "dictionary_model"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def reloaded(model, tmp_path):
    save_functional_model(model, tmp_path / "saved")
    return load_functional_model(tmp_path / "saved")


def gradient(model, weights, x, y):
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = model.loss(model.predict_on_batch((weights, ()), x, training=True), y)
    return tape.gradient(loss, weights)


def test_a_saved_model_loads_with_the_same_weights_types_and_values(model, reloaded, batch):
    x, y = batch(model)
    assert reloaded.x_spec == model.x_spec
    assert reloaded.y_spec == model.y_spec
    for loaded, original in zip(reloaded.trainable, model.trainable, strict=True):
        np.testing.assert_array_equal(loaded, original)
    for training in (True, False):
        expected = model.predict_on_batch(model.weights, x, training=training)
        output = reloaded.predict_on_batch(reloaded.weights, x, training=training)
        np.testing.assert_allclose(output, expected, rtol=1e-6)
    np.testing.assert_allclose(reloaded.loss(expected, y), model.loss(expected, y), rtol=1e-6)


def test_a_loaded_model_trains_inside_a_dataset_reduction_of_another_graph(model, reloaded, batch):
    x, y = batch(model)
    with tf.Graph().as_default() as graph:
        placeholders = [tf.compat.v1.placeholder(tf.float32, array.shape) for array in reloaded.trainable]
        dataset = tf.data.Dataset.from_tensor_slices((dict(x) if isinstance(x, dict) else x, y)).batch(2)

        def step(weights, example):
            gradients = gradient(reloaded, weights, *example)
            return tuple(w - 0.5 * g for w, g in zip(weights, gradients, strict=True))

        trained = dataset.reduce(tuple(placeholders), step)
        with tf.compat.v1.Session(graph=graph) as session:
            result = session.run(trained, dict(zip(placeholders, reloaded.trainable, strict=True)))
    weights = tuple(tf.constant(array) for array in model.trainable)
    for part in (slice(0, 2), slice(2, 3)):
        features = {name: values[part] for name, values in x.items()} if isinstance(x, dict) else x[part]
        weights = tuple(w - 0.5 * g for w, g in zip(weights, gradient(model, weights, features, y[part]), strict=True))
    for actual, expected in zip(result, weights, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_the_saved_layout_is_that_of_the_specification(tensor_model, dictionary_model, tmp_path):
    save_functional_model(tensor_model, tmp_path)
    assert {"saved_model.pb", "fingerprint.pb", "variables"} <= {path.name for path in tmp_path.iterdir()}
    loaded = tf.saved_model.load(str(tmp_path))
    trainable, non_trainable = loaded()
    assert (len(trainable), len(non_trainable)) == (4, 0)
    weights = (tuple(trainable), ())
    x = tf.zeros([2, 4])
    (output,) = loaded.predict_on_batch_training(model_weights=weights, x=x, training=True)
    (same,) = loaded.predict_on_batch_inference(model_weights=weights, x=x, training=False)
    np.testing.assert_array_equal(output, same)
    (loss,) = loaded.loss(output, tf.zeros([2, 1], tf.int64), None)
    assert loss.shape.rank == 0
    assert list(loaded.signatures) == ["serving_default"]
    assert loaded.loss_type_spec.numpy().hex() == FLOAT_SCALAR
    assert not loaded.serialized_input_spec.trainable
    save_functional_model(dictionary_model, tmp_path / "dictionary")
    stored = tf.saved_model.load(str(tmp_path / "dictionary")).serialized_input_spec.numpy()
    feature = "1211220f0801120b" + MINUS_ONE + "01"
    named = "".join("0a1e0a09" + name.encode().hex() + feature for name in ("feature-1", "feature-2"))
    assert stored.hex() == "125b0a4412421240" + named + "0a131211220f0809120b" + MINUS_ONE + "01"


def test_type_specifications_are_the_bytes_of_the_specification(keras, tmp_path):
    from fedcompute.models.functional_model import functional_model_from_keras
    from fedcompute.models.zoo import SAMPLE_MODELS

    sample = SAMPLE_MODELS["dense-784-256-2"]
    model = functional_model_from_keras(sample.build(), sample.loss_fn(), sample.input_spec())
    save_functional_model(model, tmp_path)
    loaded = tf.saved_model.load(str(tmp_path))
    assert loaded.loss_type_spec.numpy().hex() == FLOAT_SCALAR
    assert loaded.predict_on_batch_training_type_spec.numpy().hex() == FLOAT_VECTOR
    assert loaded.predict_on_batch_inference_type_spec.numpy().hex() == FLOAT_VECTOR
    assert loaded.serialized_input_spec.numpy().hex() == PIXELS_AND_LABEL


def test_non_trainable_weights_and_tuples_of_outputs_survive(tmp_path):
    def predict_on_batch(weights, x, training):
        trainable, non_trainable = weights
        return x * trainable[0] + non_trainable[0], x

    model = FunctionalModel(
        (np.float32([2.0]),),
        (np.float32([5.0]), np.int64(3)),
        tf.TensorSpec([None, 1], tf.float32),
        tf.TensorSpec([None, 1], tf.float32),
        predict_on_batch,
        lambda output, label: tf.reduce_mean(tf.abs(output[0] - label)),
    )
    save_functional_model(model, tmp_path)
    loaded = load_functional_model(tmp_path)
    assert loaded.non_trainable[1] == 3
    output = loaded.predict_on_batch(loaded.weights, np.float32([[1.0]]), training=True)
    assert isinstance(output, tuple)
    assert output[0].numpy().tolist() == [[7.0]]
    assert float(loaded.loss(output, np.float32([[4.0]]))) == 3.0


def test_a_model_saves_again_with_the_weights_of_a_checkpoint(tensor_model, tmp_path):
    save_functional_model(tensor_model, tmp_path / "first")
    loaded = load_functional_model(tmp_path / "first")
    trained = [array + 1 for array in loaded.trainable]
    save_functional_model(loaded.with_weights(trained), tmp_path / "second")
    again = load_functional_model(tmp_path / "second")
    for actual, expected in zip(again.trainable, trained, strict=True):
        np.testing.assert_array_equal(actual, expected)
    with pytest.raises(ArtifactInvalid) as refusal:
        loaded.with_weights(trained[:2])
    assert refusal.value.reason == Reason.STATE_MISMATCH


def test_the_reference_model_loads_predicts_and_saves_again(reference_model_path, tmp_path):
    model = load_functional_model(reference_model_path)
    assert (model.x_spec, model.y_spec) == (
        tf.TensorSpec([None, 784], tf.float32),
        tf.TensorSpec([None, 1], tf.int64),
    )
    assert [array.shape for array in model.trainable] == [(784, 256), (256,), (256, 2), (2,)]
    output = model.predict_on_batch(model.weights, np.zeros((3, 784), np.float32), training=True)
    np.testing.assert_allclose(output, [0.5, 0.5, 0.5])
    save_functional_model(model, tmp_path)
    assert float(load_functional_model(tmp_path).loss(output, np.array([[1], [0], [1]]))) == pytest.approx(
        np.log(2), abs=1e-5
    )


def invalid(path):
    with pytest.raises(ArtifactInvalid) as refusal:
        load_functional_model(path)
    assert refusal.value.reason == Reason.SAVED_MODEL_INVALID
    return refusal.value.detail


def test_a_directory_that_is_no_saved_model_is_refused(tmp_path):
    assert "no saved_model.pb" in invalid(tmp_path)
    assert "no saved_model.pb" in invalid(tmp_path / "missing")
    (tmp_path / "saved_model.pb").write_bytes(b"no protobuf at all")
    assert "cannot be loaded" in invalid(tmp_path)


def test_a_saved_model_that_is_no_functional_model_is_refused(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path))
    assert "lacks _weights" in invalid(tmp_path)


@pytest.mark.parametrize("damage", ["variables/variables.index", "variables/variables.data-00000-of-00001"])
def test_a_saved_model_with_a_missing_or_truncated_file_is_refused(tensor_model, tmp_path, damage):
    save_functional_model(tensor_model, tmp_path)
    damaged = tmp_path / damage
    damaged.write_bytes(damaged.read_bytes()[:10])
    invalid(tmp_path)
    damaged.unlink()
    invalid(tmp_path)


def test_a_functional_model_with_an_unusable_input_specification_is_refused(tensor_model, tmp_path):
    save_functional_model(tensor_model, tmp_path)
    loaded = tf.saved_model.load(str(tmp_path))
    for number, stored in enumerate((b"\xff\xff", b"", bytes.fromhex(FLOAT_SCALAR), bytes.fromhex("12020a00"))):
        loaded.serialized_input_spec.assign(stored)
        tf.saved_model.save(loaded, str(tmp_path / str(number)))
        invalid(tmp_path / str(number))


def test_dropout_survives_saving_with_fresh_masks_and_no_extra_weight(keras, tmp_path):
    from fedcompute.models.functional_model import functional_model_from_keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(64, use_bias=False)])
    model.compile(loss="mse")
    save_functional_model(functional_model_from_keras(model), tmp_path)
    loaded = load_functional_model(tmp_path)
    assert (len(loaded.trainable), loaded.non_trainable) == (1, ())
    x = np.ones((3, 4), np.float32)
    outputs = [np.asarray(loaded.predict_on_batch(loaded.weights, x, training=True)) for _ in range(5)]
    assert any(not np.array_equal(outputs[0], output) for output in outputs[1:])
    inference = loaded.predict_on_batch(loaded.weights, x, training=False)
    np.testing.assert_allclose(inference, model(x), rtol=1e-5)
