"""Asks a worker for its training examples (spec/device.md 5.3)."""

import asyncio

from fedcompute.device.worker import IsolatedWorker, TrainingExampleInput, TrainingExampleOutput, TrainingExampleRecord
from fedcompute.errors import DeviceRunFailed, Reason


async def query_examples(
    worker: IsolatedWorker, request: TrainingExampleInput, *, min_count: int, timeout: float
) -> tuple[TrainingExampleRecord, ...]:
    """All records of the worker, at least one and at least `min_count`.

    The hook runs on a thread and has `timeout` seconds. Raises DeviceRunFailed (EXAMPLES_FAILED) if it raises, is
    late, answers something else or has too few records.
    """
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(timeout):
            output = await asyncio.to_thread(worker.on_training_examples, request)
    except TimeoutError:
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"the worker gave no examples within {timeout} s") from None
    except Exception as error:  # a developer's code may raise anything; it costs this run only
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"the worker raised {type(error).__name__}: {error}") from error
    records = tuple(output.training_example_records) if isinstance(output, TrainingExampleOutput) else ()
    if not all(isinstance(record, TrainingExampleRecord) for record in records):
        raise DeviceRunFailed(Reason.EXAMPLES_FAILED, "the worker's records are no TrainingExampleRecord")
    if len(records) < max(1, min_count):
        raise DeviceRunFailed(
            Reason.EXAMPLES_FAILED, f"{len(records)} examples, at least {max(1, min_count)} are wanted"
        )
    return records
