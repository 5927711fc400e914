"""The device's half of metrics against Keras: alone batch by batch, and inside plans as devices run them."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from fedcompute.builder.build import build_task_group
from fedcompute.builder.client_metrics import METRIC_UPDATES, update_metrics
from fedcompute.builder.composition import ALLOWED_METRICS, choose_metrics
from fedcompute.builder.metric_batch import Batch, Misfit
from fedcompute.builder.op_check import flex_ops, supported_ops
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.contribution import add, clip_norm_told, empty_sum, read_contribution
from fedcompute.learning.metrics import METRICS, definition
from fedcompute.learning.plans import read_plan
from fedcompute.learning.process import client_checkpoint, round_update
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.models.saved_model import save_functional_model
from fedcompute.privacy.noise import SystemNoise
from fedcompute.protos import plan_pb2, task_builder_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

KERAS = {
    "auc-roc": lambda: keras.metrics.AUC(curve="ROC"),
    "auc-pr": lambda: keras.metrics.AUC(curve="PR"),
    "accuracy": keras.metrics.Accuracy,
    "binary_accuracy": keras.metrics.BinaryAccuracy,
    "binary_crossentropy": keras.metrics.BinaryCrossentropy,
    "binary_crossentropy_from_logits": lambda: keras.metrics.BinaryCrossentropy(from_logits=True),
    "categorical_accuracy": keras.metrics.CategoricalAccuracy,
    "categorical_crossentropy": keras.metrics.CategoricalCrossentropy,
    "categorical_crossentropy_from_logits": lambda: keras.metrics.CategoricalCrossentropy(from_logits=True),
    "mean": keras.metrics.Mean,
    "mean_absolute_error": keras.metrics.MeanAbsoluteError,
    "mean_absolute_percentage_error": keras.metrics.MeanAbsolutePercentageError,
    "mean_squared_error": keras.metrics.MeanSquaredError,
    "mean_squared_logarithmic_error": keras.metrics.MeanSquaredLogarithmicError,
    "precision": keras.metrics.Precision,
    "recall": keras.metrics.Recall,
    "root_mean_squared_error": keras.metrics.RootMeanSquaredError,
    "sparse_categorical_accuracy": keras.metrics.SparseCategoricalAccuracy,
    "sparse_categorical_crossentropy": keras.metrics.SparseCategoricalCrossentropy,
    "sparse_categorical_crossentropy_from_logits": lambda: keras.metrics.SparseCategoricalCrossentropy(
        from_logits=True
    ),
}
SPARSE = [name for name in KERAS if name.startswith("sparse")]
PER_CLASS = [name for name in KERAS if name.startswith("categorical")]
PER_OUTPUT = [name for name in KERAS if name not in (*SPARSE, *PER_CLASS, "mean")]


def close(value):
    return pytest.approx(value, rel=1e-6, abs=1e-6)


def by_keras(name, batches):
    metric = KERAS[name]()
    for label, prediction in batches:
        with warnings.catch_warnings():
            # It advises against a single class.
            warnings.simplefilter("ignore", SyntaxWarning)
            metric.update_state(*([prediction] if name == "mean" else [label, prediction]))
    return float(metric.result())


def batch_of(label, *outputs):
    return Batch(tf.constant(label), tuple(map(tf.constant, outputs)), tf.constant(2.0))


def measured(name, devices):
    """The value after several devices with several batches each."""
    leaves = definition(name).state
    total = [np.zeros(leaf.shape) for leaf in leaves]
    for batches in devices:
        state = tuple(tf.zeros(leaf.shape) for leaf in leaves)
        for label, prediction in batches:
            (state,) = update_metrics([name], [state], batch_of(label, prediction))
        assert [(tuple(s.shape), s.dtype) for s in state] == [(leaf.shape, tf.float32) for leaf in leaves]
        total = [sums + leaf.numpy() for sums, leaf in zip(total, state, strict=True)]
    return definition(name).finalize(total)


def split(label, prediction, sizes=(5, 4, 1, 7)):
    """The examples in batches, and these on two devices."""
    ends = np.cumsum(sizes)
    batches = [(label[end - size : end], prediction[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    return [batches[:3], batches[3:]]


def scores(rng, shape, name):
    if "logits" in name:
        return rng.normal(scale=8, size=shape).astype(np.float32)
    return rng.random(shape, np.float32)


@pytest.mark.parametrize("name", [*PER_OUTPUT, "mean"])
@pytest.mark.parametrize(
    ("label_shape", "shape"),
    [((17, 1), (17, 1)), ((17, 1), (17,)), ((17,), (17, 1)), ((17, 4), (17, 4)), ((17, 3, 2), (17, 3, 2))],
)
def test_metrics_over_outputs_equal_those_of_keras(name, label_shape, shape):
    rng = np.random.default_rng(7)
    label, prediction = rng.integers(0, 2, label_shape), scores(rng, shape, name)
    columns = [
        (label[:, None] if label.ndim == 1 else label, prediction[:, None] if prediction.ndim == 1 else prediction)
    ]
    assert measured(name, split(label, prediction)) == close(by_keras(name, columns))


@pytest.mark.parametrize("name", PER_OUTPUT)
def test_two_vectors_count_as_columns(name):
    rng = np.random.default_rng(8)
    label, prediction = rng.integers(0, 2, 17), scores(rng, 17, name)
    assert measured(name, split(label, prediction)) == close(by_keras(name, [(label[:, None], prediction[:, None])]))


@pytest.mark.parametrize("name", [n for n in PER_OUTPUT if "error" in n])
def test_regression_errors_equal_those_of_keras(name):
    rng = np.random.default_rng(9)
    label, prediction = rng.normal(size=(17, 2)).astype(np.float32), rng.normal(size=(17, 2)).astype(np.float32)
    assert measured(name, split(label, prediction)) == close(by_keras(name, [(label, prediction)]))


@pytest.mark.parametrize("name", PER_CLASS)
@pytest.mark.parametrize("shape", [(17, 4), (17, 2, 3), (17, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_metrics_over_one_hot_labels_equal_those_of_keras(name, shape, dtype):
    rng = np.random.default_rng(10)
    label = np.eye(shape[-1], dtype=dtype)[rng.integers(0, shape[-1], shape[:-1])]
    prediction = scores(rng, shape, name)
    assert measured(name, split(label, prediction)) == close(by_keras(name, [(label, prediction)]))


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("label_shape", [(17, 1), (17,)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_metrics_over_class_numbers_equal_those_of_keras(name, label_shape, dtype):
    rng = np.random.default_rng(11)
    label, prediction = rng.integers(0, 4, label_shape).astype(dtype), scores(rng, (17, 4), name)
    assert measured(name, split(label, prediction)) == close(by_keras(name, [(label, prediction)]))


@pytest.mark.parametrize("name", SPARSE)
def test_metrics_over_sequences_of_class_numbers_equal_those_of_keras(name):
    rng = np.random.default_rng(12)
    label, prediction = rng.integers(0, 4, (17, 3)), scores(rng, (17, 3, 4), name)
    assert measured(name, split(label, prediction)) == close(by_keras(name, [(label, prediction)]))


@pytest.mark.parametrize("name", [*PER_OUTPUT, "mean"])
@pytest.mark.parametrize("kind", [0, 1])
def test_labels_of_one_kind_give_what_keras_gives(name, kind):
    rng = np.random.default_rng(13)
    label, prediction = np.full((17, 1), kind), scores(rng, (17, 1), name)
    assert measured(name, split(label, prediction)) == close(by_keras(name, [(label, prediction)]))


@pytest.mark.parametrize("name", ["auc-roc", "auc-pr", "precision", "recall", "binary_crossentropy", "binary_accuracy"])
def test_scores_on_a_threshold_and_outside_of_it_count_as_in_keras(name):
    grid = np.arange(200, dtype=np.float32) / np.float32(199)
    prediction = np.concatenate([grid, [-2, 0, 0.5, 1, 3]]).astype(np.float32)[:, None]
    label = np.arange(len(prediction))[:, None] % 2
    assert measured(name, [[(label, prediction)]]) == close(by_keras(name, [(label, prediction)]))


def test_large_logits_keep_their_crossentropy():
    label, logits = np.array([[0], [1], [0], [1]]), np.array([[-200], [-200], [200], [200]], np.float32)
    assert measured("binary_crossentropy_from_logits", [[(label, logits)]]) == 100


def test_a_class_that_is_ruled_out_leaves_the_crossentropy_of_the_others():
    logits = np.array([[0, -np.inf, 0]], np.float32)
    value = measured("sparse_categorical_crossentropy_from_logits", [[(np.array([[2]]), logits)]])
    assert value == close(np.log(2))


def test_a_label_that_is_no_class_is_never_a_perfect_hit():
    for label in (-1, 3):
        value = measured(
            "sparse_categorical_crossentropy", [[(np.array([[label]]), np.full((1, 3), 1 / 3, np.float32))]]
        )
        assert np.isnan(value)


def test_scores_that_are_all_zero_have_a_finite_crossentropy():
    label, prediction = np.eye(3, dtype=np.float32), np.zeros((3, 3), np.float32)
    assert measured("categorical_crossentropy", [[(label, prediction)]]) == close(-np.log(1e-7))


def test_loss_is_weighted_by_the_size_of_the_batch():
    state = METRIC_UPDATES["loss"]((tf.constant(1.0), tf.constant(1.0)), batch_of(np.zeros((7, 1)), np.zeros((7, 1))))
    assert [float(leaf) for leaf in state] == [15, 8]


def test_every_allowed_metric_has_both_halves():
    assert tuple(METRICS) == ALLOWED_METRICS == tuple(KERAS)
    assert METRIC_UPDATES.keys() == {*METRICS, "loss"}


@pytest.mark.parametrize(
    ("names", "label_shape", "shape", "words"),
    [
        ([*PER_OUTPUT, *PER_CLASS], (7, 1), (7, 3), "for class numbers take a sparse_categorical metric"),
        (PER_OUTPUT, (7, 2), (7, 3), "one label per output is needed ("),
        ([*SPARSE, *PER_CLASS], (7, 1), (7,), "one output per class is needed"),
        (SPARSE, (7, 3), (7, 3), "one class number for all outputs"),
        (SPARSE[1:], (7, 1), (7, 1), "binary_crossentropy"),
    ],
)
def test_labels_and_outputs_that_do_not_belong_together_are_refused(names, label_shape, shape, words):
    batch = batch_of(np.zeros(label_shape, np.int64), np.zeros(shape, np.float32))
    for name in names:
        with pytest.raises(Misfit):
            METRIC_UPDATES[name](tuple(tf.zeros(leaf.shape) for leaf in METRICS[name].state), batch)
    with pytest.raises(ArtifactInvalid) as caught:
        update_metrics(names, [tuple(tf.zeros(leaf.shape) for leaf in METRICS[name].state) for name in names], batch)
    assert caught.value.reason == Reason.MODEL_UNSUPPORTED
    assert all(repr(name) in caught.value.detail for name in names)
    assert words in caught.value.detail


def test_labels_that_are_no_numbers_and_outputs_of_unknown_shape_are_refused_by_metric():
    state = (tf.constant(0.0), tf.constant(0.0))
    strings = batch_of(np.array([[b"cat"]]), np.ones((1, 1), np.float32))
    with pytest.raises(ArtifactInvalid, match="cannot measure 'accuracy' on this model: labels have type string"):
        update_metrics(["accuracy"], [state], strings)
    with tf.Graph().as_default():
        for shape in (None, [], [None, None]):
            output = tf.compat.v1.placeholder(tf.float32, shape)
            with pytest.raises(ArtifactInvalid, match="cannot measure 'mean' on this model: every dimension"):
                update_metrics(["mean"], [state], Batch(tf.zeros([1, 1]), (output,), tf.constant(0.0)))


def test_of_three_outputs_the_third_is_measured_and_of_two_none():
    zeros, ones = np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32)
    state = (tf.constant(0.0), tf.constant(0.0))
    ((total, count),) = update_metrics(["mean"], [state], batch_of(zeros, zeros, zeros, ones))
    assert (float(total), float(count)) == (2, 2)
    with pytest.raises(ArtifactInvalid, match="cannot measure 'mean' on this model: the model has 2 outputs"):
        update_metrics(["mean"], [state], batch_of(zeros, zeros, ones))
    update_metrics(["loss"], [state], batch_of(zeros, zeros, ones))


def saved_matrix(path, outputs, y_spec, predict):
    """A saved model of one matrix [4, outputs] whose loss counts for nothing."""
    rng = np.random.default_rng(14)
    weight = rng.normal(size=(4, outputs)).astype(np.float32)
    model = FunctionalModel(
        (weight,),
        (),
        tf.TensorSpec([None, 4]),
        y_spec,
        lambda weights, x, training: predict(tf.matmul(x, weights[0][0])),
        lambda output, label: tf.reduce_mean(tf.square(tf.nest.flatten(output)[0])),
    )
    save_functional_model(model, path)
    return weight


def one_hot(rng, count):
    return np.eye(3, dtype=np.float32)[rng.integers(0, 3, count)]


MODELS = {
    "one-hot labels, probabilities": (
        3,
        tf.TensorSpec([None, 3], tf.float32),
        tf.nn.softmax,
        one_hot,
        [*PER_OUTPUT, *PER_CLASS, "mean"],
    ),
    "class numbers, three outputs": (
        3,
        tf.TensorSpec([None, 1], tf.int64),
        lambda logits: (logits[:, 0], tf.zeros_like(logits), tf.nn.softmax(logits)),
        lambda rng, count: rng.integers(0, 3, (count, 1)),
        [*SPARSE, "mean"],
    ),
    "yes or no, a vector": (
        1,
        tf.TensorSpec([None, 1], tf.int64),
        lambda logits: tf.sigmoid(logits[:, 0]),
        lambda rng, count: rng.integers(0, 2, (count, 1)),
        [*PER_OUTPUT, "mean"],
    ),
}


@pytest.mark.parametrize("form", MODELS)
def test_plans_that_measure_everything_give_what_keras_gives(form, config, example, tmp_path):
    from fedcompute.device.plans.plan_runner import PlanRunner

    outputs, y_spec, predict, labels, names = MODELS[form]
    weight = saved_matrix(tmp_path / "model", outputs, y_spec, predict)
    learning = config.federated_learning.learning_process
    # So slow that the model that is measured stays the same through the pass.
    learning.client_learning_rate = 1e-30
    del learning.metrics[:]
    for name in names:
        learning.metrics.add(name=name)
    group = build_task_group(tmp_path / "model", config)
    assert group.report.metric_results.accepted_metrics == ", ".join(names)

    rng = np.random.default_rng(15)
    devices = []
    for count in (11, 6, 0):
        x, y = rng.normal(size=(count, 4)).astype(np.float32), labels(rng, count)
        devices.append((x, y, [example(x=row, y=label) for row, label in zip(x, y, strict=True)]))
    x, y = (np.concatenate(parts) for parts in list(zip(*devices, strict=True))[:2])
    prediction = tf.nest.flatten(predict(tf.constant(x) @ weight))[-1].numpy()
    prediction = prediction[:, None] if prediction.ndim == 1 else prediction
    expected = {name: by_keras(name, [(y, prediction)]) for name in names}

    runner = PlanRunner()
    for built, prefix in ((group.training, "server/client_work/train"), (group.evaluation, "server/eval")):
        client_plan = plan_pb2.ClientOnlyPlan.FromString(built.client_plan)
        assert flex_ops(client_plan.tflite_graph).keys() <= supported_ops().keys()
        process = read_plan(built.plan).learning_process
        state = read_checkpoint(group.training.checkpoint)
        told = client_checkpoint(process, state)
        received, clip_norm = write_checkpoint(told), clip_norm_told(process, told)
        total = empty_sum(process, b"digest", clip_norm)
        for *_, examples in devices:
            update = read_checkpoint(runner.run(client_plan, received, examples).update)
            total = add(total, read_contribution(process, update, clip_norm))
        metrics = dict(round_update(process, state, total, SystemNoise()).metrics)
        metrics.pop("server/finalizer/update_non_finite", None)
        assert list(metrics) == [f"{prefix}/{name}" for name in [*names, "loss"]]
        for name in names:
            assert metrics[f"{prefix}/{name}"] == close(expected[name]), name
    runner.close()


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("form", MODELS)
def test_the_kernels_of_phones_without_tensorflow_give_what_keras_gives(form):
    outputs, y_spec, predict, labels, names = MODELS[form]
    rng = np.random.default_rng(16)
    logits, y = rng.normal(size=(9, outputs)).astype(np.float32), labels(rng, 9)

    @tf.function(input_signature=[tf.TensorSpec([None, outputs]), y_spec], autograph=False)
    def measure(logits, label):
        batch = Batch(label, tuple(tf.nest.flatten(predict(logits))), tf.constant(0.0))
        states = update_metrics(names, [[tf.zeros(leaf.shape) for leaf in METRICS[n].state] for n in names], batch)
        return {f"{name}/{i}": leaf for name, state in zip(names, states, strict=True) for i, leaf in enumerate(state)}

    module = tf.Module()
    module.measure = measure
    converter = tf.lite.TFLiteConverter.from_concrete_functions([measure.get_concrete_function()], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    runner = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner()
    found = runner(logits=logits, label=y)
    prediction = tf.nest.flatten(predict(tf.constant(logits)))[-1].numpy().reshape((9, -1))
    for name in names:
        state = [found[f"{name}/{index}"].astype(np.float64) for index in range(len(METRICS[name].state))]
        assert METRICS[name].finalize(state) == close(by_keras(name, [(y, prediction)])), name


def test_a_build_names_every_metric_that_does_not_fit(config, dense_model):
    learning = config.federated_learning.learning_process
    for name in ("precision", "mean", "categorical_accuracy"):
        learning.metrics.add(name=name)
    with pytest.raises(ArtifactInvalid) as caught:
        build_task_group(dense_model, config, task_builder_pb2.ExperimentFlags(skip_dp_check=True))
    detail = caught.value.detail
    assert detail == (
        "cannot measure 'precision', 'categorical_accuracy' on this model: one label per output is needed; for class "
        "numbers take a sparse_categorical metric (labels [?, 1], outputs [?, 3])"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("auc", "did you mean 'auc-roc' or 'auc-pr'?"),
        ("Recall", "did you mean 'recall'?"),
        ("mse", "did you mean 'mean_squared_error'?"),
        ("AUC_ROC", "did you mean 'auc-roc'?"),
        ("sparse_categorical_acurracy", "did you mean 'sparse_categorical_accuracy'?"),
        ("loss", "always measured"),
        ("f1", "allowed are auc-roc, auc-pr, accuracy"),
        ("", "allowed are auc-roc"),
    ],
)
def test_a_rejected_metric_is_left_out_with_the_nearest_allowed_name(name, words):
    choice = choose_metrics(["recall", name, "mean"])
    assert (choice.accepted, choice.rejected) == (("recall", "mean"), (name,))
    (warning,) = choice.warnings
    assert warning.startswith(f"metric {name!r} is left out: ")
    assert words in warning


def test_of_a_metric_named_twice_the_first_counts_and_the_report_warns(config, dense_model):
    learning = config.federated_learning.learning_process
    for name in ("mean", "sparse_categorical_accuracy", "auc", "auc"):
        learning.metrics.add(name=name)
    report = build_task_group(dense_model, config).report
    assert report.metric_results.accepted_metrics == "sparse_categorical_accuracy, mean"
    assert report.metric_results.rejected_metrics == "auc"
    assert any("'sparse_categorical_accuracy' is named more than once" in warning for warning in report.warnings)
