"""What an examination says: findings, each with a stable code, the numbers, and what a person does next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from fedcompute.server.settings import Settings
from fedcompute.storage.blobs import BlobStore
from fedcompute.storage.database import Database


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `fix`, where there is one, is safe beside a server that runs."""

    code: str
    subject: str  # a task, round, object, file or population
    what: str
    remedy: str
    numbers: dict[str, float | str] = field(default_factory=dict)
    fix: Callable[[], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Patient:
    """The stores of one server, its settings, and the time of the examination."""

    settings: Settings
    database: Database
    blobs: BlobStore
    now: datetime


@dataclass(frozen=True)
class Limits:
    """How long something may take before it is a finding, in seconds, unless named otherwise."""

    collecting: float = 24 * 3_600.0
    working: float = 15 * 60.0  # a sum, an update, a batch
    idle: float = 10 * 60.0  # an open task between two rounds, an upload that no batch holds
    artifacts: float = 3_600.0
    key_days: float = 1.0
    skew: float = 5.0
    budget_share: float = 0.9
    free_bytes: int = 1 << 30
    free_share: float = 0.05


def spoken(seconds: float) -> str:
    """A duration as people say it."""
    for length, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def age(patient: Patient, since: datetime) -> float:
    """Seconds from `since` until the examination."""
    return (patient.now - since) / timedelta(seconds=1)
