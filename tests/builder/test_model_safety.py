"""What models may contain, with models that TensorFlow itself wrote."""

import shutil
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from fedcompute.builder import model_safety
from fedcompute.builder.model_safety import check_saved_model
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.functional_model import functional_model_from_keras
from fedcompute.models.saved_model import save_functional_model
from fedcompute.models.zoo import SAMPLE_MODELS

LABEL = tf.TensorSpec([None, 1], tf.int64)


def save(model, path, loss=None) -> Path:
    shape = model.input_shape[1:]
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    save_functional_model(functional_model_from_keras(model, loss, (tf.TensorSpec([None, *shape]), LABEL)), path)
    return path


def layers(*middle, shape=(6,)):
    return keras.Sequential([keras.Input(shape), *middle, keras.layers.Flatten(), keras.layers.Dense(3)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(layers(), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def edited(plain, tmp_path):
    """`edited(change)` is a copy of the plain model after `change(meta_graph, saved_model)`."""

    def make(change) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(plain, path)
        file = path / "saved_model.pb"
        message = saved_model_pb2.SavedModel.FromString(file.read_bytes())
        change(message.meta_graphs[0], message)
        file.write_bytes(message.SerializeToString())
        return path

    return make


def refusal(path) -> str:
    with pytest.raises(ArtifactInvalid) as caught:
        check_saved_model(path)
    assert caught.value.reason == Reason.SAVED_MODEL_INVALID
    return caught.value.detail


@pytest.mark.parametrize("name", sorted(SAMPLE_MODELS))
def test_every_sample_model_passes(name, tmp_path):
    sample = SAMPLE_MODELS[name]
    model = functional_model_from_keras(sample.build(), sample.loss_fn(), sample.input_spec())
    save_functional_model(model, tmp_path)
    check_saved_model(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        lambda: layers(keras.layers.Dropout(0.5), keras.layers.LayerNormalization()),
        lambda: layers(keras.layers.LSTM(4), keras.layers.GaussianNoise(0.1), shape=(5, 3)),
        lambda: layers(keras.layers.Embedding(10, 4), keras.layers.GRU(4, unroll=True)),
        lambda: layers(
            keras.layers.Conv2D(2, 3, strides=2), keras.layers.SpatialDropout2D(0.5), keras.layers.MaxPool2D(),
            shape=(12, 12, 1),
        ),
    ],
    ids=["dropout", "lstm", "gru", "convolution"],
)  # fmt: skip
def test_common_layers_pass(model, tmp_path):
    check_saved_model(save(model(), tmp_path))


def test_a_model_of_the_reference_passes(reference):
    check_saved_model(reference / "input/keras_model")


def _python(x):
    y = tf.py_function(lambda v: v, [x], tf.float32)
    y.set_shape(x.shape)
    return y


def _numpy(x):
    y = tf.numpy_function(lambda v: v, [x], tf.float32)
    y.set_shape(x.shape)
    return y


def _numpy_stateless(x):
    y = tf.numpy_function(lambda v: v, [x], tf.float32, stateful=False)
    y.set_shape(x.shape)
    return y


def _read(x):
    return x + tf.cast(tf.strings.length(tf.io.read_file("/etc/passwd")), tf.float32)


def _write(x):
    with tf.control_dependencies([tf.raw_ops.WriteFile(filename="/tmp/owned", contents="x")]):
        return tf.identity(x)


def _list_files(x):
    return x + tf.cast(tf.size(tf.io.matching_files("/etc/*")), tf.float32)


def _restore(x):
    values = tf.raw_ops.RestoreV2(prefix="/x", tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32])
    return x + tf.reshape(values[0], [])


def _records(x):
    data = tf.data.TFRecordDataset("/x")
    return x + tf.cast(data.reduce(tf.constant(0), lambda count, _: count + 1), tf.float32)


def _print_to_a_file(x):
    tf.print("x", output_stream="file:///tmp/owned")
    return x


def _descriptors(x):
    text = tf.io.decode_proto(tf.constant(b""), "a.B", ["c"], [tf.int32], descriptor_source="/etc/passwd").values[0]
    return x + tf.cast(tf.size(text), tf.float32)


def _in_a_branch(x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: _read(x), lambda: x)


@pytest.mark.parametrize(
    ("layer", "operation"),
    [
        (_python, "EagerPyFunc"),
        (_numpy, "PyFunc"),
        (_numpy_stateless, "PyFuncStateless"),
        (_read, "ReadFile"),
        (_write, "WriteFile"),
        (_list_files, "MatchingFiles"),
        (_restore, "RestoreV2"),
        (_records, "TFRecordDataset"),
        (_print_to_a_file, "PrintV2"),
        (_descriptors, "DecodeProtoV2"),
        (_in_a_branch, "ReadFile"),
    ],
)
def test_an_operation_that_leaves_the_model_is_refused_by_its_name(layer, operation, tmp_path):
    text = refusal(save(layers(keras.layers.Lambda(layer, output_shape=(6,))), tmp_path / "model"))
    # Of several, the first is named; a data set comes with helpers that are no less foreign.
    assert f"the operation {operation}" in text or operation == "TFRecordDataset"
    assert "function " in text


def test_an_operation_in_the_loss_is_refused(tmp_path):
    def loss(label, output):
        return _read(tf.reduce_mean(output))

    assert "the operation ReadFile" in refusal(save(layers(), tmp_path / "model", loss))


def _saver_functions(meta):
    names = {meta.saver_def.save_tensor_name.split(":")[0], meta.saver_def.restore_op_name}
    return {node.attr["f"].func.name for node in meta.graph_def.node if node.name in names}


def test_a_saver_function_that_the_model_calls_is_refused(edited):
    def change(meta, _):
        saver = sorted(_saver_functions(meta))[0]
        function = next(f for f in meta.graph_def.library.function if "predict" in f.signature.name)
        call = function.node_def.add(name="call", op="StatefulPartitionedCall")
        call.attr["f"].func.name = saver

    assert "traced_" in refusal(edited(change))


def test_a_saver_function_that_may_replace_another_is_refused(edited):
    def change(meta, _):
        for function in meta.graph_def.library.function:
            function.attr["api_implements"].s = b"swap"

    assert "traced_" in refusal(edited(change))


def test_an_object_that_restores_itself_or_has_a_loader_is_refused(edited):
    def restores(meta, _):
        meta.object_graph_def.nodes[0].saveable_objects["x"].restore_function = 1

    assert "restore" in refusal(edited(restores))


def test_a_resource_or_registered_class_is_refused(edited):
    def change(meta, _):
        meta.object_graph_def.nodes.add().resource.device = "CPU"
        meta.object_graph_def.nodes[0].registered_name = "keras.Lambda"

    text = refusal(edited(change))
    assert "keras.Lambda" in text


def test_a_model_in_the_old_form_whose_main_graph_would_run_is_refused(edited):
    assert "no single graph" in refusal(edited(lambda meta, _: meta.ClearField("object_graph_def")))


def test_two_graphs_are_refused(edited):
    assert "no single graph" in refusal(edited(lambda meta, model: model.meta_graphs.add().CopyFrom(meta)))


def test_an_unknown_operation_is_refused(edited):
    def change(meta, _):
        meta.graph_def.library.function[0].node_def.add(name="x", op="SomebodysOwnOp")

    assert "SomebodysOwnOp" in refusal(edited(change))


def test_a_damaged_missing_or_oversized_file_is_refused(tmp_path, monkeypatch):
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff" * 100)
    assert "damaged" in refusal(tmp_path)
    # A smaller limit, since a file of the real one would take a test too long.
    monkeypatch.setattr(model_safety, "MAX_GRAPH_BYTES", 99)
    assert "more than 99 bytes" in refusal(tmp_path)
