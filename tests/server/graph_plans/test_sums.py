import numpy as np
import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import aggregation_pb2, plan_pb2
from fedcompute.server.graph_plans.sums import RunningSums, read_sums
from fedcompute.tensors.tree import LeafSpec, spec_to_proto


def aggregation(name="update/0", shape=(2,), dtype=np.float32, uri="federated_sum", output_shape=None):
    made = plan_pb2.ServerAggregationConfig(intrinsic_uri=uri)
    made.intrinsic_args.add().input_tensor.CopyFrom(spec_to_proto(LeafSpec(name, shape, np.dtype(dtype))))
    output = LeafSpec(f"intermediate_update/0/{name}", output_shape or shape, np.dtype(dtype))
    made.output_tensors.append(spec_to_proto(output))
    return made


def sums_of(values, dtype=np.float32):
    sums = RunningSums(read_sums([aggregation(dtype=dtype)]))
    for value in values:
        sums.add({"update/0": np.array(value, dtype)})
    return sums


def test_float32_values_are_added_one_after_the_other_in_float32():
    values = np.random.default_rng(3).normal(size=(1000, 2)).astype(np.float32) * np.float32(1e3)
    expected = np.zeros(2, np.float32)
    for value in values:
        expected = np.float32(expected + value)
    (total,) = sums_of(values).report().values()
    assert total.dtype == np.float32
    assert total.tobytes() == expected.tobytes()
    # Neither the exact sum nor the sum in another order has these bytes.
    assert total.tobytes() != values.astype(np.float64).sum(axis=0).astype(np.float32).tobytes()
    assert total.tobytes() != next(iter(sums_of(values[::-1]).report().values())).tobytes()


def test_partial_sums_are_merged_in_their_order_in_float32():
    partials = [sums_of([[value, 0]]).partial() for value in (1e8, 1.0, -1e8)]
    sums = RunningSums(read_sums([aggregation()]))
    for partial in partials:
        sums.merge(partial)
    (total,) = sums.report().values()
    assert (total.tolist(), sums.num_inputs) == ([0.0, 0.0], 3)


def test_integers_wrap_around():
    (total,) = sums_of([[2**31 - 1, 1], [1, 1]], np.int32).report().values()
    assert total.tolist() == [-(2**31), 2]


def test_a_partial_sum_has_the_bytes_of_the_aggregation_cores_state():
    partial = sums_of([[1, 2], [3, 4]]).partial()
    vector = b"\x08\x02\x12\x08" + np.array([4, 6], "<f4").tobytes()
    assert partial == b"\x0a" + bytes([len(vector)]) + vector


def test_a_sum_of_nothing_can_be_merged():
    sums = sums_of([[1, 2]])
    sums.merge(sums_of([]).partial())
    assert sums.num_inputs == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint64])
def test_every_type_of_the_form_survives_a_partial_sum(dtype):
    sums = RunningSums(read_sums([aggregation(dtype=dtype)]))
    sums.merge(sums_of([[1, 2], [3, 4]], dtype).partial())
    assert next(iter(sums.report().values())).tolist() == [4, 6]


@pytest.mark.parametrize(
    "partial",
    [
        b"",
        b"\xff",
        aggregation_pb2.CheckpointAggregatorState(aggregators=[b"\x12\x04\0\0\0\0"]).SerializeToString(),
        aggregation_pb2.CheckpointAggregatorState(aggregators=[b"\xff\xff"]).SerializeToString(),
        sums_of([[1, 2]], np.float64).partial(),
    ],
)
def test_what_is_no_partial_sum_of_the_plan_is_refused(partial):
    with pytest.raises(ArtifactInvalid) as refused:
        RunningSums(read_sums([aggregation()])).merge(partial)
    assert refused.value.reason in (Reason.PARTIAL_SUM_MALFORMED, Reason.PARTIAL_SUM_MISMATCH)


def with_state():
    made = aggregation()
    made.intrinsic_args.add().state_tensor.name = "a"
    return made


def with_inner():
    made = aggregation()
    made.inner_aggregations.add()
    return made


@pytest.mark.parametrize(
    "aggregations",
    [
        [],
        [aggregation(uri="federated_mean")],
        [aggregation(uri="GoogleSQL:$differential_privacy_sum")],
        [aggregation(dtype=object)],
        [aggregation(dtype=np.float16)],
        [aggregation(output_shape=(3,))],
        [aggregation(), aggregation()],
        [with_state()],
        [with_inner()],
    ],
)
def test_anything_but_sums_of_single_leaves_is_refused(aggregations):
    with pytest.raises(ArtifactInvalid) as refused:
        read_sums(aggregations)
    assert refused.value.reason is Reason.PLAN_UNSUPPORTED
