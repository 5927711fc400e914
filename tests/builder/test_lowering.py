"""Lowered operations against TensorFlow's own, alone and in whole plans as a device runs them."""

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings

from fedcompute.builder.build import build_task_group
from fedcompute.builder.client_graph import TARGET_NAME, ClientSettings, client_graph
from fedcompute.builder.client_optimizers import SGD
from fedcompute.builder.device_graph import device_graph
from fedcompute.builder.lower_ops import LowerOps
from fedcompute.builder.lowered_ops import FORMS
from fedcompute.builder.lowering import lower
from fedcompute.builder.op_check import flex_ops, supported_ops
from fedcompute.builder.plan import build_plan, client_only_plan, example_selector
from fedcompute.builder.tflite import prune
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.errors import BuildFailed, Reason
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import evaluation_process, initial_state, training_process
from fedcompute.models.functional_model import FunctionalModel, functional_model_from_keras
from fedcompute.models.saved_model import load_functional_model, save_functional_model
from fedcompute.protos import learning_pb2, plan_pb2, task_builder_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

Flags = task_builder_pb2.ExperimentFlags
raw = tf.raw_ops

quick = settings(max_examples=40, deadline=None, derandomize=True)
spans = st.integers(1, 4)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_equal(op, arrays, *, form=None, stays=False, by=None):
    """Compares the outputs of an operation by its own kernel, or by `by`, and by its form; the batch is unknown."""
    with tf.Graph().as_default():
        inputs = [tf.compat.v1.placeholder(a.dtype, [None, *a.shape[1:]]) for a in arrays]
        kernel = tf.nest.flatten(op(*inputs))
        node = kernel[0].op
        kernel = [by(*inputs)] if by is not None else kernel
        lowered = form(node, *inputs) if form is not None else FORMS[node.type](node, *inputs)
        if stays:
            assert lowered is None
            return
        with tf.compat.v1.Session() as session:
            values = session.run([list(kernel), list(lowered)], dict(zip(inputs, arrays, strict=True)))
    for expected, value in zip(*values, strict=True):
        assert value.shape == expected.shape
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5)


@st.composite
def geometries(draw, dilated=False):
    """(image size, kernel, attributes) of windows of which at least one fits; sizes are [rows, columns]."""
    padding = draw(st.sampled_from(["SAME", "VALID", "EXPLICIT"]))
    kernel, strides = [draw(spans), draw(spans)], [draw(spans), draw(spans)]
    attributes = {"strides": [1, *strides, 1], "padding": padding}
    dilations = [1, 1]
    if dilated and strides == [1, 1]:
        dilations = draw(st.sampled_from([[1, 1], [2, 1], [1, 3], [2, 2]]))
        if dilations != [1, 1]:
            attributes["dilations"] = [1, *dilations, 1]
    if padding == "EXPLICIT":
        # Less than a window, as TensorFlow wants it for poolings.
        attributes["explicit_paddings"] = [0, 0, *(draw(st.integers(0, kernel[i // 2] - 1)) for i in range(4)), 0, 0]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return [draw(st.integers(1 if padding == "SAME" else extent, 9)) for extent in extents], kernel, attributes


@quick
@given(geometries(dilated=True), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_convolution_gradients_are_equal_for_every_geometry(geometry, inputs, outputs, groups):
    size, kernel, attributes = geometry
    image, weights = numbers(3, *size, inputs * groups), numbers(*kernel, inputs, outputs * groups, seed=1)
    dy = numbers(*raw.Conv2D(input=image, filter=weights, **attributes).shape, seed=2)

    def filter_gradient(x, dy, groups=1):
        sizes = [*kernel, inputs, outputs * groups]
        return raw.Conv2DBackpropFilter(input=x, filter_sizes=sizes, out_backprop=dy, **attributes)

    def input_gradient(x, dy, weights=weights):
        return raw.Conv2DBackpropInput(input_sizes=tf.shape(x), filter=weights, out_backprop=dy, **attributes)

    # The kernels for groups fail in some geometries, so the truth is computed group by group.
    assert_equal(
        lambda x, dy: filter_gradient(x, dy, groups),
        [image, dy],
        form=lambda op, x, dy: FORMS[op.type](op, x, tf.constant(weights.shape), dy),
        by=lambda x, dy: tf.concat(list(map(filter_gradient, tf.split(x, groups, 3), tf.split(dy, groups, 3))), 3),
    )
    split = np.split(weights, groups, 3)
    assert_equal(
        input_gradient,
        [image, dy],
        form=lambda op, x, dy: FORMS[op.type](op, tf.shape(x), tf.constant(weights), dy),
        by=lambda x, dy: tf.concat(
            list(map(input_gradient, tf.split(x, groups, 3), tf.split(dy, groups, 3), split)), 3
        ),
        # In its plain form it is a builtin, and stays.
        stays=groups == 1 and "dilations" not in attributes and attributes["padding"] != "EXPLICIT",
    )


@quick
@given(geometries(), st.integers(1, 3), st.integers(1, 3))
def test_depthwise_gradients_are_equal_for_every_geometry(geometry, channels, multiplier):
    size, kernel, attributes = geometry
    attributes["strides"] = [1, attributes["strides"][1], attributes["strides"][1], 1]
    image, weights = numbers(3, *size, channels), numbers(*kernel, channels, multiplier, seed=1)
    dy = numbers(*raw.DepthwiseConv2dNative(input=image, filter=weights, **attributes).shape, seed=2)
    assert_equal(
        lambda x, dy: raw.DepthwiseConv2dNativeBackpropFilter(
            input=x, filter_sizes=weights.shape, out_backprop=dy, **attributes
        ),
        [image, dy],
        form=lambda op, x, dy: FORMS[op.type](op, x, tf.constant(weights.shape), dy),
    )
    assert_equal(
        lambda x, dy: raw.DepthwiseConv2dNativeBackpropInput(
            input_sizes=tf.shape(x), filter=weights, out_backprop=dy, **attributes
        ),
        [image, dy],
        form=lambda op, x, dy: FORMS[op.type](op, tf.shape(x), tf.constant(weights), dy),
    )


@quick
@given(geometries(), st.integers(1, 3), st.booleans())
def test_pooling_gradients_are_equal_for_every_geometry_and_the_first_maximum_takes_all(geometry, channels, ties):
    size, kernel, attributes = geometry
    attributes["ksize"] = [1, *kernel, 1]
    image = numbers(3, *size, channels)
    image = np.round(image) if ties else image
    pooled = raw.MaxPool(input=image, **attributes).numpy()
    dy = numbers(*pooled.shape, seed=2)
    assert_equal(
        lambda x, y, dy: raw.MaxPoolGrad(orig_input=x, orig_output=y, grad=dy, **attributes), [image, pooled, dy]
    )
    if attributes["padding"] != "EXPLICIT":
        assert_equal(
            lambda x, dy: raw.AvgPoolGrad(orig_input_shape=tf.shape(x), grad=dy, **attributes),
            [image, dy],
            form=lambda op, x, dy: FORMS[op.type](op, tf.shape(x), dy),
        )


@quick
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([np.int32, np.int64]), st.sampled_from([0.1, 1, 100]))
def test_sparse_cross_entropy_is_equal_in_both_outputs(batch, classes, dtype, scale):
    logits = scale * numbers(batch, classes)
    labels = np.random.default_rng(1).integers(0, classes, batch).astype(dtype)
    assert_equal(
        lambda x, y: raw.SparseSoftmaxCrossEntropyWithLogits(features=x, labels=y), [logits.astype(np.float32), labels]
    )


def test_a_label_that_is_no_class_gives_no_number():
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        op = raw.SparseSoftmaxCrossEntropyWithLogits(features=numbers(3, 4), labels=np.array([0, 4, 1])).loss.op
        loss, gradient = session.run(FORMS[op.type](op, *op.inputs))
        assert graph
    assert list(np.isnan(loss)) == [False, True, False]
    assert list(np.isnan(gradient).all(axis=1)) == [False, True, False]


ACTIVATIONS = {
    "relu6": lambda dy, x: raw.Relu6Grad(gradients=dy, features=x),
    "leaky relu": lambda dy, x: raw.LeakyReluGrad(gradients=dy, features=x, alpha=0.3),
    "elu": lambda dy, x: raw.EluGrad(gradients=dy, outputs=x),
    "selu": lambda dy, x: raw.SeluGrad(gradients=dy, outputs=x),
    "softsign": lambda dy, x: raw.SoftsignGrad(gradients=dy, features=x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_of_an_activation_is_equal(name):
    values = np.concatenate([np.linspace(-8, 8, 101), [0, 6]]).astype(np.float32)
    assert_equal(ACTIVATIONS[name], [numbers(103), values])


def test_error_functions_are_equal():
    values = np.linspace(-6, 6, 401).astype(np.float32)
    assert_equal(lambda x: raw.Erf(x=x), [values])
    assert_equal(lambda x: raw.Erfc(x=x), [values])


def process_of(model):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec(str(i), w.shape, w.dtype) for i, w in enumerate(model.trainable)],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.UniformMean(),
        metrics=(),
    )


def graph_of(model, process):
    return client_graph(model, process, ClientSettings("", 4, -1, SGD, 0.1, b""))


def image_model(predict, *weights, size, classes=3):
    """A model of images [size] with a dense layer on top of `predict(weights, x)` and Keras' loss on its scores."""
    features = int(np.prod(predict(weights, np.zeros((1, *size), np.float32)).shape[1:]))

    def scores(weights, x, training):
        own, (kernel,) = weights[0][:-1], weights[0][-1:]
        return tf.reshape(predict(own, x), [-1, features]) @ kernel

    def loss(output, label):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.reshape(label, [-1]), logits=output)
        return tf.reduce_mean(losses)

    trainable = (*weights, numbers(features, classes, seed=9) / np.sqrt(features))
    x_spec, y_spec = tf.TensorSpec([None, *size]), tf.TensorSpec([None, 1], tf.int64)
    return FunctionalModel(tuple(np.float32(w) for w in trainable), (), x_spec, y_spec, scores, loss)


@pytest.fixture(scope="module")
def runner():
    runner = PlanRunner()
    yield runner
    runner.close()


@pytest.fixture
def updates_of(runner, example):
    """`updates_of(model)`: the update of a device with the graph as it is, and with the lowered graph."""

    def run(model, *, process=None, examples=6):
        process = process or process_of(model)
        state = initial_state(process_of(model), model.trainable, model.non_trainable)
        received = write_checkpoint(client_checkpoint(process, state))
        rng = np.random.default_rng(5)
        shape = model.x_spec.shape[1:]
        data = [example(x=rng.normal(size=shape).astype(np.float32), y=rng.integers(0, 3, 1)) for _ in range(examples)]
        updates = []
        for choice in (LowerOps.NEVER, LowerOps.ALWAYS):
            flatbuffer = device_graph(graph_of(model, process), supported_ops(), choice).flatbuffer
            plan = client_only_plan(build_plan(process, flatbuffer, example_selector("")))
            updates.append(read_checkpoint(runner.run(plan, received, data).update))
        assert flex_ops(flatbuffer).keys() <= supported_ops().keys()
        return updates

    return run


def assert_same_updates(updates):
    plain, lowered = updates
    assert list(plain) == list(lowered)
    for name in plain:
        np.testing.assert_allclose(lowered[name], plain[name], atol=1e-5, rtol=1e-5, err_msg=name)


# The fixture holds no state that an example could leave to the next.
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometries())
def test_a_device_sends_the_same_update_whatever_the_convolutions_and_poolings(updates_of, geometry):
    size, kernel, attributes = geometry
    strides = attributes["strides"]
    padding = "SAME" if attributes["padding"] == "EXPLICIT" else attributes["padding"]

    def predict(weights, x):
        x = tf.nn.relu(tf.nn.conv2d(x, weights[0], 1, "SAME"))
        x = tf.nn.max_pool2d(x, kernel, strides, padding)
        x = tf.nn.conv2d(x, weights[1], strides, "SAME")
        return tf.nn.avg_pool2d(x, 2, 1, "SAME")

    model = image_model(predict, numbers(*kernel, 2, 3), numbers(*kernel, 3, 2, seed=1), size=(*size, 2))
    assert_same_updates(updates_of(model))


def test_groups_and_dilations_reach_the_device_as_they_are(updates_of):
    def predict(weights, x):
        x = tf.nn.conv2d(x, weights[0], 1, "VALID")
        return tf.nn.conv2d(tf.nn.conv2d(x, weights[1], 1, "SAME", dilations=2), weights[2], 1, "VALID")

    weights = [numbers(*shape) / 2 for shape in [(2, 2, 2, 4), (2, 3, 4, 4), (2, 2, 2, 4)]]
    assert_same_updates(updates_of(image_model(predict, *weights, size=(6, 7, 2))))


def test_an_evaluation_with_a_condition_around_the_loss_needs_no_identity(updates_of):
    model = image_model(lambda weights, x: weights[0] * x, numbers(4, 3), size=(4, 3))

    def loss(output, label):
        return tf.cond(tf.reduce_sum(output) > 0, lambda: model.loss(output, label), lambda: model.loss(-output, label))

    branching = FunctionalModel(model.trainable, (), model.x_spec, model.y_spec, model.predict_on_batch, loss)
    updates = updates_of(branching, process=evaluation_process(process_of(model), ()))
    assert updates[0]["update/0/loss/0"] > 0
    assert_same_updates(updates)


def test_random_layers_survive_beside_lowered_ones():
    import keras

    layers = [keras.Input((6, 6, 1)), keras.layers.Conv2D(2, 3), keras.layers.Dropout(0.5), keras.layers.Flatten()]
    loss = keras.losses.SparseCategoricalCrossentropy()
    model = functional_model_from_keras(
        keras_model=keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")]), loss_fn=loss
    )
    flatbuffer = device_graph(graph_of(model, process_of(model)), supported_ops(), LowerOps.AUTO).flatbuffer
    offenders = flex_ops(flatbuffer).keys() - supported_ops().keys()
    assert offenders == {"StatelessRandomGetKeyCounter", "StatelessRandomUniformV2"}


def test_a_graph_without_an_operation_to_lower_stays_as_it_is(config, dense_model):
    model = load_functional_model(dense_model)
    pruned = prune(graph_of(model, process_of(model)), TARGET_NAME)
    assert lower(pruned, TARGET_NAME).ops == {}
    report = build_task_group(dense_model, config, lower_ops=LowerOps.ALWAYS).report
    assert not any("lowered" in warning for warning in report.warnings)


@pytest.fixture(scope="module", params=["zoo loss", "keras loss"])
def tutorial_model(request, tmp_path_factory):
    import keras

    from fedcompute.models.zoo import create_original_fedavg_cnn_model, sparse_cross_entropy

    loss = keras.losses.SparseCategoricalCrossentropy() if request.param == "keras loss" else sparse_cross_entropy
    spec = tf.TensorSpec([None, 28, 28, 1], tf.float32), tf.TensorSpec([None, 1], tf.int64)
    keras.utils.set_random_seed(1)
    model = functional_model_from_keras(keras_model=create_original_fedavg_cnn_model(), loss_fn=loss, input_spec=spec)
    path = tmp_path_factory.mktemp("tutorial") / "model"
    save_functional_model(model, path)
    return path


def test_the_tutorial_cnn_passes_the_check_and_learns_the_same(config, tutorial_model, updates_of):
    group = build_task_group(tutorial_model, config)
    for built in (group.training, group.evaluation):
        ops = flex_ops(plan_pb2.ClientOnlyPlan.FromString(built.client_plan).tflite_graph)
        assert ops.keys() <= supported_ops().keys()
        assert int(built.task.min_client_version) >= 341812000
    (warning,) = [text for text in group.report.warnings if text.startswith("training: lowered")]
    assert "2 Conv2DBackpropFilter" in warning
    assert "2 MaxPoolGrad" in warning
    assert "bytes instead of" in warning
    assert_same_updates(updates_of(load_functional_model(tutorial_model), examples=8))


def test_nothing_is_lowered_unless_asked_where_the_check_is_off(config, cnn_model):
    def ops(choice):
        group = build_task_group(cnn_model, config, Flags(skip_flex_ops_check=True), lower_ops=choice)
        return flex_ops(plan_pb2.ClientOnlyPlan.FromString(group.training.client_plan).tflite_graph)

    assert "Conv2DBackpropFilter" in ops(LowerOps.AUTO)
    assert "Conv2DBackpropFilter" not in ops(LowerOps.ALWAYS)


def test_a_build_that_must_not_lower_names_the_offenders(config, cnn_model):
    with pytest.raises(BuildFailed) as caught:
        build_task_group(cnn_model, config, lower_ops=LowerOps.NEVER)
    assert caught.value.reason == Reason.OPS_NOT_SUPPORTED
    assert "{'Conv2DBackpropFilter': 'Conv2D" in caught.value.detail


def test_an_operation_that_the_table_has_is_not_lowered(config, cnn_model):
    table = "\n".join(f"{version},{op}" for op, version in supported_ops().items()) + "\n400000000,Conv2DBackpropFilter"
    group = build_task_group(cnn_model, config, op_table=table)
    (training,) = [text for text in group.report.warnings if text.startswith("training: lowered")]
    assert "1 SparseSoftmaxCrossEntropyWithLogits;" in training
    assert "Conv2DBackpropFilter" not in training
    assert group.training.task.min_client_version == "400000000"
