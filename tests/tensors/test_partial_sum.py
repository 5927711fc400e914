import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import learning_pb2
from fedcompute.tensors.partial_sum import PartialSum, decode, encode, merge

DIGEST = b"d" * 32


def partial(values, inputs=1, step=2.0**-30, digest=DIGEST):
    leaf = "update/1/0"
    return PartialSum(
        digest, inputs, {leaf: step}, {leaf: np.array(values, np.int64)}, {"update/0/loss/0": np.array(0.5)}
    )


def test_a_partial_sum_survives_its_bytes():
    total = partial([[1, -2], [3, 4]], inputs=7)
    read = decode(encode(total))
    assert (read.plan_digest, read.num_inputs, read.steps) == (DIGEST, 7, {"update/1/0": 2.0**-30})
    np.testing.assert_array_equal(read.lattice["update/1/0"], total.lattice["update/1/0"])
    assert read.real["update/0/loss/0"] == 0.5


@pytest.mark.parametrize("step", [2.0**-1022, 0.5])
@pytest.mark.parametrize("inputs", [0, 1, 300, 1 << 31])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (200, 2), (1, 0, 5)])
def test_the_bytes_are_those_that_protobuf_writes(shape, inputs, step):
    lattice = np.random.default_rng(0).integers(-(2**62), 2**62, shape)
    real = np.random.default_rng(1).standard_normal(shape).T
    total = PartialSum(DIGEST if inputs else b"", inputs, {"a/ü": step}, {"a/ü": lattice}, {"": real, "b": real})
    expected = learning_pb2.PartialSum(version=1, num_inputs=inputs, plan_digest=total.plan_digest)
    expected.leaves.add(name="a/ü", shape=shape, lattice=lattice.tobytes(), lattice_step=step)
    for name in ("", "b"):
        expected.leaves.add(name=name, shape=real.shape, real=real.tobytes())
    assert encode(total) == expected.SerializeToString(deterministic=True)


@settings(max_examples=30)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_merging_partials_in_any_order_and_grouping_gives_the_same_lattice_bytes(order, cut):
    parts = [partial([index**5 - 3, -(7**index)], inputs=index) for index in range(6)]
    left = parts[order[0]]
    for index in order[1:cut]:
        left = merge(left, parts[index])
    right = parts[order[cut]]
    for index in order[cut + 1 :]:
        right = merge(right, parts[index])
    straight = parts[0]
    for part in parts[1:]:
        straight = merge(straight, part)
    total = merge(left, right)
    assert total.num_inputs == straight.num_inputs == 15
    assert total.lattice["update/1/0"].tobytes() == straight.lattice["update/1/0"].tobytes()


@pytest.mark.parametrize(
    "other",
    [partial([1, 2, 3]), partial([1, 2], digest=b"e" * 32), partial([1, 2], step=0.5), partial([1, 2], 1 << 31)],
)
def test_sums_of_another_plan_shape_or_step_never_merge(other):
    with pytest.raises(ArtifactInvalid) as refusal:
        merge(partial([1, 2]), other)
    assert refusal.value.reason is Reason.PARTIAL_SUM_MISMATCH


@settings(max_examples=200)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_a_sum_of_sound_shape(data):
    sound = bytearray(encode(partial([1, 2, 3])))
    for _ in range(data.draw(st.integers(1, 3))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    try:
        total = decode(bytes(sound[: data.draw(st.integers(0, len(sound)))]))
    except ArtifactInvalid as refusal:
        assert refusal.reason is Reason.PARTIAL_SUM_MALFORMED
    else:
        assert all(isinstance(leaf, np.ndarray) for leaf in (*total.lattice.values(), *total.real.values()))
