"""What a fleet is: how many devices, of which population, with which data."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedcompute.device.client.authorization import Enrolment, read_enrolments
from fedcompute.errors import OperationFailed, Reason


@dataclass(frozen=True)
class FleetSettings:
    """One fleet. Device i is an owner of its own and holds shard i of the data set.

    `pause_minimum`, `pause_maximum`: seconds between a contribution and the next check-in, drawn uniformly; the
    server's retry windows are obeyed as they come. `data`: name or path of a data set (`models.datasets`).
    `enrolments`: file with a line `ID:SECRET` for each device, None for a server that takes any.
    """

    server_url: str
    population: str
    devices: int = 40
    processes: int = 2
    data: str = "digits"
    seed: int = 0
    pause_minimum: float = 0.1
    pause_maximum: float = 0.5
    enrolments: str | None = None

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


def read_fleet_enrolments(settings: FleetSettings) -> list[Enrolment]:
    """The enrolments of the devices by their numbers, none for a server that takes any device.

    Raises OperationFailed(SETTINGS_INVALID) for a file that cannot be read or has fewer lines than there are devices.
    """
    if settings.enrolments is None:
        return []
    enrolments = read_enrolments(Path(settings.enrolments))
    if len(enrolments) < settings.devices:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"{len(enrolments)} enrolments for {settings.devices} devices",
            remedy="every device needs one of its own: fedcompute enrolment create --count N",
        )
    return enrolments
