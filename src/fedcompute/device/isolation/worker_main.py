"""The process of one worker call: `python -m fedcompute.device.isolation.worker_main DESCRIPTOR`."""

import asyncio
import contextlib
import faulthandler
import importlib
import inspect
import re
import sys
import threading
import traceback
from typing import Any

import msgspec

from fedcompute.device.developer.connection import Refused, RequestToken
from fedcompute.device.developer.errors import IsolatedServiceException, Status
from fedcompute.device.developer.key_values import KeyValueStore
from fedcompute.device.developer.service import IsolatedService
from fedcompute.device.developer.worker import DownloadCompletedInput, IsolatedWorker
from fedcompute.device.isolation.child import enter
from fedcompute.device.isolation.frames import ChildEnd, FrameTooLarge, encode
from fedcompute.device.isolation.messages import HOOKS, MAX_CODE, Answer, Done, Failed, Invoke, Question
from fedcompute.device.isolation.process import STACK_SIGNAL


class _Connection:
    """Questions of this process, one after the other, from whichever thread, until the last word."""

    def __init__(self, end: ChildEnd) -> None:
        self._end = end
        self._lock = threading.Lock()

    def ask(self, method: str, arguments: tuple[Any, ...], kind: Any) -> Any:
        question = Question(method, msgspec.Raw(encode(arguments)))
        with self._lock:
            try:
                self._end.send(question)
            except FrameTooLarge as error:
                raise Refused(Status.INTERNAL, str(error)) from None
            answer = msgspec.msgpack.decode(self._end.receive(), type=Answer)
        if answer.status != Status.SUCCESS:
            raise Refused(answer.status, answer.detail)
        return msgspec.msgpack.decode(answer.value, type=kind)

    def conclude(self, message: Done | Failed) -> None:
        """Sends the outcome. A thread that asks afterwards waits for the end of the process."""
        self._lock.acquire()
        self._end.send(message)


def main() -> None:
    """Confines itself, runs one hook, sends its output."""
    end, _ = enter()
    faulthandler.register(STACK_SIGNAL)
    invoke = msgspec.msgpack.decode(end.receive(), type=Invoke)
    connection = _Connection(end)
    message: Done | Failed
    try:
        service = _load(invoke.code, invoke.class_name)()
    except BaseException as error:
        message = _failed(error, loading=True)
    else:
        try:
            message = Done(msgspec.Raw(_call(service, RequestToken(connection.ask), invoke)))
        except BaseException as error:
            message = _failed(error, loading=False)
    connection.conclude(message)


def _load(code: str, class_name: str) -> type[IsolatedService]:
    """The class that the manifest names, from the app's folder.

    `a.b.SampleService` is `SampleService` of the module `a.b`, or, where the folder holds no package `a`, of the
    module `sample_service`.
    """
    sys.path.insert(0, code)
    module_name, _, name = class_name.rpartition(".")
    try:
        module = importlib.import_module(module_name or _snake_case(name))
    except ModuleNotFoundError as error:
        # One that the app's own module asks for in vain is another matter.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        module = importlib.import_module(_snake_case(name))
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, IsolatedService)):
        raise TypeError(f"module {module.__name__} has no IsolatedService named {name}")
    return found


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _call(service: IsolatedService, token: RequestToken, invoke: Invoke) -> bytes:
    """The hook's output as it travels; raises for one that the device would refuse, so that its developer sees why."""
    hook = HOOKS[invoke.operation]
    worker = service.on_request(token)
    if not isinstance(worker, IsolatedWorker):
        raise TypeError(f"on_request returned {type(worker).__name__}, which is no IsolatedWorker")
    if invoke.operation == "download_completed":
        request: Any = DownloadCompletedInput(KeyValueStore(token, "downloaded_contents"))
    else:
        request = msgspec.msgpack.decode(invoke.input, type=hook.input)
    output = getattr(worker, hook.method)(request)
    if inspect.iscoroutine(output):
        output = asyncio.run(output)
    if not isinstance(output, hook.output):
        raise TypeError(f"{hook.method} returned {type(output).__name__}, not {hook.output.__name__}")
    body = encode(output)
    if len(body) > hook.output_bytes:
        raise ValueError(f"{hook.method} returned {len(body)} bytes; at most {hook.output_bytes} are taken")
    msgspec.msgpack.decode(body, type=hook.output)
    return body


def _failed(error: BaseException, *, loading: bool) -> Failed:
    with contextlib.suppress(Exception):
        # To the developer's log; the developer's code may have closed or replaced sys.stderr.
        traceback.print_exception(error, file=sys.__stderr__)
    code = error.code if isinstance(error, IsolatedServiceException) else 0
    return Failed(loading, code if type(code) is int and 0 <= code <= MAX_CODE else 0, type(error).__name__)


if __name__ == "__main__":
    main()
