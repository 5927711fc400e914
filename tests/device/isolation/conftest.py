"""Attempts in bare confined processes, apps in those of workers, and what both leave behind."""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.developer.worker import ExecuteInput, ExecuteOutput
from fedcompute.device.facilities import Facilities, NotAnswered, Outside
from fedcompute.device.isolation.frames import encode
from fedcompute.device.isolation.messages import HOOKS
from fedcompute.device.isolation.probe import probe
from fedcompute.device.isolation.sandbox import Restriction
from fedcompute.device.isolation.trainer import IsolatedTrainer
from fedcompute.device.isolation.worker_call import Called, Service, WorkerFailed, call_worker
from fedcompute.device.owner import Owner
from fedcompute.device.state.apps import App
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.protos.example_query_result_pb2 import ExampleQueryResult
from fedcompute.tensors.checkpoint import read_checkpoint

MEBIBYTE = 1 << 20
SECONDS = 60

CHILD = """
import ctypes, dataclasses, json, os, sys, time
from pathlib import Path
from fedcompute.device.isolation import grants, landlock, privileges, sandbox, seccomp

given = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    if libc.syscall(number, *map(ctypes.c_ulong, arguments)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def confine():
    return sandbox.confine(sandbox.Policy(**given["policy"]), **given["options"])

{before}
report = confine()

def attempt():
{attempt}

try:
    outcome = {{"did": attempt()}}
except BaseException as error:
    outcome = {{"refused": type(error).__name__, "errno": getattr(error, "errno", None)}}
sys.stdout.write(json.dumps(outcome | {{"report": list(map(dataclasses.asdict, report))}}))
"""


@dataclass
class Outcome:
    """How a child ended: its exit status, what its attempt returned or was refused with, its report, its stderr."""

    status: int
    did: Any
    refused: str | None
    errno: int | None
    report: list[Restriction]
    errors: str

    def by_name(self, name: str) -> Restriction:
        return next(restriction for restriction in self.report if restriction.name == name)


class Sandbox:
    """Runs attempts in fresh confined processes; `data` may be read, `scratch` written, `private` neither."""

    def __init__(self, directory: Path) -> None:
        self.data, self.scratch, self.private = (directory / name for name in ("data", "scratch", "private"))
        for path in (self.data, self.scratch, self.private):
            path.mkdir()
            (path / "file").write_text("kept")
        self.given: dict[str, Any] = {"parent": os.getpid(), **{name: str(getattr(self, name)) for name in vars(self)}}

    def command(self, attempt: str, before: str, options: dict[str, Any], policy: dict[str, Any]) -> list[str]:
        policy = {
            "readable": [str(self.data)],
            "writable": [str(self.scratch)],
            "memory": 256 * MEBIBYTE,
            "cpu_seconds": 30,
            "file_bytes": MEBIBYTE,
            **policy,
        }
        body = textwrap.indent(textwrap.dedent(attempt), "    ")
        program = CHILD.format(before=textwrap.dedent(before), attempt=body)
        given = json.dumps({**self.given, "policy": policy, "options": options})
        return [sys.executable, "-P", "-c", program, given]

    def run(
        self,
        attempt: str,
        *,
        before: str = "",
        options: dict[str, Any] | None = None,
        pass_fds: tuple[int, ...] = (),
        environment: dict[str, str] | None = None,
        **policy: Any,
    ) -> Outcome:
        done = subprocess.run(
            self.command(attempt, before, options or {}, policy),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            pass_fds=pass_fds,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **(environment or {})},
        )
        found = json.loads(done.stdout or "{}")
        report = [Restriction(**{**each, "by": tuple(each["by"])}) for each in found.get("report", [])]
        return Outcome(done.returncode, found.get("did"), found.get("refused"), found.get("errno"), report, done.stderr)


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.fixture
def needs():
    """`needs("network")` skips where the machine itself cannot enforce it."""

    def check(*names: str) -> None:
        for restriction in probe():
            if restriction.name in names and not restriction.enforced:
                pytest.skip(f"{restriction.name} is not enforced on this machine: {restriction.why}")

    return check


@pytest.fixture(scope="session")
def confined():
    """Skips where the machine cannot confine a process."""
    missing = [f"{one.name} ({one.why})" for one in probe() if not one.enforced]
    if missing:
        pytest.skip(f"this machine does not enforce {', '.join(missing)}")


class Processes:
    """The processes of this machine, and what this one uses up."""

    @staticmethod
    def children(parent: int | None = None) -> set[int]:
        """What a process, this one by default, has started and what is there still, zombies included."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent_of_it = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent_of_it == (parent or os.getpid()):
                found.add(int(path.parent.name))
        return found

    @staticmethod
    def is_gone(pid: int, seconds: float) -> bool:
        """Whether a process ends within that time; a zombie has ended."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return True
            except OSError:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)

    @staticmethod
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    @staticmethod
    @contextmanager
    def bounded_memory(limit: int):
        """Fails if this process ever has over `limit` bytes more in memory than at the beginning of the block."""
        # 5: the peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        yield
        (peak,) = (
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        assert peak - before < limit, f"{(peak - before) / MEBIBYTE:.0f} MiB more at its peak"


@pytest.fixture
def processes():
    """Fails if the test leaves a process or a descriptor behind."""
    children, descriptors = Processes.children(), Processes.descriptors()
    yield Processes()
    assert Processes.children() <= children
    assert Processes.descriptors() <= descriptors


SERVICE = """
import asyncio, ctypes, msgspec, os, signal, socket, struct, subprocess, sys, threading, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from fedcompute.device import *

def send(body, announced=None):
    # What the process says to the device, without anybody's leave.
    os.write(int(sys.argv[1]), struct.pack(">I", len(body) if announced is None else announced) + body)

def say(kind, **fields):
    send(msgspec.msgpack.encode({{"type": kind, **fields}}))

def done(**output):
    say("Done", output=output)
    time.sleep(60)

class SampleService(IsolatedService):
    def on_request(self, token):
        return Worker(self, token)

class Worker(IsolatedWorker):
    def __init__(self, service, token):
        self.service, self.token = service, token
        self.local = service.get_local_data(token)

    {kind} {hook}(self, request):
{body}
"""


class Device:
    """One device with an app whose hook is written in the test."""

    def __init__(self, directory: Path) -> None:
        self.database = DeviceDatabase(directory / "device.db")
        self.owner = Owner("com.example.app", "com.example.app.SampleService", "A" * 64)
        self.code = directory / "app"
        self.code.mkdir()
        self.scheduled: list[Any] = []
        self.outside = Outside(
            database=self.database,
            user_data=lambda app: UserData(battery_percentage=55),
            schedule=self.schedule,
            cancel=lambda app, population: self.scheduled.append(population),
            event_url=lambda app, *what: f"odp://localhost?e={len(what)}",
            writes_local=True,
            local_bytes_limit=100 * MEBIBYTE,
        )

    def schedule(self, app: App, population: str, recurrent: bool, interval: int) -> None:
        if population == "refused":
            raise NotAnswered(Status.FEDERATED_COMPUTE_MANIFEST_INVALID, "the manifest names no server")
        self.scheduled.append((population, recurrent, interval))

    def write(self, body: str, operation: str = "execute", *, kind: str = "def") -> None:
        """Makes `body` the app's hook for the operation."""
        hook, body = HOOKS[operation].method, textwrap.indent(textwrap.dedent(body), " " * 8)
        (self.code / "sample_service.py").write_text(SERVICE.format(hook=hook, body=body, kind=kind))

    async def calling(
        self,
        operation: str = "execute",
        request: Any = None,
        *,
        class_name: str = "com.example.app.SampleService",
        downloaded: Mapping[str, bytes] | None = None,
        seconds: float = 20.0,
        memory: int = 512 * MEBIBYTE,
    ) -> Called:
        """Calls the hook that is written."""
        return await call_worker(
            Service(str(self.code), class_name),
            operation,
            ExecuteInput("com.example.caller") if request is None and operation == "execute" else request,
            Facilities(self.outside, App(self.owner, self.code), operation, downloaded),
            seconds=seconds,
            memory=memory,
            strict=True,
        )

    def call(
        self, body: str, operation: str = "execute", request: Any = None, *, kind: str = "def", **more: Any
    ) -> Called:
        self.write(body, operation, kind=kind)
        return asyncio.run(self.calling(operation, request, **more))

    def works(self) -> bool:
        """Whether the next call is as if nothing had been before it."""
        return self.answer(self.call("return ExecuteOutput(best_value=7)")) == self.plain(ExecuteOutput(best_value=7))

    @staticmethod
    def plain(value: Any) -> Any:
        """A value as it travels; a list and a tuple are the same then."""
        return msgspec.msgpack.decode(encode(value))

    @classmethod
    def answer(cls, called: Called) -> Any:
        """The output of a call that went well, as it travels."""
        assert not isinstance(called.result, WorkerFailed), f"{called.result}\n{called.printed}"
        return cls.plain(called.result)

    @staticmethod
    def failure(called: Called) -> tuple[Status, str]:
        """Status and detail of a call that failed."""
        assert isinstance(called.result, WorkerFailed), called
        return called.result.platform_status, called.result.detail


@pytest.fixture
def device(tmp_path, confined, processes):
    device = Device(tmp_path)
    yield device
    device.database.close()


@pytest.fixture(scope="session")
def query_plan() -> plan_pb2.ClientOnlyPlan:
    """A plan that TensorFlow is not needed for; its update is the vector `v` of the one example."""
    plan = plan_pb2.ClientOnlyPlan()
    query = plan.phase.example_query_spec.example_queries.add()
    query.output_vector_specs["v"].vector_name = "v"
    query.output_vector_specs["v"].data_type = plan_pb2.ExampleQuerySpec.OutputVectorSpec.DataType.INT64
    plan.phase.federated_example_query.aggregations["v"].tf_v1_checkpoint_aggregation.SetInParent()
    return plan


def query_example(value: int) -> bytes:
    result = ExampleQueryResult()
    result.vector_data.vectors["v"].int64_values.value.append(value)
    return result.SerializeToString()


@pytest.fixture
def answered(query_plan):
    """`await answered(trainer, value)`: whether a training that needs no TensorFlow gives what it should."""

    async def run(trainer: IsolatedTrainer, value: int, owner: str = "owner") -> bool:
        result = await trainer.train(owner, query_plan, b"", [query_example(value)])
        return read_checkpoint(result.update)["v"].tolist() == [value]

    return run


@pytest.fixture
def aborted():
    """`await aborted(training)`: the detail of a training that fails as TRAINING_ABORTED."""

    async def run(awaitable: Any) -> str:
        with pytest.raises(DeviceRunFailed) as caught:
            await awaitable
        assert caught.value.reason is Reason.TRAINING_ABORTED
        return caught.value.detail

    return run


@pytest.fixture
def light(tmp_path, processes):
    """`light(scenario, **options)` runs `scenario(trainer)`; nothing is left behind then."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    async def run(scenario: Callable[[IsolatedTrainer], Any], options: dict[str, Any]) -> Any:
        trainer = IsolatedTrainer(scratch, **options)
        try:
            return await scenario(trainer)
        finally:
            await trainer.close()
            assert trainer.pid is None

    def go(scenario: Callable[[IsolatedTrainer], Any], **options: Any) -> Any:
        result = asyncio.run(run(scenario, options))
        assert list(scratch.iterdir()) == []
        return result

    return go
