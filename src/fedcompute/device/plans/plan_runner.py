"""Runs a client plan on local examples: checkpoint and examples in, update out (spec/device.md 5.2)."""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedcompute.device.plans.plan_rules import validate
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2

if TYPE_CHECKING:
    from fedcompute.device.plans.prepared_plan import PreparedPlan

CHECKPOINT_BYTES_LIMIT = 1 << 30
UPDATE_BYTES_LIMIT = 1 << 30


@dataclass(frozen=True)
class PlanResult:
    """What one run made: the update checkpoint's bytes, and how many examples of how many bytes it drew."""

    update: bytes = field(repr=False)
    example_count: int
    example_bytes: int


@dataclass(frozen=True)
class _Limits:
    checkpoint_bytes: int
    update_bytes: int


class _Turn:
    """One run, from its call to its end, as those see it who may want to cancel it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._plan: PreparedPlan | None = None
        self.cancelled = False

    def begin(self, plan: "PreparedPlan") -> None:
        with self._guard:
            self.check()
            self._plan = plan

    def check(self) -> None:
        if self.cancelled:
            raise DeviceRunFailed(Reason.RUN_CANCELLED, "the run was cancelled")

    def cancel(self) -> None:
        with self._guard:
            self.cancelled = True
            plan = self._plan
        if plan is not None:
            plan.stop()

    def end(self) -> bool:
        """Whether the run was cancelled; a later cancellation no longer touches its plan."""
        with self._guard:
            self._plan = None
            return self.cancelled


class PlanRunner:
    """Runs client plans, one at a time; keeps the graphs and sessions of the last few.

    Plans with a graph load TensorFlow when the first of them is prepared; plans of example queries need none. Safe to
    share among threads and the devices of a process.
    """

    def __init__(self, *, cached_plans: int = 4, time_limit: float = 600.0) -> None:
        """`cached_plans`: plans kept ready, about 10 MB each. `time_limit`: seconds that one run may compute."""
        self._cached_plans = cached_plans
        self._time_limit = time_limit
        self._plans: OrderedDict[bytes, PreparedPlan] = OrderedDict()
        self._lock = threading.Lock()
        self._turn: _Turn | None = None
        # One worker thread is the queue of waiting runs, so they do not use up the threads of the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan-runner")

    async def train(
        self,
        plan: plan_pb2.ClientOnlyPlan,
        checkpoint: bytes,
        examples: Sequence[bytes],
        *,
        checkpoint_bytes_limit: int = CHECKPOINT_BYTES_LIMIT,
        update_bytes_limit: int = UPDATE_BYTES_LIMIT,
    ) -> PlanResult:
        """`run` for an event loop: waits for its turn without blocking the loop.

        Cancelling the await cancels this run, whether it waits or computes; the await ends when it has stopped.
        """
        turn, limits = _Turn(), _Limits(checkpoint_bytes_limit, update_bytes_limit)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._run, turn, plan, checkpoint, examples, limits)
        except asyncio.CancelledError:
            await asyncio.to_thread(turn.cancel)
            raise

    def prepare(self, plan: plan_pb2.ClientOnlyPlan) -> None:
        """Checks and translates a plan without running it, so that `run` finds it ready.

        Takes 0.1 to 0.7 s, and once the import of TensorFlow; waits for a run in progress. Raises DeviceRunFailed:
        PLAN_ARGUMENT_INVALID if the plan breaks a rule of its own, OPS_NOT_SUPPORTED naming every operation that does
        not run here, PLAN_UNSUPPORTED for a plan that is refused for another reason, PLAN_COMPUTATION_FAILED if its
        graph cannot be built.
        """
        validate(plan)
        if plan.phase.HasField("tensorflow_spec"):
            with self._lock:
                self._prepared(plan)

    def run(
        self,
        plan: plan_pb2.ClientOnlyPlan,
        checkpoint: bytes,
        examples: Sequence[bytes],
        *,
        checkpoint_bytes_limit: int = CHECKPOINT_BYTES_LIMIT,
        update_bytes_limit: int = UPDATE_BYTES_LIMIT,
    ) -> PlanResult:
        """Computes one update.

        `checkpoint`: a V1 checkpoint with the `client/...` leaves; unused by plans of example queries. `examples`:
        serialized records, in the order in which the plan sees them; they stay in memory. Raises DeviceRunFailed as
        `prepare`, before anything of the plan runs, and PLAN_COMPUTATION_FAILED if its graph fails or takes too long,
        EXAMPLES_FAILED for an example that is empty or answers no query, CHECKPOINT_TOO_LARGE, UPLOAD_TOO_LARGE,
        RUN_CANCELLED.
        """
        limits = _Limits(checkpoint_bytes_limit, update_bytes_limit)
        return self._run(_Turn(), plan, checkpoint, examples, limits)

    def cancel(self) -> None:
        """Ends the run in progress, if there is one, with RUN_CANCELLED; may be called from any thread.

        Returns when nothing computes any more: within 0.05 s, or when the one operation in hand is done. A run that
        still loads TensorFlow or translates its plan ends as soon as it has.
        """
        turn = self._turn
        if turn is not None:
            turn.cancel()

    def close(self) -> None:
        """Ends the thread and the sessions; waits for a run in progress."""
        self._thread.shutdown(cancel_futures=True)
        with self._lock:
            for prepared in self._plans.values():
                prepared.stop()
            self._plans.clear()

    def _run(
        self,
        turn: _Turn,
        plan: plan_pb2.ClientOnlyPlan,
        checkpoint: bytes,
        examples: Sequence[bytes],
        limits: _Limits,
    ) -> PlanResult:
        validate(plan)
        if len(checkpoint) > limits.checkpoint_bytes:
            detail = f"a checkpoint of {len(checkpoint)} bytes, {limits.checkpoint_bytes} are the limit"
            raise DeviceRunFailed(Reason.CHECKPOINT_TOO_LARGE, detail)
        with self._lock:
            turn.check()
            if plan.phase.HasField("example_query_spec"):
                return _answer(plan, examples, limits.update_bytes)
            empty = next((index for index, example in enumerate(examples) if not example), None)
            if empty is not None:
                raise DeviceRunFailed(Reason.EXAMPLES_FAILED, f"example {empty} of {len(examples)} has no bytes")
            self._turn = turn
            try:
                prepared = self._prepared(plan)
                turn.begin(prepared)
                update, drawn = prepared.run(
                    checkpoint, examples, time_limit=self._time_limit, update_bytes_limit=limits.update_bytes
                )
            except DeviceRunFailed:
                turn.check()
                raise
            finally:
                self._turn = None
                if turn.end():
                    # Its session is closed, or about to be.
                    self._plans.pop(_digest(plan), None)
        return PlanResult(update, len(drawn), sum(len(example) for example in drawn))

    def _prepared(self, plan: plan_pb2.ClientOnlyPlan) -> "PreparedPlan":
        from fedcompute.device.plans.prepared_plan import PreparedPlan

        digest = _digest(plan)
        if digest not in self._plans:
            self._plans[digest] = PreparedPlan(plan)
        self._plans.move_to_end(digest)
        while len(self._plans) > self._cached_plans:
            self._plans.popitem(last=False)[1].stop()
        return self._plans[digest]


def _answer(plan: plan_pb2.ClientOnlyPlan, examples: Sequence[bytes], update_bytes_limit: int) -> PlanResult:
    from fedcompute.device.plans.example_queries import answer_queries

    spec = plan.phase.example_query_spec
    update, example = answer_queries(spec, examples, update_bytes_limit=update_bytes_limit)
    return PlanResult(update, 1, len(example))


def _digest(plan: plan_pb2.ClientOnlyPlan) -> bytes:
    return hashlib.sha256(plan.SerializeToString(deterministic=True)).digest()
