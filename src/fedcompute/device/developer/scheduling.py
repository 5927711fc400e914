"""How a service has a model trained (spec/device.md 6.1, 7.3)."""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum

from fedcompute.device.developer.connection import Ask, Refused
from fedcompute.device.developer.errors import ErrorCode, IllegalState, OnDevicePersonalizationException, Status

_LOG = logging.getLogger(__name__)


class SchedulingMode(IntEnum):
    """Whether a task ends with its first success."""

    ONE_TIME = 1
    RECURRENT = 2


@dataclass(frozen=True)
class TrainingInterval:
    """How often to train. `minimum_interval` counts for recurrent tasks: the device keeps it within 1 minute and 6
    days, and waits longer when the server says so.
    """

    scheduling_mode: SchedulingMode = SchedulingMode.ONE_TIME
    minimum_interval: timedelta = field(default_factory=timedelta)


@dataclass(frozen=True)
class Params:
    """How a task is to be scheduled."""

    training_interval: TrainingInterval


@dataclass(frozen=True)
class FederatedComputeInput:
    """Which population a task belongs to."""

    population_name: str = ""


@dataclass(frozen=True)
class FederatedComputeScheduleRequest:
    """One request to `schedule_request`."""

    params: Params
    population_name: str


@dataclass(frozen=True)
class FederatedComputeScheduleResponse:
    """The request that was granted."""

    request: FederatedComputeScheduleRequest


class FederatedComputeScheduler:
    """Schedules and cancels the training tasks of one service."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def schedule(self, params: Params, compute_input: FederatedComputeInput) -> None:
        """Schedules a task, or renews it. A refusal of the device is logged and has no other consequence.

        Raises ValueError for an empty population or a recurrent task without an interval, IllegalState in an operation
        that may not schedule.
        """
        try:
            self._schedule(params, compute_input.population_name)
        except Refused as refused:
            _log(refused, "not scheduled")

    async def schedule_request(self, request: FederatedComputeScheduleRequest) -> FederatedComputeScheduleResponse:
        """`schedule` that tells how it went.

        Raises OnDevicePersonalizationException: INVALID_TRAINING_MANIFEST if the app declares no usable server,
        SCHEDULE_TRAINING_FAILED for every other refusal; else as `schedule`.
        """
        try:
            await asyncio.to_thread(self._schedule, request.params, request.population_name)
        except Refused as refused:
            if refused.status == Status.PERMISSION_DENIED:
                raise IllegalState(refused.detail) from None
            invalid = refused.status == Status.FEDERATED_COMPUTE_MANIFEST_INVALID
            code = ErrorCode.INVALID_TRAINING_MANIFEST if invalid else ErrorCode.SCHEDULE_TRAINING_FAILED
            raise OnDevicePersonalizationException(code, refused.detail) from None
        return FederatedComputeScheduleResponse(request)

    def cancel(self, compute_input: FederatedComputeInput) -> None:
        """Ends a task. One that was never scheduled is ended already."""
        try:
            self._ask("scheduler.cancel", (compute_input.population_name,), None)
        except Refused as refused:
            _log(refused, "not cancelled")

    def _schedule(self, params: Params, population: str) -> None:
        interval = params.training_interval
        milliseconds = interval.minimum_interval // timedelta(milliseconds=1)
        if not population:
            raise ValueError("a task needs the name of a population")
        recurrent = SchedulingMode(interval.scheduling_mode) == SchedulingMode.RECURRENT
        if recurrent and milliseconds <= 0:
            raise ValueError("a recurrent task needs a minimum interval of at least a millisecond")
        self._ask("scheduler.schedule", (population, recurrent, max(milliseconds, 0)), None)


def _log(refused: Refused, what: str) -> None:
    """Raises IllegalState for a facility that the operation lacks; a refusal goes to what the service prints."""
    if refused.status == Status.PERMISSION_DENIED:
        raise IllegalState(refused.detail) from None
    _LOG.warning("%s: %s", what, refused)
