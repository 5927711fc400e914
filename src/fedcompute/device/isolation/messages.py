"""What a device and its isolated processes say to each other."""

from dataclasses import dataclass

import msgspec

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.worker import (
    DownloadCompletedOutput,
    EventInput,
    EventOutput,
    ExecuteInput,
    ExecuteOutput,
    RenderInput,
    RenderOutput,
    TrainingExampleInput,
    TrainingExampleOutput,
    WebTriggerInput,
    WebTriggerOutput,
)
from fedcompute.device.isolation.sandbox import Restriction


class NoInput(msgspec.Struct, frozen=True):
    """The input of a hook that reads everything through facilities."""


MAX_CODE = 127  # of an IsolatedServiceException
_MEBIBYTE = 1 << 20
_ENVELOPE = 1 << 16


@dataclass(frozen=True)
class Hook:
    """One operation of a worker: the method, and what travels to and from it.

    `output_bytes`: of the largest output. Decoded, it may take 75 times as much of the device's memory if it consists
    of the smallest parts that there are; for training examples 10 times, for keys 25.
    """

    method: str
    input: type
    output: type
    output_bytes: int = _MEBIBYTE


HOOKS = {
    "execute": Hook("on_execute", ExecuteInput, ExecuteOutput),
    "download_completed": Hook("on_download_completed", NoInput, DownloadCompletedOutput, 8 * _MEBIBYTE),
    "render": Hook("on_render", RenderInput, RenderOutput),
    "event": Hook("on_event", EventInput, EventOutput),
    "training_examples": Hook("on_training_examples", TrainingExampleInput, TrainingExampleOutput, 64 * _MEBIBYTE),
    "web_trigger": Hook("on_web_trigger", WebTriggerInput, WebTriggerOutput),
}

WORKER_MESSAGE_BYTES = max(hook.output_bytes for hook in HOOKS.values()) + _ENVELOPE
"""Of the largest message that a worker may send."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Device to process, first of all: what it may read and write, and how much of everything it may use.

    `parent`: the device's process id. `message_bytes`: of the largest message that the device takes. `seconds`: of one
    computation, for a process that keeps the time itself.
    """

    parent: int
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    memory: int
    seconds: float
    cpu_seconds: int
    file_bytes: int
    message_bytes: int
    trains: bool


class Confined(msgspec.Struct, frozen=True, tag=True):
    """Process to device: the sandbox is closed; what of it the kernel enforces."""

    report: tuple[Restriction, ...]


class Invoke(msgspec.Struct, frozen=True, tag=True):
    """Device to worker: which class, which operation. `code`: the app's folder."""

    code: str
    class_name: str
    operation: str
    input: msgspec.Raw


class Question(msgspec.Struct, frozen=True, tag=True):
    """Worker to device: a facility is used."""

    method: str
    arguments: msgspec.Raw


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Device to worker: what the facility says, or, with a status other than SUCCESS, why it says nothing."""

    value: msgspec.Raw = msgspec.Raw(msgspec.msgpack.encode(None))
    status: Status = Status.SUCCESS
    detail: str = ""


class Done(msgspec.Struct, frozen=True, tag=True):
    """Worker to device: the hook's output."""

    output: msgspec.Raw


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to device: no output. `error`: the exception's type; `code`: of an `IsolatedServiceException`, else 0.

    What the exception says may quote a user's data; it stands in what the process prints, and nowhere else.
    """

    loading: bool
    code: int
    error: str


class Train(msgspec.Struct, frozen=True, tag=True):
    """Device to trainer: one computation; `plan` is a serialized ClientOnlyPlan."""

    plan: bytes
    checkpoint: bytes
    examples: list[bytes]


class Trained(msgspec.Struct, frozen=True, tag=True):
    """Trainer to device: the update checkpoint, and what went into it."""

    update: bytes
    example_count: int
    example_bytes: int


class TrainingFailed(msgspec.Struct, frozen=True, tag=True):
    """Trainer to device: no update; `reason` is a code of the error catalogue."""

    reason: str
    detail: str
    remedy: str
