from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcompute.privacy.lattice import rounded_division
from fedcompute.privacy.noise import SeededNoise
from fedcompute.privacy.tree import fresh_tree, grown, prefix_noise


class CountedNoise:
    """Each draw is one unit in a dimension of its own, so that a node tells which draws are in it.

    A test's own: real noise does not tell its draws apart. A unit is 2**40 steps, so that no rounding shows.
    """

    def __init__(self, size):
        self.size = size
        self.drawn = 0

    def gaussian(self, deviation, count):
        assert count == self.size
        draw = np.zeros(self.size, np.int64)
        draw[self.drawn] = 1 << 40
        self.drawn += 1
        return draw


def node_estimate(level, index, draws):
    own = draws[(level, index)]
    if level == 0:
        return own
    return own + 0.5 * (node_estimate(level - 1, 2 * index, draws) + node_estimate(level - 1, 2 * index + 1, draws))


def subtrees(rounds):
    """Height and index of the full subtrees that cover so many rounds."""
    start = 0
    for level in reversed(range(rounds.bit_length())):
        if rounds >> level & 1:
            yield level, start >> level
            start += 1 << level


def named_draws(rounds, draw):
    """Draws by node; the recurrence draws a leaf, then one value per merge on the way up."""
    draws, number = {}, 0
    for leaf in range(rounds):
        level = 0
        while True:
            draws[(level, leaf >> level)] = draw(number)
            number += 1
            if (leaf >> level) & 1 == 0:
                break
            level += 1
    return draws


def test_the_recurrence_equals_a_direct_computation_over_the_whole_tree():
    rounds, size = 21, 64
    draws = named_draws(rounds, lambda number: np.eye(size)[number])
    noise = CountedNoise(size)
    tree = fresh_tree([(size,)], 1.0, noise)
    for covered in range(1, rounds + 1):
        assert tree.rounds == covered
        direct = sum(node_estimate(level, index, draws) / (2.0 - 0.5**level) for level, index in subtrees(covered))
        np.testing.assert_allclose(prefix_noise(tree)[0] / 2.0**40, direct, atol=1e-11)
        tree = grown(tree, 1.0, noise)


def test_every_subtree_adds_the_nearest_integer_to_the_exact_best_estimate_of_its_noise():
    rounds = 13
    source = SeededNoise(4)
    values = [int(source.gaussian(3e9, 1)[0]) for _ in range(2 * rounds)]
    draws = named_draws(rounds, lambda number: Fraction(values[number]))

    def exact(level, index):
        own = draws[(level, index)]
        return own if level == 0 else own + (exact(level - 1, 2 * index) + exact(level - 1, 2 * index + 1)) / 2

    tree = fresh_tree([(1,)], 3e9, noise := SeededNoise(4))
    for covered in range(1, rounds + 1):
        parts = [exact(level, index) / (2 - Fraction(1, 2**level)) for level, index in subtrees(covered)]
        # Halves do not occur: divisors are odd. A sum S on the lattice gives S + this = round(S + estimate).
        assert int(prefix_noise(tree)[0][0]) == sum(round(part) for part in parts)
        tree = grown(tree, 3e9, noise)


def test_shapes_and_deviation_reach_the_leaves():
    tree = fresh_tree([(2, 3), ()], 5e9, SeededNoise(1))
    again = SeededNoise(1)
    np.testing.assert_array_equal(tree.nodes[0][0], again.gaussian(5e9, 6).reshape(2, 3))
    np.testing.assert_array_equal(tree.nodes[0][1], again.gaussian(5e9, 1).reshape(()))


def test_a_tree_that_would_leave_its_integers_is_refused_before_it_does():
    tree = fresh_tree([()], 2.0**50, SeededNoise(1))
    while tree.rounds < 511:
        tree = grown(tree, 2.0**50, SeededNoise(1))
    assert max(abs(int(node[0])) for node in tree.nodes) < 2**62
    with pytest.raises(ValueError, match="leaves int64"):
        grown(tree, 2.0**50, SeededNoise(1))


@settings(max_examples=200)
@given(st.integers(-(2**61), 2**61), st.integers(1, 2**40))
def test_integer_division_rounds_to_the_nearest_and_commutes_with_whole_sums(dividend, divisor):
    quotient = int(rounded_division(np.array(dividend, np.int64), divisor))
    assert abs(Fraction(dividend, divisor) - quotient) <= Fraction(1, 2)
