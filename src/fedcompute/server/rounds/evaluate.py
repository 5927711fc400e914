"""Which released checkpoint an evaluation round looks at (spec/server.md 5.5)."""

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
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


def choose(ids: Sequence[int], evaluated: Iterable[int]) -> int | None:
    """Returns one of `ids` uniformly at random among those evaluated least often so far; None without any."""
    times = Counter(evaluated)
    fewest = min((times[one] for one in ids), default=0)
    rested = [one for one in ids if times[one] == fewest]
    return secrets.choice(rested) if rested else None
