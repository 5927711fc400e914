"""Asks a worker for its training examples (spec/device.md 5.3)."""

import asyncio
from collections.abc import Awaitable, Callable

from fedcompute.device.developer.worker import (
    IsolatedWorker,
    TrainingExampleInput,
    TrainingExampleOutput,
    TrainingExampleRecord,
)
from fedcompute.errors import DeviceRunFailed, Reason

ExampleSource = Callable[[TrainingExampleInput], Awaitable[TrainingExampleOutput]]
"""Where examples come from: a worker in a process of its own, or `in_process`."""


def in_process(worker: IsolatedWorker) -> ExampleSource:
    """A worker of this very process, on a thread: for simulated devices, whose code is trusted."""

    async def ask(request: TrainingExampleInput) -> TrainingExampleOutput:
        try:
            return await asyncio.to_thread(worker.on_training_examples, request)
        except Exception as error:  # a developer's code may raise anything; it costs this run only
            detail = f"the worker raised {type(error).__name__}: {error}"
            raise DeviceRunFailed(Reason.EXAMPLES_FAILED, detail) from error

    return ask


async def query_examples(
    source: ExampleSource, request: TrainingExampleInput, *, min_count: int, timeout: float
) -> tuple[TrainingExampleRecord, ...]:
    """All records of the worker, at least one and at least `min_count`, within `timeout` seconds.

    Raises DeviceRunFailed (EXAMPLES_FAILED) if the worker is late, answers something else or has too few, else what
    the source raises.
    """
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(timeout):
            output = await source(request)
    except TimeoutError:
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"the worker gave no examples within {timeout} s") from None
    records = tuple(output.training_example_records) if isinstance(output, TrainingExampleOutput) else ()
    if not all(isinstance(record, TrainingExampleRecord) for record in records):
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, "the worker's records are no TrainingExampleRecord")
    if len(records) < max(1, min_count):
        raise DeviceRunFailed(
            Reason.EXAMPLES_FAILED, f"{len(records)} examples, at least {max(1, min_count)} are wanted"
        )
    return records
