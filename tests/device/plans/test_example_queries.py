"""Plans of federated analytics: one example of named vectors in, a checkpoint of rank-1 tensors out."""

import subprocess
import sys

import numpy as np
import pytest

from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.protos.example_query_result_pb2 import ExampleQueryResult
from fedcompute.tensors.checkpoint import read_checkpoint

SPEC = plan_pb2.ExampleQuerySpec.OutputVectorSpec
# Data type -> list of values that holds it, example values, and the tensor's type.
TYPES = {
    "INT32": ("int32_values", [-(2**31), 0, 2**31 - 1], np.int32),
    "INT64": ("int64_values", [-(2**63), 7, 2**63 - 1], np.int64),
    "BOOL": ("bool_values", [True, False], np.bool_),
    "FLOAT": ("float_values", [0.5, float("inf"), -1e30], np.float32),
    "DOUBLE": ("double_values", [0.1, -1e300], np.float64),
    "BYTES": ("bytes_values", [b"\xff\x00", b""], object),
    "STRING": ("string_values", ["é", ""], object),
}


@pytest.fixture(scope="module")
def runner():
    runner = PlanRunner()
    yield runner
    runner.close()


def query_plan(*queries):
    """A plan of queries, each {output name: (vector name, name of its data type)}."""
    plan = plan_pb2.ClientOnlyPlan()
    for outputs in queries:
        query = plan.phase.example_query_spec.example_queries.add()
        for name, (vector, data_type) in outputs.items():
            query.output_vector_specs[name].vector_name = vector
            query.output_vector_specs[name].data_type = SPEC.DataType.Value(data_type)
            plan.phase.federated_example_query.aggregations[name].tf_v1_checkpoint_aggregation.SetInParent()
    return plan


def answer(**vectors):
    """A serialized result of vectors, each (list of values, values)."""
    result = ExampleQueryResult()
    for name, (field, values) in vectors.items():
        getattr(result.vector_data.vectors[name], field).value.extend(values)
    return result.SerializeToString()


def test_every_data_type_comes_out_under_its_output_name_with_its_own_type(runner):
    plan = query_plan({f"out/{name}": (name.lower(), name) for name in TYPES})
    example = answer(**{name.lower(): (field, values) for name, (field, values, _) in TYPES.items()})

    result = runner.run(plan, b"", [example, b"never looked at"])

    update = read_checkpoint(result.update)
    assert set(update) == {f"out/{name}" for name in TYPES}
    for name, (_, values, dtype) in TYPES.items():
        expected = [value.encode() if isinstance(value, str) else value for value in values]
        assert update[f"out/{name}"].dtype == dtype
        np.testing.assert_array_equal(update[f"out/{name}"], np.array(expected, dtype))
    assert (result.example_count, result.example_bytes) == (1, len(example))


def test_tensorflow_reads_what_a_query_wrote(runner, tmp_path):
    import tensorflow as tf

    plan = query_plan({"counts": ("seen", "INT64"), "words": ("words", "STRING")})
    example = answer(seen=("int64_values", [3, -1]), words=("string_values", ["a", "bc"]))
    (tmp_path / "update").write_bytes(runner.run(plan, b"", [example]).update)
    counts, words = tf.raw_ops.RestoreV2(
        prefix=str(tmp_path / "update"),
        tensor_names=["counts", "words"],
        shape_and_slices=["", ""],
        dtypes=[tf.int64, tf.string],
    )
    assert counts.numpy().tolist() == [3, -1]
    assert words.numpy().tolist() == [b"a", b"bc"]


def test_bytes_are_read_from_the_list_of_strings_too(runner):
    plan = query_plan({"out": ("v", "BYTES")})
    update = read_checkpoint(runner.run(plan, b"", [answer(v=("string_values", ["as phones do"]))]).update)
    assert update["out"].tolist() == [b"as phones do"]


def test_an_empty_vector_is_a_tensor_without_elements(runner):
    result = ExampleQueryResult()
    result.vector_data.vectors["v"].float_values.SetInParent()
    update = read_checkpoint(runner.run(query_plan({"out": ("v", "FLOAT")}), b"", [result.SerializeToString()]).update)
    assert (update["out"].shape, update["out"].dtype) == ((0,), np.float32)


def test_several_queries_read_the_same_example(runner):
    plan = query_plan({"a": ("v", "INT32")}, {"b": ("v", "INT32"), "c": ("w", "BOOL")})
    example = answer(v=("int32_values", [1, 2]), w=("bool_values", [True]))
    result = runner.run(plan, b"", [example])
    update = read_checkpoint(result.update)
    assert [update[name].tolist() for name in "abc"] == [[1, 2], [1, 2], [True]]
    assert result.example_count == 1


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "no example"),
        ([b""], "query 0 wants vector 'v' of INT64; it is not among the example's 0 vectors"),
        ([b"\x0a\xffjunk"], "an example of 6 bytes that is no ExampleQueryResult"),
        ([answer(w=("int64_values", [1]), u=("int64_values", [1]))], "not among the example's 2 vectors"),
        ([answer(v=("int32_values", [1]))], "query 0 wants vector 'v' of INT64; the example has int32_values"),
        ([answer(v=("string_values", ["secret"]))], "the example has string_values"),
    ],
    ids=["none", "empty", "unparsable", "missing", "other width", "other kind"],
)
def test_an_example_that_does_not_answer_is_named_with_what_it_lacks(runner, examples, words):
    with pytest.raises(DeviceRunFailed) as caught:
        runner.run(query_plan({"out": ("v", "INT64")}), b"", examples)
    assert caught.value.reason is Reason.EXAMPLES_FAILED
    assert words in caught.value.detail
    assert "secret" not in caught.value.detail


def test_a_vector_without_values_is_named(runner):
    result = ExampleQueryResult()
    result.vector_data.vectors["v"].SetInParent()
    with pytest.raises(DeviceRunFailed, match="the example has no values") as caught:
        runner.run(query_plan({"out": ("v", "INT64")}), b"", [result.SerializeToString()])
    assert caught.value.reason is Reason.EXAMPLES_FAILED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda phase: phase.ClearField("federated_example_query"), "no federated_example_query router"),
        (lambda phase: phase.federated_compute.SetInParent(), "no federated_example_query router"),
        (lambda phase: phase.federated_example_query.aggregations.pop("out"), "output out has no tf_v1_checkpoint"),
        (
            lambda phase: phase.federated_example_query.aggregations["out"].secure_aggregation.SetInParent(),
            "output out has no tf_v1_checkpoint",
        ),
        (lambda phase: phase.example_query_spec.ClearField("example_queries"), "no outputs"),
        (
            lambda phase: phase.example_query_spec.example_queries.add().CopyFrom(
                phase.example_query_spec.example_queries[0]
            ),
            "2 outputs have 1 names",
        ),
        (lambda phase: set_type(phase, 0), "data type 0"),
        (lambda phase: set_type(phase, 8), "data type 8"),
    ],
)
def test_a_plan_whose_parts_do_not_fit_is_refused_before_its_example_is_read(runner, change, words):
    plan = query_plan({"out": ("v", "INT64")})
    change(plan.phase)
    for refused in (lambda: runner.run(plan, b"", [b"\x0a\xff"]), lambda: runner.prepare(plan)):
        with pytest.raises(DeviceRunFailed, match=words) as caught:
            refused()
        assert caught.value.reason is Reason.PLAN_ARGUMENT_INVALID


def set_type(phase, data_type):
    phase.example_query_spec.example_queries[0].output_vector_specs["out"].data_type = data_type


def test_an_update_over_its_limit_is_refused_however_often_a_vector_is_wanted(runner):
    example = answer(v=("double_values", [0.5] * 1000))
    once = runner.run(query_plan({"out": ("v", "DOUBLE")}), b"", [example], update_bytes_limit=9000)
    assert len(once.update) > 8000
    many = query_plan({f"out{i}": ("v", "DOUBLE") for i in range(1000)})
    for plan, limit in ((many, 9000), (query_plan({"out": ("v", "DOUBLE")}), len(once.update) - 1)):
        with pytest.raises(DeviceRunFailed, match=str(limit)) as caught:
            runner.run(plan, b"", [example], update_bytes_limit=limit)
        assert caught.value.reason is Reason.UPLOAD_TOO_LARGE


def test_a_query_is_answered_without_tensorflow(tmp_path):
    (tmp_path / "plan").write_bytes(query_plan({"out": ("v", "INT32")}).SerializeToString())
    (tmp_path / "example").write_bytes(answer(v=("int32_values", [5])))
    code = f"""
import sys
from pathlib import Path
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.protos import plan_pb2
runner = PlanRunner()
plan = plan_pb2.ClientOnlyPlan.FromString(Path({str(tmp_path / "plan")!r}).read_bytes())
runner.prepare(plan)
result = runner.run(plan, b"", [Path({str(tmp_path / "example")!r}).read_bytes()])
runner.close()
print(len(result.update) > 0, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
