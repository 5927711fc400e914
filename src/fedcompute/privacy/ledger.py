"""What each release was, as events: what a ledger keeps, and what every epsilon is recomputed from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcompute.errors import ArtifactInvalid, Reason

# Of one entry's events, steps and noise; what is beyond was not written by this program.
_MOST_EVENTS, _MOST_STEPS, _MOST_NOISE = 64, 10**9, 1e30


@dataclass(frozen=True)
class GaussianEvent:
    """One Gaussian release; `noise_multiplier` is standard deviation over L2 sensitivity (0: no protection)."""

    noise_multiplier: float


@dataclass(frozen=True)
class TreeEvent:
    """One round of tree aggregation with node noise `noise_multiplier`; `step` is 1 in the first round of a tree.

    The rounds of one tree are one mechanism: they are accounted for together, from a step 1 to the next.
    """

    noise_multiplier: float
    step: int


@dataclass(frozen=True)
class BandedEvent:
    """Round `step` of a banded matrix factorization whose matrix has `bands` bands.

    `noise_multiplier` is what one participation sees: deviation over clip norm times the column's L2 norm. Rounds of
    one task are one mechanism; participations at least `bands` rounds apart touch no row in common and compose like
    Gaussian releases. Source: arXiv 2306.08153, section 3.
    """

    noise_multiplier: float
    bands: int
    step: int


Event = GaussianEvent | TreeEvent | BandedEvent


def events_document(events: Sequence[Event]) -> dict[str, Any]:
    """The stored form of a release, with the class names of dp-accounting's events where it has them.

    Formal guarantees: none of its own; `read_events` gives the same events back, noise multipliers to the last bit.
    """
    parts = [_document(event) for event in events]
    return parts[0] if len(parts) == 1 else {"class": "ComposedDpEvent", "events": parts}


def read_events(document: Mapping[str, Any]) -> list[Event]:
    """Reads `events_document`. Raises ArtifactInvalid (STATE_MISMATCH) for another form, and beyond all limits.

    Formal guarantees: none of its own; nothing that is read is left out or taken for a smaller charge.
    """
    try:
        if document["class"] != "ComposedDpEvent":
            return [_event(document)]
        parts = document["events"]
        if len(parts) > _MOST_EVENTS:
            raise ValueError(len(parts))
        # Never nested by this program.
        return [_event(part) for part in parts]
    except (ValueError, KeyError, TypeError, OverflowError) as cause:
        raise _unknown() from cause


def composed_noise_multiplier(events: Iterable[GaussianEvent]) -> float:
    """The noise multiplier of the one Gaussian release that tells as much as all `events` together.

    Formal guarantees: exact for one device that takes part in every event, without amplification: Gaussian releases
    with multipliers z_i compose to one with (sum z_i**-2)**-1/2, also when each is chosen after the one before
    (Gaussian differential privacy, arXiv 1905.02383, corollary 3.3). Infinite for no event, 0 if one has no noise.
    """
    multipliers = [event.noise_multiplier for event in events]
    if any(multiplier == 0 for multiplier in multipliers):
        return 0.0
    total = math.fsum(multiplier**-2 for multiplier in multipliers)
    return math.inf if total == 0 else total**-0.5


def _event(document: Mapping[str, Any]) -> Event:
    multiplier = float(document["noise_multiplier"])
    if not 0 <= multiplier <= _MOST_NOISE:
        raise ValueError(multiplier)
    match document["class"]:
        case "GaussianDpEvent":
            return GaussianEvent(multiplier)
        case "TreeAggregationStep":
            return TreeEvent(multiplier, _count(document["step"]))
        case "BandedMatrixFactorizationStep":
            return BandedEvent(multiplier, _count(document["bands"]), _count(document["step"]))
    raise ValueError("class")


def _count(number: Any) -> int:
    count = int(number)
    if not 1 <= count <= _MOST_STEPS:
        raise ValueError(count)
    return count


def _document(event: Event) -> dict[str, Any]:
    if isinstance(event, GaussianEvent):
        return {"class": "GaussianDpEvent", "noise_multiplier": event.noise_multiplier}
    if isinstance(event, TreeEvent):
        return {"class": "TreeAggregationStep", "noise_multiplier": event.noise_multiplier, "step": event.step}
    return {
        "class": "BandedMatrixFactorizationStep",
        "noise_multiplier": event.noise_multiplier,
        "bands": event.bands,
        "step": event.step,
    }


def _unknown() -> ArtifactInvalid:
    return ArtifactInvalid(Reason.STATE_MISMATCH, "a ledger entry holds no event that this version knows")
