"""Sensitivities against every participation pattern there is, for small numbers of rounds."""

import itertools
import math

import numpy as np
import pytest

from fedcompute.privacy.banded import column_norm, optimal_coefficients
from fedcompute.privacy.sensitivity import (
    heaviest_participation,
    most_participations,
    positions_of,
    separation_in_steps,
    squared_banded_sensitivity,
    squared_tree_sensitivity,
)


def patterns(positions, separation):
    """All sets of rounds a device may take part in, as tuples of indices into `positions`."""
    found = [()]
    for index, position in enumerate(positions):
        found += [
            (*before, index) for before in found if not before or position - positions[before[-1]] >= max(1, separation)
        ]
    return found


def exact_squared_tree_sensitivity(rounds, separation):
    """Largest sum over all whole nodes of the squared number of participations below it."""
    best = 0
    for pattern in patterns(range(rounds), separation):
        taken = np.zeros(rounds)
        taken[list(pattern)] = 1
        total = sum(
            float((taken[: rounds >> h << h].reshape(-1, 1 << h).sum(axis=1) ** 2).sum())
            for h in range(rounds.bit_length())
        )
        best = max(best, total)
    return best


@pytest.mark.parametrize("separation", [1, 2, 3, 4, 5, 7, 11])
def test_the_tree_bound_holds_for_every_pattern_and_is_no_more_than_a_third_above(separation):
    for rounds in range(1, 13):
        bound = squared_tree_sensitivity(rounds, -(-rounds // separation), separation)
        exact = exact_squared_tree_sensitivity(rounds, separation)
        assert exact <= bound <= exact * 4 / 3 + 1e-9


def test_the_tree_bound_is_exact_for_one_participation_and_for_a_device_in_every_round():
    for rounds in range(1, 14):
        assert squared_tree_sensitivity(rounds, 1, rounds) == math.floor(math.log2(rounds)) + 1
        assert squared_tree_sensitivity(rounds, rounds, 1) == exact_squared_tree_sensitivity(rounds, 1)


def test_gaps_between_releases_cost_separation():
    positions = np.array([0, 2, 3, 6, 7, 8, 12])
    for separation in range(1, 14):
        counts = [len(pattern) for pattern in patterns(positions, separation)]
        assert most_participations(positions, separation) == max(counts)
        apart = [b - a for p in patterns(positions, separation) for a, b in itertools.pairwise(p)]
        assert separation_in_steps(positions, separation) == min(apart, default=len(positions))


def test_the_heaviest_participation_is_the_best_of_all_patterns():
    positions = positions_of([(0, 3), (5, 4), (12, 5)])
    weights = np.random.default_rng(3).uniform(0.1, 1, len(positions))
    for separation in (1, 2, 3, 5, 8):
        best = max(sum(weights[list(pattern)]) for pattern in patterns(positions, separation))
        assert heaviest_participation(positions, weights, separation) == pytest.approx(best)


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_the_banded_bound_holds_for_the_explicit_matrix_and_every_pattern(bands):
    rounds = 11
    column = optimal_coefficients(rounds, bands)
    coefficients = np.array(column) / column_norm(column)
    matrix = sum(np.diag(np.full(rounds - lag, c), -lag) for lag, c in enumerate(coefficients))
    for separation in range(1, 9):
        # All coefficients are positive, so that contributions in one direction are the worst.
        exact = max(
            float(np.sum(matrix[:, list(pattern)].sum(axis=1) ** 2)) for pattern in patterns(range(rounds), separation)
        )
        bound = squared_banded_sensitivity(-(-rounds // separation), separation, bands)
        assert exact <= bound + 1e-9
        if separation >= bands:
            assert bound == -(-rounds // separation)
