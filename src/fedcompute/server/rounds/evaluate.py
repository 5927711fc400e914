"""Which released checkpoint an evaluation round looks at (spec/server.md 5.5)."""

import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from fedcompute.protos import task_pb2
from fedcompute.storage.releases import CompletedIteration


def candidates(
    selector: task_pb2.CheckPointSelector, released: Iterable[CompletedIteration], start: datetime
) -> list[int]:
    """Returns the iteration ids that the selector admits, ascending: the first released round of every bucket.

    Buckets hold k iterations, or k hours counted from `start`, the training task's creation. All released rounds
    count, however old; a selector that is not set admits every round.
    """
    first: dict[int, int] = {}
    for one in released:
        if selector.WhichOneof("selector_type") == "duration_selector":
            length = 3600 * max(1, selector.duration_selector.hours)
            bucket = int((one.completed - start).total_seconds() // length)
        else:
            bucket = (one.iteration_id - 1) // max(1, selector.iteration_selector.size)
        first[bucket] = min(one.iteration_id, first.get(bucket, one.iteration_id))
    return sorted(first.values())


def measurable_of(
    selector: task_pb2.CheckPointSelector,
    released: Sequence[CompletedIteration],
    start: datetime,
    *,
    there: Collection[int],
    evaluated: Collection[int],
) -> list[int]:
    """Returns those candidates whose checkpoint is there, ascending.

    In a bucket whose first checkpoint was lost before it was evaluated the next one takes its place; a bucket that was
    evaluated is not taken up again by another round, unless there is nothing else left.
    """
    held = [one for one in released if one.iteration_id in there or one.iteration_id in evaluated]
    left = [one for one in released if one.iteration_id in there]
    found = [one for one in candidates(selector, held, start) if one in there]
    return found or candidates(selector, left, start)


def choose(ids: Sequence[int], evaluated: Iterable[int]) -> int | None:
    """Returns one of `ids` uniformly at random among those evaluated least often so far; None without any."""
    times = Counter(evaluated)
    fewest = min((times[one] for one in ids), default=0)
    rested = [one for one in ids if times[one] == fewest]
    return secrets.choice(rested) if rested else None
