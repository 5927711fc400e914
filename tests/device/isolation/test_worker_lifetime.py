"""What becomes of a worker's process when its device gives up, lacks something, or is killed."""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.isolation import process
from fedcompute.device.isolation.worker_call import WorkerFailed
from fedcompute.errors import OperationFailed, Reason


def test_a_call_that_is_cancelled_leaves_no_process_whenever_that_is(device):
    device.write("time.sleep(60)")

    async def cancelled_after(seconds):
        task = asyncio.create_task(device.calling())
        await asyncio.sleep(seconds)
        task.cancel()
        start = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - start

    async def scenario():
        return [await cancelled_after(milliseconds / 1000) for milliseconds in (0, 1, 2, 5, 10, 30, 60, 90, 120, 300)]

    assert max(asyncio.run(scenario())) < 1
    assert device.works()


def test_a_second_cancellation_does_not_interrupt_the_end(device, processes):
    device.write("time.sleep(60)")

    async def scenario():
        before = processes.children()
        task = asyncio.create_task(device.calling())
        await asyncio.sleep(0.4)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if processes.children() <= before:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the process is still there")

    asyncio.run(scenario())


def test_a_process_that_cannot_be_started_fails_the_operation(device, monkeypatch):
    device.write("return ExecuteOutput()")
    with monkeypatch.context() as changed:
        changed.setattr(sys, "executable", "/nonexistent/python")
        called = asyncio.run(device.calling())
    assert device.failure(called) == (
        Status.LOADING_FAILED,
        "on_execute: the system starts no process: No such file or directory",
    )
    assert device.works()


@pytest.mark.parametrize("free", [0, 1, 2, 3, 4, 5, 6, 8])
def test_a_device_short_of_descriptors_fails_the_operation_and_loses_none(device, free):
    device.write("return ExecuteOutput(best_value=1)")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def with_few():
        taken = []
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for _ in range(free):
                os.close(taken.pop())
            return await device.calling()
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    called = asyncio.run(with_few())
    if isinstance(called.result, WorkerFailed):
        detail = "on_execute: the system starts no process: Too many open files"
        assert device.failure(called) == (Status.LOADING_FAILED, detail)
    else:
        assert free > 4
    assert device.works()


def test_a_process_that_is_not_confined_in_time_fails_the_operation(device, monkeypatch):
    monkeypatch.setattr(process, "START_SECONDS", 0.01)
    device.write("return ExecuteOutput()")
    called = asyncio.run(device.calling())
    assert device.failure(called) == (Status.LOADING_FAILED, "on_execute: not confined within 0.01 s")


def test_a_facility_that_fails_fails_the_call_and_ends_the_process(device):
    device.write("self.local.get('k'); time.sleep(60)")
    with device.database.write() as tx:
        tx.execute("DROP TABLE local_data")
    with pytest.raises(OperationFailed, match="no such table") as caught:
        asyncio.run(device.calling())
    assert caught.value.reason is Reason.STORAGE_FAILED


PARENT = """
import asyncio, sys
from fedcompute.device.isolation.messages import Answer
from fedcompute.device.isolation.worker_call import Service, call_worker
from fedcompute.device.developer.worker import ExecuteInput

service = Service(sys.argv[1], "com.example.SampleService")
call = call_worker(
    service, "execute", ExecuteInput("a"), lambda *question: Answer(), seconds=60, memory=1 << 29, strict=True
)
asyncio.run(call)
"""


@pytest.mark.parametrize("body", ["time.sleep(60)", "while True: pass"], ids=["sleep", "spin"])
@pytest.mark.parametrize("seconds", [0, 0.03, 0.06, 0.5])
def test_a_device_that_is_killed_takes_its_workers_along(device, processes, body, seconds):
    device.write(body)
    with subprocess.Popen([sys.executable, "-c", PARENT, str(device.code)]) as parent:
        deadline = time.monotonic() + 20
        while not (workers := processes.children(parent.pid)):
            assert time.monotonic() < deadline
        time.sleep(seconds)
        (worker,) = workers
        parent.send_signal(signal.SIGKILL)
    assert processes.is_gone(worker, 2)
