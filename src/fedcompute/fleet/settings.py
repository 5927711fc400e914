"""What a fleet is: how many devices, of which population, with which data."""

import json
from dataclasses import asdict, dataclass

from fedcompute.errors import OperationFailed, Reason


@dataclass(frozen=True)
class FleetSettings:
    """One fleet. Device i is an owner of its own and holds shard i of the data set.

    `pause_minimum`, `pause_maximum`: seconds between a contribution and the next check-in, drawn uniformly; the
    server's retry windows are obeyed as they come. `data`: name or path of a data set (`models.datasets`).
    """

    server_url: str
    population: str
    devices: int = 40
    processes: int = 2
    data: str = "digits"
    seed: int = 0
    pause_minimum: float = 0.1
    pause_maximum: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= self.devices:
            raise OperationFailed(
                Reason.SETTINGS_INVALID,
                f"{self.processes} processes for {self.devices} devices; need 1 to {self.devices}",
            )
        if not 0 <= self.pause_minimum <= self.pause_maximum:
            raise OperationFailed(Reason.SETTINGS_INVALID, "the pause needs 0 <= minimum <= maximum seconds")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "FleetSettings":
        return cls(**json.loads(text))
