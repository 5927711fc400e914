"""Tree aggregation (DP-FTRL): noise for prefix sums, in the variance-efficient form (arXiv 2103.00039).

A tree is an immutable value: one buffer per level that is still needed. Nodes are float64; what is added to a sum is
rounded to its lattice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.noise import NoiseSource

Node = tuple[NDArray[np.float64], ...]


@dataclass(frozen=True)
class NoiseTree:
    """`nodes[k]`: one array per leaf of the sum, model units, of the k-th buffered node; `levels[k]`: its height.

    Heights rise strictly, so that 2**height summed over them is the number of rounds that the tree covers.
    """

    nodes: tuple[Node, ...]
    levels: tuple[int, ...]

    @property
    def rounds(self) -> int:
        """Rounds covered so far, 1 for a fresh tree."""
        return sum(1 << level for level in self.levels)


def fresh_tree(shapes: Sequence[tuple[int, ...]], standard_deviation: float, noise: NoiseSource) -> NoiseTree:
    """A tree that covers one round: a single leaf of noise.

    Formal guarantees: every node that a tree ever holds is drawn from `noise` with `standard_deviation`, in model
    units, independently of all others.
    """
    return NoiseTree((_draw(shapes, standard_deviation, noise),), (0,))


def prefix_noise(tree: NoiseTree) -> Node:
    """The noise of the prefix sum over the rounds that the tree covers: one array per leaf, model units.

    Formal guarantees: for sensitivity C of one round's sum and nodes of deviation z * C, the sequence of prefix sums
    plus this noise, over T rounds with one participation per device, is as private as T rounds of tree aggregation
    with multiplier z; combining the estimates of each subtree lowers variance and is post-processing.
    Source: arXiv 2103.00039, section 3 and appendix B; spec/artifacts.md 9.3.
    """
    total = [np.zeros_like(leaf) for leaf in tree.nodes[0]]
    for node, level in zip(tree.nodes, tree.levels, strict=True):
        weight = 1.0 / (2.0 - 0.5**level)
        total = [value + leaf * weight for value, leaf in zip(total, node, strict=True)]
    return tuple(total)


def grown(tree: NoiseTree, standard_deviation: float, noise: NoiseSource) -> NoiseTree:
    """The tree that covers one more round: a new leaf, merged with every full subtree of its own height.

    Formal guarantees: as `fresh_tree`; a merged node is the mean of its children plus a draw of its own.
    """
    shapes = [leaf.shape for leaf in tree.nodes[0]]
    node = _draw(shapes, standard_deviation, noise)
    height = 0
    while height < len(tree.levels) and tree.levels[height] == height:
        own = _draw(shapes, standard_deviation, noise)
        node = tuple(0.5 * (old + new) + drawn for old, new, drawn in zip(tree.nodes[height], node, own, strict=True))
        height += 1
    return NoiseTree((node, *tree.nodes[height:]), (height, *tree.levels[height:]))


def _draw(shapes: Sequence[tuple[int, ...]], standard_deviation: float, noise: NoiseSource) -> Node:
    return tuple(
        noise.standard_normal(int(np.prod(shape, dtype=np.int64))).reshape(shape) * standard_deviation
        for shape in shapes
    )
