"""Scheduling as a service sees it (spec/device.md 6.1, 7.3)."""

import asyncio
import logging
import threading
from datetime import timedelta

import pytest

from fedcompute.device.developer.connection import Refused
from fedcompute.device.developer.errors import ErrorCode, IllegalState, OnDevicePersonalizationException, Status
from fedcompute.device.developer.scheduling import (
    FederatedComputeInput,
    FederatedComputeScheduler,
    FederatedComputeScheduleRequest,
    FederatedComputeScheduleResponse,
    Params,
    SchedulingMode,
    TrainingInterval,
)

HOURLY = Params(TrainingInterval(SchedulingMode.RECURRENT, timedelta(hours=1)))
ONCE = Params(TrainingInterval())


class Asked:
    def __init__(self, refusal=None):
        self.refusal = refusal
        self.questions = []
        self.threads = set()

    def __call__(self, method, arguments, kind):
        self.questions.append((method, *arguments))
        self.threads.add(threading.current_thread())
        if self.refusal is not None:
            raise Refused(self.refusal, "the device says no")


def test_the_numbers_of_the_modes_are_androids():
    assert (SchedulingMode.ONE_TIME, SchedulingMode.RECURRENT) == (1, 2)


@pytest.mark.parametrize(
    ("params", "question"),
    [
        (HOURLY, ("scheduler.schedule", "p", True, 3_600_000)),
        (ONCE, ("scheduler.schedule", "p", False, 0)),
        (
            Params(TrainingInterval(SchedulingMode.ONE_TIME, timedelta(seconds=-5))),
            ("scheduler.schedule", "p", False, 0),
        ),
        (
            Params(TrainingInterval(SchedulingMode.RECURRENT, timedelta(microseconds=1999))),
            ("scheduler.schedule", "p", True, 1),
        ),
        (Params(TrainingInterval(2, timedelta(days=400))), ("scheduler.schedule", "p", True, 34_560_000_000)),
    ],
)
def test_a_schedule_travels_with_its_interval_in_milliseconds(params, question):
    asked = Asked()
    FederatedComputeScheduler(asked).schedule(params, FederatedComputeInput("p"))
    assert asked.questions == [question]


@pytest.mark.parametrize(
    ("params", "population", "said"),
    [
        (ONCE, "", "a task needs the name of a population"),
        (Params(TrainingInterval(SchedulingMode.RECURRENT)), "p", "a recurrent task needs a minimum interval"),
        (
            Params(TrainingInterval(SchedulingMode.RECURRENT, timedelta(microseconds=999))),
            "p",
            "a recurrent task needs a minimum interval",
        ),
        (Params(TrainingInterval(3)), "p", "3 is not a valid SchedulingMode"),
    ],
)
def test_a_schedule_that_is_none_raises_at_once(params, population, said):
    asked = Asked()
    scheduler = FederatedComputeScheduler(asked)
    with pytest.raises(ValueError, match=said):
        scheduler.schedule(params, FederatedComputeInput(population))
    with pytest.raises(ValueError, match=said):
        asyncio.run(scheduler.schedule_request(FederatedComputeScheduleRequest(params, population)))
    assert asked.questions == []


@pytest.mark.parametrize("status", [Status.PERSONALIZATION_DISABLED, Status.FEDERATED_COMPUTE_MANIFEST_INVALID])
def test_a_refusal_of_the_plain_call_is_logged_and_raises_nothing(caplog, status):
    scheduler = FederatedComputeScheduler(Asked(status))
    with caplog.at_level(logging.WARNING):
        scheduler.schedule(HOURLY, FederatedComputeInput("p"))
        scheduler.cancel(FederatedComputeInput("p"))
    reason = f"the device says no [{status.name.lower()}]"
    assert caplog.messages == [f"not scheduled: {reason}", f"not cancelled: {reason}"]


def test_an_operation_without_a_scheduler_is_an_illegal_state():
    scheduler = FederatedComputeScheduler(Asked(Status.PERMISSION_DENIED))
    with pytest.raises(IllegalState, match="the device says no"):
        scheduler.schedule(HOURLY, FederatedComputeInput("p"))
    with pytest.raises(IllegalState, match="the device says no"):
        scheduler.cancel(FederatedComputeInput("p"))
    with pytest.raises(IllegalState, match="the device says no"):
        asyncio.run(scheduler.schedule_request(FederatedComputeScheduleRequest(HOURLY, "p")))


def test_a_request_that_is_granted_comes_back_and_did_not_block_the_loop():
    asked = Asked()
    request = FederatedComputeScheduleRequest(HOURLY, "p")
    response = asyncio.run(FederatedComputeScheduler(asked).schedule_request(request))
    assert response == FederatedComputeScheduleResponse(request)
    assert threading.current_thread() not in asked.threads


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (Status.FEDERATED_COMPUTE_MANIFEST_INVALID, ErrorCode.INVALID_TRAINING_MANIFEST),
        (Status.PERSONALIZATION_DISABLED, ErrorCode.SCHEDULE_TRAINING_FAILED),
        (Status.INTERNAL, ErrorCode.SCHEDULE_TRAINING_FAILED),
        (Status.DATA_ACCESS, ErrorCode.SCHEDULE_TRAINING_FAILED),
    ],
)
def test_a_request_that_is_refused_says_why(status, code):
    scheduler = FederatedComputeScheduler(Asked(status))
    with pytest.raises(OnDevicePersonalizationException, match="the device says no") as caught:
        asyncio.run(scheduler.schedule_request(FederatedComputeScheduleRequest(HOURLY, "p")))
    assert caught.value.code is code


def test_a_task_is_cancelled_by_its_population():
    asked = Asked()
    FederatedComputeScheduler(asked).cancel(FederatedComputeInput("p"))
    assert asked.questions == [("scheduler.cancel", "p")]
