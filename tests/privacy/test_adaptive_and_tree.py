import math

import numpy as np
import pytest

from fedcompute.privacy.adaptive import moved_estimate, split_noise
from fedcompute.privacy.noise import SeededNoise
from fedcompute.privacy.tree import fresh_tree, grown, prefix_noise


def test_the_split_of_noise_is_as_private_as_the_whole():
    split = split_noise(1.5, 40)
    assert split.bit_deviation == 2.0
    assert split.value_multiplier**-2 + (2 * split.bit_deviation) ** -2 == pytest.approx(1.5**-2)


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_noise_that_the_bits_alone_would_break_is_refused(noise):
    with pytest.raises(ValueError, match="tenth of the report goal"):
        split_noise(noise, 10)


def test_the_estimate_moves_against_the_share_below_it():
    assert moved_estimate(2.0, 0.0, 10, 0.5, 0.2) == 2.0
    assert moved_estimate(2.0, 5.0, 10, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.1))
    assert moved_estimate(2.0, -5.0, 10, 0.5, 0.2) == pytest.approx(2.0 * math.exp(0.1))
    # Noise beyond what devices can say is clamped.
    assert moved_estimate(2.0, 900.0, 10, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.1))


class CountedNoise:
    """Each draw is one unit in a dimension of its own, so that a node tells which draws are in it."""

    def __init__(self, size):
        self.size = size
        self.drawn = 0

    def standard_normal(self, count):
        assert count == self.size
        draw = np.zeros(self.size)
        draw[self.drawn] = 1.0
        self.drawn += 1
        return draw


def direct_prefix(rounds, draws):
    """The variance-efficient estimate of a prefix, by its definition over a binary tree of named nodes."""

    def estimate(level, index):
        own = draws[(level, index)]
        if level == 0:
            return own
        return own + 0.5 * (estimate(level - 1, 2 * index) + estimate(level - 1, 2 * index + 1))

    total, start = 0.0, 0
    for level in reversed(range(rounds.bit_length())):
        if rounds >> level & 1:
            total = total + estimate(level, start >> level) / (2.0 - 0.5**level)
            start += 1 << level
    return total


def test_the_recurrence_equals_a_direct_computation_over_the_whole_tree():
    rounds, size = 21, 64
    noise = CountedNoise(size)
    # The recurrence draws a leaf, then one value per merge on the way up.
    draws, number = {}, 0
    for leaf in range(rounds):
        level = 0
        while True:
            draws[(level, leaf >> level)] = np.eye(size)[number]
            number += 1
            if (leaf >> level) & 1 == 0:
                break
            level += 1
    tree = fresh_tree([(size,)], 1.0, noise)
    for covered in range(1, rounds + 1):
        assert tree.rounds == covered
        np.testing.assert_allclose(prefix_noise(tree)[0], direct_prefix(covered, draws), atol=1e-12)
        tree = grown(tree, 1.0, noise)


def test_shapes_and_deviation_reach_the_leaves():
    tree = fresh_tree([(2, 3), ()], 5.0, SeededNoise(1))
    again = SeededNoise(1)
    np.testing.assert_array_equal(tree.nodes[0][0], again.standard_normal(6).reshape(2, 3) * 5)
    np.testing.assert_array_equal(tree.nodes[0][1], again.standard_normal(1).reshape(()) * 5)
