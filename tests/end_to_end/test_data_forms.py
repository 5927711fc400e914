"""Every form of input, from the builder to a device's update, against arithmetic."""

from collections import OrderedDict

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.builder.build import build_task_group
from fedcompute.builder.config import read_config
from fedcompute.device.developer.examples import training_example
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.errors import ArtifactInvalid, DeviceRunFailed, Reason
from fedcompute.learning.process import client_checkpoint
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.models.saved_model import save_functional_model
from fedcompute.protos import plan_pb2, task_builder_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

CONFIG = """
mode: {mode}
population_name: "forms"
label_name: "{label}"
policies {{
  model_release_policy {{ num_max_training_rounds: 1 }}
  dataset_policy {{ batch_size: 2 max_training_batches_per_client: {limit} }}
}}
federated_learning {{
  learning_process {{ client_learning_rate: 0.125 runtime_config {{ report_goal: 1 {training_uri} }} }}
  evaluation {{ source_training_task_id: 1 report_goal: 1 {evaluation_uri} }}
}}
differential_privacy {{ noise_multiplier: 1 clip_norm: 1 }}
"""
FLAGS = task_builder_pb2.ExperimentFlags(skip_dp_check=True, skip_dp_aggregator=True, skip_flex_ops_check=True)
LABEL = tf.TensorSpec([None, 1], tf.int64)


@pytest.fixture(scope="module")
def runner():
    runner = PlanRunner()
    yield runner
    runner.close()


@pytest.fixture
def build(tmp_path):
    """`build(x_spec, feature, y_spec=, label=, limit=, ...)`: a task group of the model weight * feature(x)."""

    def make(x_spec, feature, *, y_spec=LABEL, label="", limit=0, mode="TRAINING_AND_EVAL", uris=("", "")):
        def predict(weights, x, training):
            return weights[0][0] * feature(x)

        def loss(output, answer):
            return tf.reduce_mean(tf.square(output - tf.cast(answer[:, 0], tf.float32)))

        model = FunctionalModel((np.array([0.5], np.float32),), (), x_spec, y_spec, predict, loss)
        save_functional_model(model, tmp_path / "model")
        training_uri, evaluation_uri = (f'example_selector_uri: "{uri}"' if uri else "" for uri in uris)
        text = CONFIG.format(
            mode=mode, label=label, limit=limit, training_uri=training_uri, evaluation_uri=evaluation_uri
        )
        return build_task_group(tmp_path / "model", read_config(text.encode()).config, FLAGS)

    return make


def updates(runner, group, examples):
    """The updates of the training plan, and of the evaluation plan with the training's initial state."""
    state = read_checkpoint(group.training.checkpoint)
    found = []
    for built in (group.training, group.evaluation):
        process = plan_pb2.Plan.FromString(built.plan).learning_process
        received = write_checkpoint(client_checkpoint(process, state))
        plan = plan_pb2.ClientOnlyPlan.FromString(built.client_plan)
        found.append(read_checkpoint(runner.run(plan, received, examples).update))
    return found


def assert_trained_on(found, features, labels):
    """Training moved by batches of two, evaluation measured: both on exactly these features and labels."""
    training, evaluation = found
    weight, loss = 0.5, 0.0
    for start in range(0, len(features), 2):
        x, y = np.array(features[start : start + 2], float), np.array(labels[start : start + 2], float)
        loss += float(np.sum((weight * x - y) ** 2))
        weight -= 0.125 * float(np.mean(2 * (weight * x - y) * x))
    np.testing.assert_allclose(training["update/1/loss/0"], loss, rtol=1e-4)
    (delta,) = [value for name, value in training.items() if value.shape == (1,)]
    np.testing.assert_allclose(delta, [0.5 - weight], rtol=1e-4)
    x, y = np.array(features, float), np.array(labels, float)
    (measured,) = [value for name, value in evaluation.items() if name.endswith("loss/0")]
    np.testing.assert_allclose(measured, np.sum((0.5 * x - y) ** 2), rtol=1e-4)
    assert [int(value) for name, value in evaluation.items() if name.endswith("loss/1")] == [len(features)]


def test_features_in_no_order_of_three_types_with_an_integer_label(build, runner):
    x_spec = OrderedDict(
        zeta=tf.TensorSpec([None, 1], tf.int32),
        alpha=tf.TensorSpec([None, 2], tf.float32),
        word=tf.TensorSpec([None, 1], tf.string),
    )

    def feature(x):
        assert list(x) == ["zeta", "alpha", "word"]
        assert x["zeta"].dtype == tf.int32
        length = tf.cast(tf.strings.to_number(x["word"][:, 0]), tf.float32)
        return tf.cast(x["zeta"][:, 0], tf.float32) + 0.5 * x["alpha"][:, 1] + length

    group = build(x_spec, feature, y_spec=tf.TensorSpec([None, 1], tf.int32), label="clicked")
    rows = [(1, 0.5, b"0.25", 1), (-2, 1.0, b"1", 0), (3, -1.0, b"-2", 2)]
    examples = [
        training_example({"zeta": z, "alpha": np.array([9, a], np.float32), "word": w, "clicked": y})
        for z, a, w, y in rows
    ]
    features = [z + 0.5 * a + float(w) for z, a, w, _ in rows]
    assert_trained_on(updates(runner, group, examples), features, [row[3] for row in rows])


def test_a_dictionary_of_the_one_feature_x_stays_a_dictionary_and_its_label_has_its_own_name(build, runner):
    group = build(OrderedDict(x=tf.TensorSpec([None, 1])), lambda x: x["x"][:, 0], label="my_label")
    examples = [training_example({"x": float(i), "my_label": i % 2, "y": 77}) for i in range(3)]
    assert_trained_on(updates(runner, group, examples), [0, 1, 2], [0, 1, 0])


def test_a_flat_list_takes_the_shape_of_its_tensor_and_a_configured_label_name_is_ignored(build, runner):
    group = build(tf.TensorSpec([None, 2, 3, 1]), lambda x: x[:, 1, 2, 0], label="ignored")
    examples = [training_example({"x": np.arange(6, dtype=np.float32) * i / 5, "y": i}) for i in range(4)]
    assert_trained_on(updates(runner, group, examples), [0, 1, 2, 3], [0, 1, 2, 3])
    with pytest.raises(DeviceRunFailed) as caught:
        updates(runner, group, [training_example({"x": np.zeros(5, np.float32), "y": 1})])
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED


@pytest.mark.parametrize(("limit", "used"), [(0, 7), (-5, 7), (1, 2), (3, 6), (4, 7), (100, 7)])
def test_the_limit_counts_batches_and_holds_for_training_and_evaluation(build, runner, limit, used):
    group = build(tf.TensorSpec([None, 1]), lambda x: x[:, 0], limit=limit)
    examples = [training_example({"x": float(i) / 4, "y": i % 3}) for i in range(7)]
    labels = [i % 3 for i in range(7)]
    assert_trained_on(updates(runner, group, examples), [i / 4 for i in range(used)], labels[:used])


@pytest.mark.parametrize(
    ("mode", "uris", "expected"),
    [
        ("TRAINING_AND_EVAL", ("app://train", "app://eval"), {"training": "app://train", "evaluation": "app://eval"}),
        ("TRAINING_AND_EVAL", ("", ""), {"training": "", "evaluation": ""}),
        ("TRAINING_ONLY", ("app://train", "app://eval"), {"training": "app://train"}),
        ("EVAL_ONLY", ("app://train", "app://eval"), {"evaluation": "app://eval"}),
    ],
)
def test_each_task_asks_for_its_own_collection_and_the_selector_is_there_without_one(build, mode, uris, expected):
    group = build(tf.TensorSpec([None, 1]), lambda x: x[:, 0], mode=mode, uris=uris)
    for kind in ("training", "evaluation"):
        built = getattr(group, kind)
        assert (built is not None) == (kind in expected)
        if built is None:
            continue
        spec = plan_pb2.ClientOnlyPlan.FromString(built.client_plan).phase.tensorflow_spec
        assert spec.HasField("example_selector")
        assert spec.example_selector.collection_uri == expected[kind]
        assert not spec.example_selector.HasField("criteria")
        assert not spec.example_selector.HasField("resumption_token")


@pytest.mark.parametrize(
    ("x_spec", "label", "words"),
    [
        (OrderedDict(a=tf.TensorSpec([None, 1])), "", "Label name cannot be empty"),
        (OrderedDict(a=tf.TensorSpec([None, 1]), b=tf.TensorSpec([None, 1], tf.float64)), "y", "'b' has type float64"),
        (OrderedDict(a=tf.TensorSpec([None, 1]), b=tf.TensorSpec([None, 1], tf.bool)), "y", "'b' has type bool"),
        (tf.TensorSpec([None, 1], tf.float16), "", "'x' has type float16"),
    ],
)
def test_what_no_example_can_hold_is_refused_at_build_time_by_the_feature_s_name(build, x_spec, label, words):
    def feature(x):
        return tf.cast(x["a"] if isinstance(x, dict) else x, tf.float32)[:, 0]

    with pytest.raises(ArtifactInvalid, match=words):
        build(x_spec, feature, label=label)


def test_a_label_that_no_example_can_hold_is_refused_by_its_name(build):
    with pytest.raises(ArtifactInvalid, match="'answer' has type float64"):
        build(
            OrderedDict(a=tf.TensorSpec([None, 1])),
            lambda x: x["a"][:, 0],
            y_spec=tf.TensorSpec([None, 1], tf.float64),
            label="answer",
        )
