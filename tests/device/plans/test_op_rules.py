"""Which operations a plan may bring, and that nothing of a refused plan runs."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from fedcompute.device.plans import translator
from fedcompute.device.plans.flatbuffer import read_flatbuffer
from fedcompute.device.plans.op_rules import runs_builtin, runs_flex
from fedcompute.device.plans.translator import translate
from fedcompute.errors import ArtifactInvalid, Reason


def converted(function, *specs):
    concrete = tf.function(function).get_concrete_function(*specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    converter.target_spec.experimental_select_user_tf_ops = ["ReadFile", "WriteFile", "PrintV2", "MatchingFiles"]
    converter._experimental_allow_all_select_tf_ops = True
    return converter.convert()


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda name: tf.io.read_file(name), "FlexReadFile"),
        (lambda name: tf.raw_ops.MatchingFiles(pattern=name), "FlexMatchingFiles"),
        (
            lambda name: tf.raw_ops.DatasetCardinality(input_dataset=tf.raw_ops.DatasetFromGraph(graph_def=name)),
            "FlexDatasetFromGraph",
        ),
    ],
)
def test_an_operation_that_reaches_outside_is_named_and_refused(function, named):
    flatbuffer = converted(function, tf.TensorSpec([], tf.string))
    with pytest.raises(ArtifactInvalid, match=named) as caught:
        translate(flatbuffer)
    assert caught.value.reason is Reason.OPS_NOT_SUPPORTED


def test_all_operations_that_do_not_run_are_named_together():
    def function(name):
        return tf.io.read_file(name) + tf.strings.join([tf.raw_ops.MatchingFiles(pattern=name)[0], name])

    with pytest.raises(ArtifactInvalid, match=r"do not run here: FlexMatchingFiles, FlexReadFile \["):
        translate(converted(function, tf.TensorSpec([], tf.string)))


def test_an_operation_without_a_kernel_for_its_types_is_refused_before_it_runs():
    # TensorFlow has this one for graphics processors only.
    def function(image):
        options = {"ksize": [1, 2, 2, 1], "strides": [1, 2, 2, 1], "padding": "VALID"}
        where = tf.zeros([1, 2, 2, 1], tf.int64)
        return tf.raw_ops.MaxPoolGradGradWithArgmax(input=image, grad=image, argmax=where, **options)

    with pytest.raises(ArtifactInvalid, match="FlexMaxPoolGradGradWithArgmax without a kernel for its types") as caught:
        translate(converted(function, tf.TensorSpec([1, 4, 4, 1], tf.float32)))
    assert caught.value.reason is Reason.OPS_NOT_SUPPORTED


@pytest.mark.parametrize("name", ["client_only_plan.pb", "eval_client_only_plan.pb"])
def test_every_operation_of_the_references_plans_runs(reference_plan, name):
    program = read_flatbuffer(reference_plan(name).tflite_graph)
    operators = [operator for graph in program for operator in graph.operators]
    assert len(operators) > 40
    for operator in operators:
        assert runs_builtin(operator.name) if operator.node is None else runs_flex(operator.node.op)


def test_the_page_of_operations_is_that_of_this_release():
    tool = Path(__file__).resolve().parents[3] / "tools" / "generate_op_coverage.py"
    checked = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stderr


def test_a_checkpoint_is_read_from_the_runs_own_file_only(tmp_path):
    other = str(tmp_path / "other")

    def read(name):
        del name
        return tf.raw_ops.RestoreV2(prefix=other, tensor_names=["secret"], shape_and_slices=[""], dtypes=[tf.float32])[
            0
        ]

    with pytest.raises(ArtifactInvalid, match="not the run's own") as caught:
        translate(converted(read, tf.TensorSpec([], tf.string)))
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED


def test_a_quantized_model_is_refused():
    weights = tf.constant(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    concrete = tf.function(lambda x: tf.matmul(x, weights)).get_concrete_function(tf.TensorSpec([1, 64], tf.float32))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with pytest.raises(ArtifactInvalid) as caught:
        translate(converter.convert())
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED


def test_a_graph_of_too_many_operations_is_refused(reference_plan, monkeypatch):
    flatbuffer = reference_plan("client_only_plan.pb").tflite_graph
    count = sum(len(graph.operators) for graph in read_flatbuffer(flatbuffer))
    monkeypatch.setattr(translator, "_MAX_OPERATIONS", count)
    translate(flatbuffer)
    monkeypatch.setattr(translator, "_MAX_OPERATIONS", count - 1)
    with pytest.raises(ArtifactInvalid, match=f"more than {count - 1} operations") as caught:
        translate(flatbuffer)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED


@pytest.mark.parametrize("cut", [0, 7, 8, 9, 100, 5000, 20000])
def test_a_cut_flatbuffer_is_malformed(reference_plan, cut):
    with pytest.raises(ArtifactInvalid) as caught:
        translate(reference_plan("client_only_plan.pb").tflite_graph[:cut])
    assert caught.value.reason is Reason.PLAN_MALFORMED


def test_damage_anywhere_gives_a_typed_error_or_a_graph(reference_plan):
    """A flipped byte may hit a constant, which nobody can tell; everything else must come out typed."""
    original = reference_plan("eval_client_only_plan.pb").tflite_graph
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(original), 40):
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(ArtifactInvalid):
            translate(bytes(damaged))
