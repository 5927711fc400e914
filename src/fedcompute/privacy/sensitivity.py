"""How far one device can move what a task releases, by how often it may take part. Lengths in units of the clip norm.

A device takes part in rounds of its own choosing, also after it saw what was released before; two of its rounds are at
least `separation` apart.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def most_participations(positions: NDArray[np.int64], separation: int) -> int:
    """The most of the round numbers `positions` (rising) of which any two are at least `separation` apart.

    Formal guarantees: exact; to take the first round that is free, again and again, is optimal.
    """
    if separation <= 1:
        return len(positions)
    count, index = 0, 0
    while index < len(positions):
        count += 1
        index = int(np.searchsorted(positions, positions[index] + separation))
    return count


def separation_in_steps(positions: NDArray[np.int64], separation: int) -> int:
    """The least number of releases from one participation to the next, where rounds without a release lie between.

    `positions`: the numbers of the rounds that released, rising.

    Formal guarantees: two rounds among `positions` at least `separation` apart are at least so many places apart in
    `positions`.
    """
    if separation <= 1:
        return 1
    following = np.searchsorted(positions, positions + separation)
    steps = following - np.arange(len(positions))
    reached = following < len(positions)
    return int(steps[reached].min()) if reached.any() else max(1, len(positions))


def heaviest_participation(positions: NDArray[np.int64], weights: NDArray[np.float64], separation: int) -> float:
    """The largest sum of `weights` over rounds of which any two are at least `separation` apart.

    Formal guarantees: exact, by dynamic programming over `positions` (rising).
    """
    if separation <= 1:
        return math.fsum(weights)
    before = np.searchsorted(positions, positions - separation, side="right")
    best = [0.0]
    for weight, earlier in zip(weights.tolist(), before.tolist(), strict=True):
        best.append(max(best[-1], best[earlier] + weight))
    return best[-1]


def squared_tree_sensitivity(rounds: int, participations: int, separation: int) -> float:
    """Bounds the squared L2 distance by which one device moves all nodes of a tree over `rounds` rounds together.

    Formal guarantees: adjacency add-or-remove-one device, each of whose contributions has L2 norm at most 1. A node of
    height h is the sum over 2**h rounds; the device is in at most m = min(k, ceil(2**h / separation)) of them, and in
    at most k = `participations` over all nodes of that height. A sum of squares under both limits is largest with as
    many nodes at m as there can be. Only whole nodes exist. Exact for one participation, where it is the number of
    heights floor(log2 rounds) + 1 (the depth in arXiv 2103.00039, appendix D), and for a device in every
    round; in between it may exceed the true maximum by a third. Since nodes get independent Gaussian noise of equal
    deviation, one Gaussian release of this sensitivity is as private as the tree, also when contributions are chosen
    after earlier rounds were seen (arXiv 2202.08312, theorem 2.1).
    """
    total = 0
    for height in range(rounds.bit_length()):
        nodes = rounds >> height
        most = min(participations, -(-(1 << height) // max(1, separation)))
        full, rest = divmod(participations, max(1, most))
        total += nodes * most * most if full >= nodes else full * most * most + rest * rest
    return float(total)


def squared_banded_sensitivity(participations: int, separation: int, bands: int) -> float:
    """Bounds the squared L2 distance by which one device moves C x of a banded matrix factorization.

    C has `bands` bands and columns of L2 norm at most 1.

    Formal guarantees: adjacency add-or-remove-one device, contributions of L2 norm at most 1, chosen adaptively. Two
    columns at least `bands` apart share no row, so that k participations so far apart have squared sensitivity k
    (arXiv 2306.08153, section 3). With a smaller `separation` every m-th participation, m = ceil(bands / separation),
    is far enough from the next of its class: m classes, whose distances add by the triangle inequality. Exact for
    separation >= bands; otherwise an upper bound.
    """
    classes = min(participations, -(-bands // max(1, separation)))
    if classes <= 1:
        return float(participations)
    small, larger = divmod(participations, classes)
    return float((larger * math.sqrt(small + 1) + (classes - larger) * math.sqrt(small)) ** 2)


def positions_of(spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The round numbers of `spans`, each a first round and a number of rounds.

    Formal guarantees: none of its own.
    """
    return np.concatenate([np.arange(first, first + rounds, dtype=np.int64) for first, rounds in spans])
