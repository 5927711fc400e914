"""How devices are assumed to come to rounds: what decides the epsilon of a given noise."""

from dataclasses import dataclass
from enum import IntEnum


class Participation(IntEnum):
    """Codes of the configuration field `differential_privacy.participation` and of a plan's privacy claim."""

    POISSON = 1
    FIXED_SIZE = 2
    MIN_SEPARATION = 3
    NO_AMPLIFICATION = 4


@dataclass(frozen=True)
class Assumption:
    """Who takes part when. `minimum_separation`: two rounds of one device are at least so many rounds apart.

    POISSON: each round is a fresh Poisson sample, every one of `population` devices with probability `report_goal` /
    `population`; for tree types the reference's claim, one participation in the whole task. FIXED_SIZE: each round is a
    fresh sample of `report_goal` out of `population` devices. MIN_SEPARATION: whenever devices like, separated so.
    NO_AMPLIFICATION: whenever devices like, in every round at worst.
    """

    participation: Participation
    population: int  # devices
    report_goal: int  # devices
    minimum_separation: int = 0  # rounds; 0 and 1: none
