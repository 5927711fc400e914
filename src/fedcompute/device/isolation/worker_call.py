"""One operation of a developer's worker, in a process of its own (spec/device.md 7.1)."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from fedcompute.device.developer.errors import Status
from fedcompute.device.isolation.frames import UNDECODABLE, FrameTooLarge, encode
from fedcompute.device.isolation.messages import (
    HOOKS,
    MAX_CODE,
    WORKER_MESSAGE_BYTES,
    Answer,
    Done,
    Failed,
    Invoke,
    NoInput,
    Question,
)
from fedcompute.device.isolation.process import Confinement, IsolatedProcess, NotStarted
from fedcompute.errors import DeviceRunFailed, Reason

Facilities = Callable[[str, memoryview], Answer]
"""Answers a worker's question: method, and its arguments as MessagePack, neither to be trusted. Runs in a thread."""

_FROM_WORKER = msgspec.msgpack.Decoder(Question | Done | Failed)
_ERROR_CHARACTERS = 80


class WorkerFailed(DeviceRunFailed):
    """An operation without an output. `platform_status`: how Android counts it; `code`: the developer's own, else 0.

    The detail is in the platform's words; of the developer's it has at most the name of a type.
    """

    def __init__(self, status: Status, detail: str, *, code: int = 0) -> None:
        super().__init__(Reason.WORKER_FAILED, detail)
        self.platform_status = status
        self.code = code


@dataclass(frozen=True)
class Service:
    """Which developer's class is called. `code`: the folder that it is loaded from."""

    code: str
    class_name: str


@dataclass(frozen=True)
class Called:
    """How a call ended: the output or the failure, and what the developer's code printed."""

    result: Any | WorkerFailed
    printed: str


async def call_worker(
    service: Service,
    operation: str,
    request: Any,
    facilities: Facilities,
    *,
    seconds: float,
    memory: int,
    strict: bool,
) -> Called:
    """Runs one hook of `HOOKS` in a fresh process; `request` is its input, None for a hook without.

    `seconds`: for the hook and everything around it but the start of the process. `memory`: bytes that the process may
    have for itself. Every failure of the worker is in the result. Raises OperationFailed (ISOLATION_UNAVAILABLE) where
    `strict` cannot be had, and what `facilities` raises; the process is gone then, as it is after a cancellation.

    Formal guarantees: as `IsolatedProcess`; whatever the process sends costs its own operation at most.
    """
    confinement = Confinement(
        readable=(service.code,),
        memory=memory,
        cpu_seconds=int(seconds) + 5,
        message_bytes=WORKER_MESSAGE_BYTES,
        strict=strict,
    )
    method = HOOKS[operation].method
    try:
        process = await IsolatedProcess.start("fedcompute.device.isolation.worker_main", confinement)
    except NotStarted as error:
        return Called(WorkerFailed(Status.LOADING_FAILED, f"{method}: {error}"), error.printed)
    dead = False
    try:
        async with asyncio.timeout(seconds):
            result = await _converse(process, service, operation, request, facilities)
    except TimeoutError:
        await process.print_stack()
        result = WorkerFailed(Status.SERVICE_TIMEOUT, f"{method}: no answer within {seconds:g} s")
    except EOFError:
        dead = True
    finally:
        await process.end(by_itself=dead)
    if dead:
        result = WorkerFailed(Status.SERVICE_FAILED, f"{method}: no answer; {process.how_it_ended()}")
    return Called(result, process.output)


async def _converse(
    process: IsolatedProcess, service: Service, operation: str, request: Any, facilities: Facilities
) -> Any | WorkerFailed:
    hook = HOOKS[operation]
    body = encode(NoInput() if request is None else request)
    await process.send(Invoke(service.code, service.class_name, operation, msgspec.Raw(body)))
    while True:
        try:
            message = _FROM_WORKER.decode(await process.receive())
            if isinstance(message, Done):
                size = memoryview(message.output).nbytes
                if size > hook.output_bytes:
                    raise FrameTooLarge(size, hook.output_bytes)
                return msgspec.msgpack.decode(message.output, type=hook.output)
        except FrameTooLarge as error:
            return WorkerFailed(Status.SERVICE_FAILED, f"{hook.method}: {error}")
        except UNDECODABLE as error:
            detail = f"{hook.method}: an answer that breaks a rule ({type(error).__name__})"
            return WorkerFailed(Status.SERVICE_FAILED, detail)
        if isinstance(message, Failed):
            return _failure(hook.method, message)
        # In a thread, because the database makes it wait.
        await process.send(await asyncio.to_thread(facilities, message.method, memoryview(message.arguments)))


def _failure(method: str, failed: Failed) -> WorkerFailed:
    status = Status.LOADING_FAILED if failed.loading else Status.SERVICE_FAILED
    error = failed.error if failed.error.isidentifier() else "an error"
    code = failed.code if 0 <= failed.code <= MAX_CODE else 0
    return WorkerFailed(status, f"{method}: {error[:_ERROR_CHARACTERS]}", code=code)
