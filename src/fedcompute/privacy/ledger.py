"""The privacy ledger: what each release was, as events. Epsilon is never stored; it is recomputed from them."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedcompute.errors import ArtifactInvalid, Reason


@dataclass(frozen=True)
class GaussianEvent:
    """One Gaussian release; `noise_multiplier` is standard deviation over L2 sensitivity (0: no protection)."""

    noise_multiplier: float


def event_json(event: GaussianEvent) -> str:
    """The stored form, with the class name of dp-accounting's event."""
    return json.dumps({"class": "GaussianDpEvent", "noise_multiplier": event.noise_multiplier})


def parse_event(text: str) -> GaussianEvent:
    """Reads `event_json`. Raises ArtifactInvalid (STATE_MISMATCH) for another form."""
    try:
        fields = json.loads(text)
        if fields["class"] != "GaussianDpEvent" or not float(fields["noise_multiplier"]) >= 0:
            raise ValueError(fields["class"])
        return GaussianEvent(float(fields["noise_multiplier"]))
    except (ValueError, KeyError, TypeError) as cause:
        raise ArtifactInvalid(Reason.STATE_MISMATCH, "a ledger entry holds no event that this version knows") from cause


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
