"""How a round's uploads are split into batches; that they are added up truly is in test_rounds."""

import pytest

from fedcompute.server.rounds.collect import batch_size


def sizes(goal, most):
    found, missing = [], goal
    while missing:
        found.append(batch_size(most, missing))
        missing -= found[-1]
    return found


@pytest.mark.parametrize("most", [1, 2, 5, 50])
@pytest.mark.parametrize("goal", [1, 2, 3, 7, 8, 50, 51, 1000])
def test_batches_hold_a_round_exactly_and_none_more_than_the_operator_allows(goal, most):
    assert sum(sizes(goal, most)) == goal
    assert max(sizes(goal, most)) <= most


@pytest.mark.parametrize("goal", [4, 5, 8, 50, 51, 99, 1000])
def test_the_last_batch_is_short_but_none_is_of_very_few_devices(goal):
    # After the last upload everybody waits for the last batch.
    assert 4 <= sizes(goal, 50)[-1] <= 7
    assert min(sizes(goal, 50)) >= 4


def test_a_large_round_has_a_handful_of_short_batches_and_no_more():
    assert sizes(1000, 50) == [50] * 19 + [25, 13, 6, 6]
