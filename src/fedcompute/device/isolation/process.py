"""One isolated process, seen from the device: started, spoken to, its words kept, ended (spec/device.md 7.1)."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from fedcompute.device.isolation.frames import FrameTooLarge, read_frame, write_frame
from fedcompute.device.isolation.messages import Confined, Start
from fedcompute.device.isolation.sandbox import require

START_SECONDS = 15.0
OUTPUT_LIMIT = 64 * 1024  # bytes of what the process prints that are kept
STACK_SIGNAL = signal.SIGUSR1
_OWN_END_SECONDS = 2.0
_PRINT_SECONDS = 0.2
_SIGNALS = {one.value: one.name for one in signal.Signals}
_REPORT_LIMIT = 64 * 1024
# What a terminal would obey, but for line feed and tab.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
# Which kernels a BLAS library takes is a fact of the machine, not of the caller.
_PASSED_ON = ("LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


class NotStarted(Exception):
    """A process that did not come to be confined; its text says why. `printed`: what it said itself."""

    def __init__(self, why: str, printed: str = "") -> None:
        super().__init__(why)
        self.printed = printed


@dataclass(frozen=True)
class Confinement:
    """What an isolated process may do. `strict`: refuse to go on where the kernel does not enforce all of it.

    `readable`, `writable`: paths beside Python's own files. `memory`: bytes of private memory. `seconds`: of one
    computation, where the process keeps the time itself. `cpu_seconds`: of all its threads. `file_bytes`: of the
    largest file that it may write. `message_bytes`: of its largest message.
    """

    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    memory: int = 512 << 20
    seconds: float = 0.0
    cpu_seconds: int = 60
    file_bytes: int = 0
    message_bytes: int = 64 << 20
    trains: bool = False
    strict: bool = True


class IsolatedProcess:
    """A confined process, from `start` to `end`.

    Formal guarantees: no code of a developer and nothing of a plan is loaded before `sandbox.confine` has returned in
    the process, and with `strict` before this side has seen that every restriction is enforced. The process holds a
    socket to this one and a pipe for what it prints, and no other descriptor; it dies with the thread of this process
    that started it. A message of it takes this process `message_bytes` of memory while it is read, and what it prints
    `OUTPUT_LIMIT` and the buffers of a pipe.
    """

    def __init__(
        self,
        child: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        message_bytes: int,
    ) -> None:
        """Of a child that has just been started; `start` makes them."""
        self._child = child
        self._reader = reader
        self._writer = writer
        self._message_bytes = message_bytes
        self._output = bytearray()
        self._dropped = 0
        self._listening = asyncio.create_task(self._listen())
        self._ending: asyncio.Task[None] | None = None
        self._killed = False

    @classmethod
    async def start(cls, module: str, confinement: Confinement) -> Self:
        """Runs `module` with `-m`, which calls `child.enter` first, and waits until it is confined.

        Raises OperationFailed (ISOLATION_UNAVAILABLE) in strict mode where the kernel does not enforce everything,
        NotStarted for all else; the process is gone then, as it is after a cancellation.
        """
        try:
            reader, writer, child = await _spawn(module)
        except OSError as error:
            raise NotStarted(f"the system starts no process: {error.strerror or error}") from error
        process = cls(child, reader, writer, confinement.message_bytes)
        try:
            async with asyncio.timeout(START_SECONDS):
                await process._confine(confinement)
        except BaseException as error:
            await process.end(by_itself=isinstance(error, EOFError))
            match error:
                case EOFError():
                    raise NotStarted(process.how_it_ended(), process.output) from None
                case TimeoutError():
                    raise NotStarted(f"not confined within {START_SECONDS:g} s", process.output) from None
                case FrameTooLarge() | msgspec.MsgspecError():
                    raise NotStarted(f"no report of its confinement: {error}", process.output) from error
            raise
        return process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._child.returncode is not None

    @property
    def output(self) -> str:
        """The last `OUTPUT_LIMIT` bytes that it printed, without control characters, and how many came before them."""
        text = self._output.decode(errors="replace").translate(_CONTROLS)
        return f"[{self._dropped} bytes before]\n{text}" if self._dropped else text

    async def send(self, message: Any) -> None:
        """Sends a message. Raises EOFError if the process has ended."""
        await write_frame(self._writer, message)

    async def receive(self) -> bytearray:
        """The body of its next message. Raises FrameTooLarge, or EOFError if the process has ended."""
        return await read_frame(self._reader, self._message_bytes)

    async def print_stack(self) -> None:
        """Has a process that has registered STACK_SIGNAL with faulthandler print where its threads are."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(STACK_SIGNAL)
        await asyncio.sleep(_PRINT_SECONDS)

    async def end(self, *, by_itself: bool = False) -> None:
        """Kills the process and waits for its end; `by_itself`: after a moment in which it may end on its own.

        Once begun it is carried through, also if the await is cancelled.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(by_itself))
        await asyncio.shield(self._ending)

    def how_it_ended(self) -> str:
        """In words, for a process from which no message came any more."""
        status = self._child.returncode
        if self._killed or status is None:
            return "the process let go of its connection"
        if status >= 0:
            return f"the process ended with {status}"
        # Real-time signals have no names.
        return f"the process got {_SIGNALS.get(-status, f'signal {-status}')}"

    async def _confine(self, wanted: Confinement) -> None:
        await self.send(
            Start(
                os.getpid(),
                tuple(wanted.readable),
                tuple(wanted.writable),
                wanted.memory,
                wanted.seconds,
                wanted.cpu_seconds,
                wanted.file_bytes,
                wanted.message_bytes,
                wanted.trains,
            )
        )
        confined = msgspec.msgpack.decode(await read_frame(self._reader, _REPORT_LIMIT), type=Confined)
        if wanted.strict:
            require(confined.report)

    async def _end(self, by_itself: bool) -> None:
        if by_itself:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OWN_END_SECONDS):
                    await self._child.wait()
        if self._child.returncode is None:
            self._killed = True
            # Its whole session: where no filter keeps it from having children, they go too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self._writer.close()
        await self._child.wait()
        # What it printed last is still in the pipe.
        await asyncio.wait({self._listening}, timeout=1.0)
        self._listening.cancel()

    async def _listen(self) -> None:
        assert self._child.stdout is not None
        while chunk := await self._child.stdout.read(1 << 16):
            self._output += chunk
            excess = len(self._output) - OUTPUT_LIMIT
            if excess > 0:
                del self._output[:excess]
                self._dropped += excess


async def _spawn(module: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.subprocess.Process]:
    """A child that runs `module`, and this side of its socket. Raises OSError."""
    mine, theirs = socket.socketpair()
    with theirs:
        try:
            reader, writer = await asyncio.open_connection(sock=mine)
        except BaseException:
            mine.close()
            raise
        try:
            # Here and not in another thread, whose end would be the child's.
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-u",
                "-X",
                "faulthandler",
                "-m",
                module,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            writer.close()
            raise
    return reader, writer, child


def _environment() -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        "CUDA_VISIBLE_DEVICES": "-1",
        # A library that starts threads as it loads would do so in every process, and one thread computes.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }
