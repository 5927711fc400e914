"""Training in a process of its own, which sees the plan, the checkpoint and the examples, and nothing else
(spec/device.md 5.5).
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedcompute.device.isolation.frames import UNDECODABLE, FrameTooLarge
from fedcompute.device.isolation.messages import Train, Trained, TrainingFailed
from fedcompute.device.isolation.process import Confinement, IsolatedProcess, NotStarted
from fedcompute.device.isolation.scratch import remove_folder
from fedcompute.device.plans.plan_runner import UPDATE_BYTES_LIMIT, PlanResult
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2

# A process is replaced after so many computations, which bounds its processor time and what it can leave behind.
_COMPUTATIONS = 8
_PROCESSORS = 4
# The process itself ends a computation that is late and says why; it is killed if it has not done so by then, which
# leaves time to load TensorFlow and to translate the plan.
_GRACE_SECONDS = 20.0
_MESSAGE_OVERHEAD = 1 << 16
_DETAIL_CHARACTERS = 2000
_FROM_TRAINER = msgspec.msgpack.Decoder(Trained | TrainingFailed)
# What `PlanRunner.run` raises; a process that says otherwise is not believed.
_REASONS = (
    Reason.PLAN_ARGUMENT_INVALID,
    Reason.PLAN_UNSUPPORTED,
    Reason.PLAN_COMPUTATION_FAILED,
    Reason.OPS_NOT_SUPPORTED,
    Reason.EXAMPLES_FAILED,
    Reason.CHECKPOINT_TOO_LARGE,
    Reason.UPLOAD_TOO_LARGE,
)


@dataclass
class _Kept:
    """A process, its folder, whose it is, and how many computations it has made."""

    process: IsolatedProcess
    folder: Path
    owner: str
    computations: int = 0


class IsolatedTrainer:
    """Computes updates, one at a time, in a confined process that is kept a while for the same owner's next one.

    Formal guarantees: a process computes for one owner only. It reaches its own scratch folder, Python's files, and
    this side's socket; no network, no other process. Cancelling `train` kills it. What it answers is bounded and
    checked for its form; the update itself is whatever the plan made of the examples.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        memory: int = 4 << 30,
        time_limit: float = 600.0,
        linger: float = 60.0,
        strict: bool = True,
    ) -> None:
        """`scratch`: an existing folder for the folders of processes. `memory`: bytes a process may have for itself.
        `time_limit`: seconds of one computation. `linger`: seconds for which an idle process is kept.
        """
        self._scratch = scratch
        self._memory = memory
        self._time_limit = time_limit
        self._linger = linger
        self._strict = strict
        self._lock = asyncio.Lock()
        self._kept: _Kept | None = None
        self._lingering: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id of the process that computes or is kept, None without one."""
        return None if self._kept is None else self._kept.process.pid

    async def train(
        self, owner: str, plan: plan_pb2.ClientOnlyPlan, checkpoint: bytes, examples: Sequence[bytes]
    ) -> PlanResult:
        """Computes one update for `owner`, as `PlanRunner.run`.

        Raises DeviceRunFailed as that does, and TRAINING_ABORTED if the process does not start, dies, is late, lacks
        memory or breaks a rule, or if the trainer is closed; OperationFailed (ISOLATION_UNAVAILABLE) where strict
        isolation cannot be had.
        """
        async with self._lock:
            if self._lingering is not None:
                self._lingering.cancel()
            kept = await self._process_for(owner)
            patience = self._time_limit + _GRACE_SECONDS
            try:
                async with asyncio.timeout(patience):
                    await kept.process.send(Train(plan.SerializeToString(), checkpoint, list(examples)))
                    message = _FROM_TRAINER.decode(await kept.process.receive())
                    result = _result(message, examples)
            except DeviceRunFailed as error:
                if error.reason is Reason.TRAINING_ABORTED:
                    await self._end()
                else:
                    self._keep(kept)
                raise
            except BaseException as error:
                await self._end(by_itself=isinstance(error, EOFError))
                match error:
                    case EOFError():
                        raise _aborted(f"no update; {kept.process.how_it_ended()}") from None
                    case TimeoutError():
                        raise _aborted(f"no update within {patience:g} s") from None
                    case FrameTooLarge():
                        raise _aborted(f"an answer that breaks a rule: {error}") from None
                    case _ if isinstance(error, (*UNDECODABLE, ValueError)):
                        raise _aborted(f"an answer that breaks a rule ({type(error).__name__})") from None
                raise
            self._keep(kept)
        return result

    async def close(self) -> None:
        """Ends the process, whatever it does, and removes its folder; a training in progress ends with it."""
        self._closed = True
        if self._lingering is not None:
            self._lingering.cancel()
        await self._end()
        # A training that is about to start its process sees that it is too late.
        async with self._lock:
            await self._end()

    async def _process_for(self, owner: str) -> _Kept:
        """The kept process if it may be used again, else a new one."""
        kept = self._kept
        if kept is not None and (kept.owner != owner or kept.computations >= _COMPUTATIONS or kept.process.has_ended):
            await self._end()
            kept = None
        if kept is None:
            kept = self._kept = await self._start(owner)
        if self._closed:
            await self._end()
            raise _aborted("the trainer is closed")
        return kept

    async def _start(self, owner: str) -> _Kept:
        try:
            folder = Path(tempfile.mkdtemp(prefix="training-", dir=self._scratch))
        except OSError as error:
            raise _aborted(f"no folder for the training process: {error.strerror}") from error
        confinement = Confinement(
            writable=(str(folder),),
            memory=self._memory,
            seconds=self._time_limit,
            cpu_seconds=int((self._time_limit + _GRACE_SECONDS) * _COMPUTATIONS * _PROCESSORS),
            file_bytes=UPDATE_BYTES_LIMIT,
            message_bytes=UPDATE_BYTES_LIMIT + _MESSAGE_OVERHEAD,
            trains=True,
            strict=self._strict,
        )
        try:
            process = await IsolatedProcess.start("fedcompute.device.isolation.trainer_main", confinement)
        except BaseException as error:
            _remove(folder)
            if isinstance(error, NotStarted):
                raise _aborted(f"no training process: {error}") from error
            raise
        return _Kept(process, folder, owner)

    def _keep(self, kept: _Kept) -> None:
        kept.computations += 1
        self._lingering = asyncio.create_task(self._end_later())

    async def _end_later(self) -> None:
        await asyncio.sleep(self._linger)
        async with self._lock:
            await self._end()

    async def _end(self, *, by_itself: bool = False) -> None:
        """Ends the process and removes its folder; once begun it is carried through, also if the await is cancelled."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._ending = asyncio.create_task(_dispose(kept, by_itself))
        if self._ending is not None:
            await asyncio.shield(self._ending)


async def _dispose(kept: _Kept, by_itself: bool) -> None:
    await kept.process.end(by_itself=by_itself)
    await asyncio.to_thread(_remove, kept.folder)


def _remove(folder: Path) -> None:
    # What cannot be removed now goes when the device starts again.
    with contextlib.suppress(OSError):
        remove_folder(folder)


def _result(message: Trained | TrainingFailed, examples: Sequence[bytes]) -> PlanResult:
    if isinstance(message, TrainingFailed):
        reason = next((one for one in _REASONS if one.value == message.reason), Reason.TRAINING_ABORTED)
        raise DeviceRunFailed(reason, _words(message.detail), remedy=_words(message.remedy))
    if not 0 <= message.example_count <= len(examples) or not 0 <= message.example_bytes <= sum(map(len, examples)):
        raise ValueError(f"{message.example_count} of {len(examples)} examples")
    return PlanResult(message.update, message.example_count, message.example_bytes)


def _words(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text[:_DETAIL_CHARACTERS])


def _aborted(detail: str) -> DeviceRunFailed:
    return DeviceRunFailed(Reason.TRAINING_ABORTED, detail)
