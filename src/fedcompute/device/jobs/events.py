"""What a scheduler tells of its work."""

from dataclasses import dataclass
from enum import StrEnum

from fedcompute.device.jobs.times import Delay
from fedcompute.device.state.tasks import Task


class EventKind(StrEnum):
    """What happened to a job."""

    WAITING = "waiting"  # due, and not fired because of `detail`; told again when that changes
    NOT_RUN = "not run"  # fired, and ended before it began because of `detail`
    STARTED = "started"
    ENDED = "ended"
    DELETED = "deleted"  # because of `detail`
    RECOVERED = "recovered"  # its run was cut off by the end of the process


@dataclass(frozen=True)
class Event:
    """One step of a federated task (`task`, as it is after it) or of a background job (`task` None).

    `time`: Unix milliseconds. `job`: population or name of the background job. `success`, `counted`, `reason` and
    `detail` are those of a run that ended; `earliest_run`: when the job is due next, `delay`: what that follows from.
    """

    time: int
    kind: EventKind
    job: str
    task: Task | None = None
    success: bool = False
    counted: bool = False
    reason: str = ""
    detail: str = ""
    earliest_run: int | None = None
    delay: Delay | None = None


def describe(event: Event) -> str:
    """One line for people, without time and job."""
    words = [event.kind.value]
    if event.kind is EventKind.ENDED:
        words.append("success" if event.success else f"failure{' (counted)' if event.counted else ''}")
    if event.reason:
        words.append(event.reason)
    if event.detail:
        words.append(f"[{event.detail}]")
    if event.delay is not None:
        server = f", server {event.delay.server / 1000:.3f} s" if event.delay.server else ""
        drawn = ", transient" if event.delay.transient is not None else ""
        words.append(f"next in {event.delay.milliseconds / 1000:.3f} s{server}{drawn}")
    return " ".join(words)
