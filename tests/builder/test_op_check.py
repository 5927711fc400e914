import pytest

from fedcompute.builder.op_check import flex_ops, min_client_version, supported_ops
from fedcompute.errors import BuildFailed, Reason
from fedcompute.protos import plan_pb2


def test_the_largest_version_counts_as_a_number():
    assert min_client_version({"a": "", "b": ""}, {"a": 9, "b": 10}) == "10"
    assert min_client_version({}, {}) == "0"


def test_unsupported_ops_are_listed_as_a_dictionary_with_kernel_classes():
    with pytest.raises(BuildFailed) as caught:
        min_client_version({"AsString": "X", "L2Loss": "L2LossOp<CPUDevice, float>"}, {"AsString": 1})
    assert caught.value.reason == Reason.OPS_NOT_SUPPORTED
    assert caught.value.detail == (
        "Cannot build the ClientOnlyPlan: Please contact Google to register these ops: "
        "{'L2Loss': 'L2LossOp<CPUDevice, float>'}"
    )


def test_the_table_shipped_with_us_has_the_published_ops():
    table = supported_ops()
    assert len(table) == 24
    assert (table["L2Loss"], table["ExternalDataset"]) == (341912000, 341812000)


def test_the_lowest_version_of_an_op_listed_twice_counts_and_a_bad_line_is_named():
    assert supported_ops("10,A\n\n9,A\n11,B") == {"A": 9, "B": 11}
    with pytest.raises(BuildFailed, match="line 2"):
        supported_ops("10,A\nB,11")


def test_the_reference_plans_get_their_published_versions(reference):
    for name, version in (("client_only_plan.pb", "341912000"), ("eval_client_only_plan.pb", "341812000")):
        plan = plan_pb2.ClientOnlyPlan.FromString((reference / "output" / name).read_bytes())
        assert min_client_version(flex_ops(plan.tflite_graph), supported_ops()) == version


@pytest.mark.parametrize("damage", [b"", b"TFL3", b"\x10\0\0\0TFL3" + b"\xff" * 40])
def test_a_graph_that_cannot_be_read_does_not_pass(damage):
    with pytest.raises(BuildFailed):
        flex_ops(damage)


def test_kernel_classes_are_those_of_tensorflow(reference):
    plan = plan_pb2.ClientOnlyPlan.FromString((reference / "output/client_only_plan.pb").read_bytes())
    ops = flex_ops(plan.tflite_graph)
    assert ops["L2Loss"] == "L2LossOp<CPUDevice, float>"
    assert ops["ExternalDataset"] == ""
    assert list(ops) == sorted(ops)
