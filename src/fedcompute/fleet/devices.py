"""Simulated devices of one process: each with its own data, worker, history and keys, all on one event loop."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedcompute.device.client.authorization import Prove
from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Transport
from fedcompute.device.client.runtime import Device, DeviceSettings, RunOutcome
from fedcompute.device.developer.worker import (
    IsolatedWorker,
    TrainingExampleInput,
    TrainingExampleOutput,
    TrainingExampleRecord,
)
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.device.state.history import TaskHistory
from fedcompute.fleet.settings import FleetSettings, read_fleet_enrolments
from fedcompute.models.datasets import examples, load_dataset

# After a failure without a retry window, seconds; a phone would wait a quarter of an hour.
_FAILURE_PAUSE = 2.0


class ShardWorker(IsolatedWorker):
    """A developer's worker whose device holds a fixed set of records."""

    def __init__(self, population: str, records: Sequence[bytes]) -> None:
        self._population = population
        self._records = tuple(TrainingExampleRecord(record) for record in records)

    def on_training_example(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        if request.population_name != self._population:
            return TrainingExampleOutput()
        return TrainingExampleOutput(self._records)


@dataclass(frozen=True)
class Observer:
    """Is told what devices do: `state(device, name)` at each change, `ended(device, outcome)` after each run."""

    state: Callable[[int, str], None]
    ended: Callable[[int, RunOutcome], None]


async def run_devices(settings: FleetSettings, numbers: Sequence[int], observer: Observer) -> None:
    """Runs the devices `numbers` until cancelled; they start spread over `pause_maximum` seconds."""
    enrolments = read_fleet_enrolments(settings)
    shards = list(load_dataset(settings.data, settings.devices, settings.seed).clients.values())
    runner = PlanRunner()
    try:
        async with Transport() as transport, asyncio.TaskGroup() as group:
            for number in numbers:
                images, labels = shards[number % len(shards)]
                worker = ShardWorker(settings.population, examples(images, labels))
                prove = enrolments[number].prove if enrolments else None
                group.create_task(_run_device(settings, number, worker, transport, runner, observer, prove))
    finally:
        runner.close()


async def _run_device(
    settings: FleetSettings,
    number: int,
    worker: IsolatedWorker,
    transport: Transport,
    runner: PlanRunner,
    observer: Observer,
    prove: Prove | None,
) -> None:
    chance = random.Random(f"{settings.seed}/{number}")
    device = Device(
        DeviceSettings(
            server=settings.server_url,
            population=settings.population,
            owner=Owner("org.fedcompute.fleet", f"org.fedcompute.fleet.Device{number}"),
            failed_training_delay=_FAILURE_PAUSE,
        ),
        in_process(worker),
        transport=transport,
        train=runner.train,
        history=TaskHistory(),
        on_state=lambda state: observer.state(number, state),
        chance=chance,
        prove=prove,
    )
    await asyncio.sleep(chance.uniform(0, settings.pause_maximum))
    # A cancellation that something below has swallowed still counts: nobody will repeat it.
    while not _is_cancelled():
        outcome = await device.run_once()
        observer.ended(number, outcome)
        observer.state(number, "waiting")
        await asyncio.sleep(_pause(settings, outcome, chance))


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _pause(settings: FleetSettings, outcome: RunOutcome, chance: random.Random) -> float:
    if outcome.retry_window is not None:
        return outcome.retry_window
    if outcome.success or outcome.reason == "not_eligible":
        return chance.uniform(settings.pause_minimum, settings.pause_maximum)
    return chance.uniform(0.5, 1.5) * _FAILURE_PAUSE
