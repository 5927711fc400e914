import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedcompute.privacy.clipping import clip_by_global_norm, global_norm
from fedcompute.privacy.lattice import add_noise, add_to_lattice, lattice_for
from fedcompute.privacy.noise import SeededNoise

floats = st.floats(-1e6, 1e6, width=32)
leaves = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    arrays(np.float32, array_shapes(max_dims=2, max_side=6), elements=floats),
    min_size=1,
)


def on_lattice(leaf, lattice, factor=1.0):
    total = np.zeros(leaf.shape, np.int64)
    add_to_lattice(total, leaf, lattice, factor)
    return total


def exact_squared_norm(values):
    return sum(Fraction(float(x)) ** 2 for value in values.values() for x in value.ravel())


@settings(max_examples=150)
@given(leaves, st.floats(1e-6, 1e6))
def test_the_clipped_norm_never_exceeds_the_bound_in_exact_arithmetic(update, clip_norm):
    assert exact_squared_norm(clip_by_global_norm(update, clip_norm)) <= Fraction(clip_norm) ** 2


@settings(max_examples=150)
@given(leaves, st.floats(1e-6, 1e6))
def test_the_lattice_point_of_a_clipped_update_stays_within_the_bound(update, clip_norm):
    lattice = lattice_for(clip_norm)
    clipped = clip_by_global_norm(update, clip_norm)
    points = {name: on_lattice(leaf, lattice) for name, leaf in clipped.items()}
    squared = sum(int(x) ** 2 for value in points.values() for x in value.ravel()) * Fraction(lattice.step) ** 2
    assert squared <= Fraction(clip_norm) ** 2
    for name, value in points.items():
        assert np.abs(value * lattice.step - clipped[name]).max() < lattice.step


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (7,), (1 << 15,), (3, 40_001)])
@pytest.mark.parametrize("factor", [1.0, 0.3, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_leaf_of_any_size_lies_on_the_lattice_as_if_it_were_rounded_whole(shape, factor, dtype):
    leaf = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    lattice = lattice_for(0.37)
    points = on_lattice(leaf, lattice, factor)
    expected = np.trunc(leaf.astype(np.float64) * factor / lattice.step).astype(np.int64)
    assert (points.dtype, points.shape) == (np.int64, shape)
    np.testing.assert_array_equal(points, expected)


@settings(max_examples=200)
@given(
    arrays(np.float32, st.integers(0, 40), elements=st.floats(-1.0, 1.0, width=32)),
    st.sampled_from([1.0, 1 - 2**-53, 1 / (1 + 1e-4), 0.7]),
    st.floats(1e-38, 1e38),
)
def test_one_product_is_the_same_as_a_product_and_a_division(unit, factor, clip_norm):
    leaf = np.multiply(unit, clip_norm, dtype=np.float64).astype(np.float32)
    lattice = lattice_for(clip_norm)
    expected = np.trunc(leaf.astype(np.float64) * factor / lattice.step).astype(np.int64)
    np.testing.assert_array_equal(on_lattice(leaf, lattice, factor), expected)


def test_a_leaf_is_added_to_what_the_sum_holds_wherever_its_bytes_lie():
    data = bytes(3) + np.linspace(-1, 1, 70_001, dtype=np.float32).tobytes()
    leaf = np.frombuffer(data, np.uint8)[3:].view(np.float32)
    assert not leaf.flags.aligned
    total = np.arange(70_001)
    add_to_lattice(total, leaf, lattice_for(2.0))
    np.testing.assert_array_equal(total, np.arange(70_001) + on_lattice(leaf.copy(), lattice_for(2.0)))


@pytest.mark.parametrize("clip_norm", [5e-324, 1e-310, 2.0**-992, 1e-290])
def test_a_clip_norm_of_any_size_has_a_lattice_whose_step_can_be_inverted(clip_norm):
    lattice = lattice_for(clip_norm)
    assert 0 < 1 / lattice.step < math.inf
    assert np.abs(on_lattice(np.array([clip_norm, -clip_norm]), lattice)).max() <= clip_norm / lattice.step


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1e-4, 123.456])
@pytest.mark.parametrize("count", [1 << 12, (1 << 20) + 1, 3_000_001])
def test_the_bound_holds_exactly_for_as_many_elements_as_models_have(value, count):
    clipped = clip_by_global_norm({"a": np.full(count, value, np.float32)}, 0.1)["a"]
    assert (clipped == clipped[0]).all()
    assert count * Fraction(float(clipped[0])) ** 2 <= Fraction(0.1) ** 2


def test_an_update_within_the_bound_is_not_changed_and_zero_stays_zero():
    update = {"a": np.array([0.3, -0.4], np.float32)}
    np.testing.assert_array_equal(clip_by_global_norm(update, 1.0)["a"], update["a"].astype(np.float64))
    assert global_norm(update) == pytest.approx(0.5)
    assert clip_by_global_norm({"a": np.zeros(3, np.float32)}, 1e-9)["a"].tolist() == [0, 0, 0]


@given(st.floats(1e-30, 1e30))
def test_the_lattice_is_a_power_of_two_of_the_public_clip_norm(clip_norm):
    step = lattice_for(clip_norm).step
    assert math.frexp(step)[0] == 0.5
    assert 2**30 <= clip_norm / step < 2**31


def test_noise_is_added_in_lattice_steps_of_the_stated_deviation():
    lattice = lattice_for(1.0)
    total = np.array([[5, -7]], np.int64)
    noised = add_noise(total, 2.0, lattice, SeededNoise(3))
    assert noised.dtype == np.int64
    np.testing.assert_array_equal(noised - total, [SeededNoise(3).gaussian(2.0 * 2**30, 2)])
