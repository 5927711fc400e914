"""One run of a device, from check-in to upload (spec/device.md 0, 1.7, 6.6)."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedcompute.crypto.envelope import seal_update
from fedcompute.crypto.keys import PublicKey
from fedcompute.device.client import eligibility, protocol
from fedcompute.device.client.authorization import Authorization, Prove
from fedcompute.device.client.example_store import ExampleSource, query_examples
from fedcompute.device.client.http import Transport
from fedcompute.device.client.keys import EncryptionKeys, default_url
from fedcompute.device.client.protocol import Rejected, Result
from fedcompute.device.developer.worker import TrainingExampleInput, TrainingExampleRecord
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanResult
from fedcompute.device.state.history import Contribution, TaskHistory
from fedcompute.errors import DeviceRunFailed, FedComputeError, Reason
from fedcompute.protos import plan_pb2, task_assignments_pb2

Trainer = Callable[[plan_pb2.ClientOnlyPlan, bytes, Sequence[bytes]], Awaitable[PlanResult]]
"""Computes an update from plan, checkpoint and examples: `PlanRunner.train`."""

PHASES = ("check_in", "examples", "download", "train", "encrypt", "report", "upload")

_LOG = logging.getLogger(__name__)
_RESULTS = task_assignments_pb2.ReportResultRequest
_RESULT_OF: Mapping[Reason, Result] = {
    Reason.PLAN_ARGUMENT_INVALID: _RESULTS.FAILED_MODEL_COMPUTATION,
    Reason.PLAN_COMPUTATION_FAILED: _RESULTS.FAILED_MODEL_COMPUTATION,
    Reason.CHECKPOINT_TOO_LARGE: _RESULTS.FAILED_MODEL_COMPUTATION,
    Reason.UPLOAD_TOO_LARGE: _RESULTS.FAILED_MODEL_COMPUTATION,
    Reason.EXAMPLES_FAILED: _RESULTS.FAILED_EXAMPLE_GENERATION,
    Reason.OPS_NOT_SUPPORTED: _RESULTS.FAILED_OPS_ERROR,
}


@dataclass(frozen=True)
class DeviceSettings:
    """What a device is told. `server`: its base URL; `key_url`: the server's own key service unless given;
    `eligibility`: whether the server's policies are asked; `example_timeout`: seconds that the worker has;
    `failed_training_delay`: seconds to wait after a failed training that the server took note of.
    """

    server: str
    population: str
    owner: Owner = field(default_factory=Owner)
    client_version: str = protocol.CLIENT_VERSION
    key_url: str | None = None
    encryption: bool = True
    eligibility: bool = True
    example_timeout: float = 10.0
    failed_training_delay: float = 86_400.0
    checkpoint_bytes_limit: int = protocol.CHECKPOINT_BYTES_LIMIT


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    `phase`: where it ended, one of `PHASES`, or `done`. `reason`: code of an error or of the server's rejection,
    `not_eligible`, `busy`, or None after success. `retry_window`: seconds to wait, already drawn from the server's
    window; None leaves the wait to the scheduler. `counted`: whether the failure counts towards giving the task up.
    `seconds`: time spent in each phase that was reached. `example_count`: examples trained on. `contribution`: what
    is to be remembered of a success.
    """

    success: bool
    phase: str
    reason: str | None = None
    detail: str = ""
    retry_window: float | None = None
    counted: bool = False
    task_id: str | None = None
    iteration_id: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    example_count: int = 0
    contribution: Contribution | None = None


class _Ended(Exception):
    """A run that ends without a contribution and without an error."""

    def __init__(self, reason: str, detail: str = "", window: float | None = None, counted: bool = False) -> None:
        self.reason = reason
        self.detail = detail
        self.window = window
        self.counted = counted


class _Failed(Exception):
    """A failure with the delay that follows it."""

    def __init__(self, cause: DeviceRunFailed, window: float) -> None:
        self.cause = cause
        self.window = window


@dataclass
class _Run:
    """What is known of the run in progress."""

    on_state: Callable[[str], None]
    phase: str = PHASES[0]
    seconds: dict[str, float] = field(default_factory=dict)
    task_id: str | None = None
    iteration_id: str | None = None
    example_count: int = 0
    contribution: Contribution | None = None

    @contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        self.phase = phase
        self.on_state(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Device:
    """A device of one population: its examples, its history, its keys."""

    def __init__(
        self,
        settings: DeviceSettings,
        examples: ExampleSource,
        *,
        transport: Transport,
        train: Trainer,
        history: TaskHistory | None = None,
        keys: EncryptionKeys | None = None,
        on_state: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
        prove: Prove | None = None,
    ) -> None:
        """`on_state` is told each phase as it begins. `clock`: Unix seconds. `chance` draws retry delays.

        `prove` answers the challenges of a server that takes only devices it knows.
        """
        self._settings = settings
        self._examples = examples
        self._transport = transport
        self._train = train
        self._history = history if history is not None else TaskHistory()
        self._keys = keys
        if keys is None:
            url = settings.key_url if settings.key_url is not None else default_url(settings.server)
            self._keys = EncryptionKeys(transport, url, database=self._history.database, clock=clock)
        self._on_state = on_state if on_state is not None else lambda state: None
        self._clock = clock
        self._chance = chance if chance is not None else random.Random()
        self._authorization = None
        if prove is not None:
            self._authorization = Authorization(self._history, settings.server, settings.owner.id, prove, clock)
        self._job_id = settings.owner.job_id(settings.population)
        self._running = False

    async def run_once(self) -> RunOutcome:
        """`run`, and remembers the contribution."""
        outcome = await self.run()
        if outcome.contribution is not None:
            self._history.record(outcome.contribution)
        return outcome

    async def run(self) -> RunOutcome:
        """Takes part in one round if there is one. Every failure is an outcome; only cancellation is raised.

        What is to be remembered is in the outcome, so that it can be stored together with what follows from it.
        """
        if self._running:
            return RunOutcome(success=False, phase=PHASES[0], reason="busy", detail="another run is in progress")
        self._running = True
        run = _Run(self._on_state)
        reason, detail, window, counted = None, "", None, True
        try:
            await self._contribute(run)
        except _Ended as end:
            reason, detail, window, counted = end.reason, end.detail, end.window, end.counted
        except _Failed as failure:
            reason, detail, window = failure.cause.reason.value, failure.cause.detail, failure.window
        except FedComputeError as error:
            reason, detail = error.reason.value, error.detail
        except Exception as error:
            _LOG.exception("a run failed in phase %s", run.phase)
            reason, detail = Reason.INTERNAL.value, type(error).__name__
        finally:
            self._running = False
        return RunOutcome(
            success=reason is None,
            phase="done" if reason is None else run.phase,
            reason=reason,
            detail=detail,
            retry_window=window,
            counted=counted and reason is not None,
            task_id=run.task_id,
            iteration_id=run.iteration_id,
            seconds=run.seconds,
            example_count=run.example_count,
            contribution=run.contribution,
        )

    async def _contribute(self, run: _Run) -> None:
        assignment = await self._check_in(run)
        records = await self._eligible_records(run, assignment)
        with run.enter("download"):
            plan, checkpoint = await protocol.download(
                self._transport, assignment, self._settings.checkpoint_bytes_limit
            )
        key = await self._choose_key(run, assignment)
        if records is None:
            records = await self._query(run, assignment)
        result = await self._compute(run, assignment, plan, checkpoint, records)
        body = result.update if key is None else await self._seal(run, assignment, result.update, key)
        with run.enter("report"):
            answer = await self._report(assignment, _RESULTS.COMPLETED)
            if isinstance(answer, Rejected):
                raise self._rejection(answer)
        with run.enter("upload"):
            await protocol.upload(self._transport, answer, body)
        run.contribution = self._contribution(assignment, records[: result.example_count])

    async def _check_in(self, run: _Run) -> task_assignments_pb2.TaskAssignment:
        settings = self._settings
        with run.enter("check_in"):
            answer = await protocol.check_in(
                self._transport,
                settings.server,
                settings.population,
                owner=settings.owner,
                client_version=settings.client_version,
                authorization=self._authorization,
            )
        if isinstance(answer, Rejected):
            # A device whose proof was not taken must not ask for ever.
            raise self._rejection(answer, counted=answer.proven)
        run.task_id, run.iteration_id = answer.task_id, answer.aggregation_id
        return answer

    async def _eligible_records(
        self, run: _Run, assignment: task_assignments_pb2.TaskAssignment
    ) -> tuple[TrainingExampleRecord, ...] | None:
        if not self._settings.eligibility or not assignment.HasField("eligibility_task_info"):
            return None
        newest = self._history.newest(self._job_id, assignment.population_name, assignment.task_id)
        with run.enter("examples"):
            verdict = await eligibility.evaluate(
                assignment.eligibility_task_info, newest, lambda count: self._ask_worker(assignment, count)
            )
        if isinstance(verdict, eligibility.NotEligible):
            await self._report_failure(assignment, _RESULTS.NOT_ELIGIBLE)
            raise _Ended("not_eligible", f"policy {verdict.policy}: {verdict.why}")
        return verdict.records

    async def _query(
        self, run: _Run, assignment: task_assignments_pb2.TaskAssignment
    ) -> tuple[TrainingExampleRecord, ...]:
        with run.enter("examples"):
            try:
                return await self._ask_worker(assignment, 0)
            except FedComputeError:
                await self._report_failure(assignment, _RESULTS.FAILED_EXAMPLE_GENERATION)
                raise

    async def _ask_worker(
        self, assignment: task_assignments_pb2.TaskAssignment, min_count: int
    ) -> tuple[TrainingExampleRecord, ...]:
        collection = assignment.example_selector.collection_uri
        population, task = assignment.population_name, assignment.task_id
        request = TrainingExampleInput(
            population_name=population,
            task_name=task,
            resumption_token=self._history.resumption_token(self._job_id, population, task, collection),
            collection_name=collection or None,
        )
        return await query_examples(
            self._examples, request, min_count=min_count, timeout=self._settings.example_timeout
        )

    async def _choose_key(self, run: _Run, assignment: task_assignments_pb2.TaskAssignment) -> PublicKey | None:
        if not self._settings.encryption or self._keys is None:
            return None
        with run.enter("encrypt"):
            try:
                return await self._keys.choose()
            except DeviceRunFailed:
                await self._report_failure(assignment, _RESULTS.FAILED)
                raise

    async def _compute(
        self,
        run: _Run,
        assignment: task_assignments_pb2.TaskAssignment,
        plan: plan_pb2.ClientOnlyPlan,
        checkpoint: bytes,
        records: Sequence[TrainingExampleRecord],
    ) -> PlanResult:
        with run.enter("train"):
            try:
                result = await self._train(plan, checkpoint, [record.training_example for record in records])
            except DeviceRunFailed as error:
                known = await self._report_failure(assignment, _RESULT_OF.get(error.reason, _RESULTS.FAILED))
                learning = plan.phase.WhichOneof("spec") == "tensorflow_spec"
                if known and learning and error.reason in _RESULT_OF:
                    raise _Failed(error, self._settings.failed_training_delay) from error
                raise
            except Exception:
                await self._report_failure(assignment, _RESULTS.FAILED)
                raise
        run.example_count = result.example_count
        return result

    async def _seal(
        self, run: _Run, assignment: task_assignments_pb2.TaskAssignment, update: bytes, key: PublicKey
    ) -> bytes:
        with run.enter("encrypt"):
            try:
                return await asyncio.to_thread(seal_update, update, key)
            except FedComputeError:
                await self._report_failure(assignment, _RESULTS.FAILED)
                raise

    async def _report_failure(self, assignment: task_assignments_pb2.TaskAssignment, result: Result) -> bool:
        """Whether the server took note; a failure that cannot be reported changes nothing else."""
        try:
            await self._report(assignment, result)
        except DeviceRunFailed as error:
            _LOG.info("failure report: %s", error.detail)
            return False
        return True

    async def _report(
        self, assignment: task_assignments_pb2.TaskAssignment, result: Result
    ) -> task_assignments_pb2.UploadInstruction | Rejected:
        server = self._settings.server
        return await protocol.report(self._transport, server, assignment, result, authorization=self._authorization)

    def _rejection(self, answer: Rejected, *, counted: bool = False) -> _Ended:
        window = answer.window.draw(self._chance) if answer.window is not None else None
        return _Ended(answer.reason, "the server has no use for this device now", window, counted)

    def _contribution(
        self, assignment: task_assignments_pb2.TaskAssignment, used: Sequence[TrainingExampleRecord]
    ) -> Contribution:
        return Contribution(
            job_id=self._job_id,
            population=assignment.population_name,
            task_id=assignment.task_id,
            round=eligibility.round_index(assignment.eligibility_task_info),
            time=self._clock(),
            collection_uri=assignment.example_selector.collection_uri,
            resumption_token=used[-1].resumption_token if used else None,
        )
