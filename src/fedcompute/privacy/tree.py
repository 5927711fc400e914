"""Tree aggregation (DP-FTRL): noise for prefix sums, in the variance-efficient form (arXiv 2103.00039).

A tree is an immutable value: one buffer per level that is still needed. All of it is integers on the sum's lattice, so
that what is added to a sum is exactly a function of the noised nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.lattice import rounded_division
from fedcompute.privacy.noise import NoiseSource

Node = tuple[NDArray[np.int64], ...]

# 2**58 for a node's deviation leaves 16 deviations to the ends of int64.
_NODE_BITS = 58


@dataclass(frozen=True)
class NoiseTree:
    """`nodes[k]`: one array per leaf of the sum, the k-th buffered node; `levels[k]`: its height.

    A node of height h is kept as 2**h times its value, in lattice steps: an integer. Heights rise strictly, so that
    2**height summed over them is the number of rounds that the tree covers.
    """

    nodes: tuple[Node, ...]
    levels: tuple[int, ...]

    @property
    def rounds(self) -> int:
        """Rounds covered so far, 1 for a fresh tree."""
        return sum(1 << level for level in self.levels)


def fresh_tree(shapes: Sequence[tuple[int, ...]], deviation: float, noise: NoiseSource) -> NoiseTree:
    """A tree that covers one round: a single leaf of noise with `deviation` lattice steps.

    Formal guarantees: every node that a tree ever holds is drawn from `noise` with `deviation`, independently of all
    others. What the nodes protect is said at `prefix_noise`.
    """
    return NoiseTree((_draw(shapes, deviation, noise),), (0,))


def prefix_noise(tree: NoiseTree) -> Node:
    """The noise of the prefix sum over the rounds that the tree covers: one array per leaf, lattice steps.

    Formal guarantees: adjacency add-or-remove-one device, unit device, sensitivity C of one round's sum assumed. With
    nodes of deviation z * C, the sequence of prefix sums plus this noise, over T rounds with one participation per
    device, is as private as T rounds of tree aggregation with multiplier z. The best estimate of a subtree's sum from
    its noised nodes has integer weights over a common divisor; rounding that estimate, subtree by subtree, is
    post-processing of the noised nodes, exactly, because no other arithmetic than that of integers is used.
    Source: arXiv 2103.00039, section 3 and appendix B; spec/artifacts.md 9.3.
    """
    total = [np.zeros_like(leaf) for leaf in tree.nodes[0]]
    for node, level in zip(tree.nodes, tree.levels, strict=True):
        # 1 / (2 - 2**-level) of the node's value.
        divisor = (2 << level) - 1
        total = [value + rounded_division(leaf, divisor) for value, leaf in zip(total, node, strict=True)]
    return tuple(total)


def grown(tree: NoiseTree, deviation: float, noise: NoiseSource) -> NoiseTree:
    """The tree that covers one more round: a new leaf, merged with every full subtree of its own height.

    Raises ValueError when a node would leave int64, which the noise multiplier times the number of rounds decides.

    Formal guarantees: as `fresh_tree`; a merged node is the mean of its children plus a draw of its own.
    """
    shapes = [leaf.shape for leaf in tree.nodes[0]]
    node = _draw(shapes, deviation, noise)
    height = 0
    while height < len(tree.levels) and tree.levels[height] == height:
        height += 1
        if deviation > 0 and math.log2(deviation) + height > _NODE_BITS:
            raise ValueError(f"a tree of {1 << height} rounds with a deviation of {deviation:g} steps leaves int64")
        own = _draw(shapes, deviation, noise)
        old = tree.nodes[height - 1]
        node = tuple(left + right + (drawn << height) for left, right, drawn in zip(old, node, own, strict=True))
    return NoiseTree((node, *tree.nodes[height:]), (height, *tree.levels[height:]))


def _draw(shapes: Sequence[tuple[int, ...]], deviation: float, noise: NoiseSource) -> Node:
    return tuple(noise.gaussian(deviation, math.prod(shape)).reshape(shape) for shape in shapes)
