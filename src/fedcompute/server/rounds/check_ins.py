"""Check-ins that wait together: one transaction for all that came while the last one ran (spec/server.md 2.1)."""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from starlette.requests import Request

from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.protos.task_assignments_pb2 import CreateTaskAssignmentResponse, TaskAssignment
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.assign import assignment_of_round, declined, name_session, separations
from fedcompute.storage.check_ins import Assigned, CheckIn, Declined, assign_all, standing_answers
from fedcompute.storage.keys import IterationKey

_LOG = logging.getLogger(__name__)
_MOST = 500  # in one transaction
# A transaction costs as much as a dozen check-ins: where several come at once, the next ones are worth waiting for.
_GATHER_S = 0.005
# Who has less time than this would take the others' with it.
_LEAST_S = 1.0
_PREPARED = 256

Decision = Assigned | Declined | Exception


@dataclass(frozen=True, eq=False)
class _Waiting:
    check_in: CheckIn
    deadline: float  # monotonic
    answer: asyncio.Future[CreateTaskAssignmentResponse]


class CheckIns:
    """Answers the check-ins of one server, each as if it had come alone.

    For one event loop. A transaction at a time runs in a thread of its own; whoever comes meanwhile shares the next.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="check-ins")
        self._waiting: deque[_Waiting] = deque()
        self._work: asyncio.Task[None] | None = None
        # Of the thread only:
        self._roomy: set[str] = set()  # populations whose last check-in got a place
        self._prepared: dict[IterationKey, tuple[int, TaskAssignment]] = {}  # and the second that it was made in

    async def answer(self, check_in: CheckIn, seconds: float) -> CreateTaskAssignmentResponse:
        """An assignment, or the reason and the window to come back in.

        Raises OperationFailed, also (SERVER_BUSY) if it took longer than `seconds`; no place is taken then.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(check_in, time.monotonic() + seconds, loop.create_future())
        self._waiting.append(one)
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._answer_all(), name="check-ins")
        try:
            async with asyncio.timeout(seconds):
                return await one.answer
        except TimeoutError:
            raise _busy() from None

    def close(self) -> None:
        """Waits for the transaction under way, if any."""
        self._thread.shutdown()

    async def _answer_all(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := list(self._next_batch()):
            deadline = min(one.deadline for one in batch)
            questions = [one.check_in for one in batch]
            answers: Sequence[CreateTaskAssignmentResponse | Exception]
            try:
                answers = await loop.run_in_executor(self._thread, self._answer_together, questions, deadline)
            except Exception as error:
                answers = [error] * len(batch)
            for one, answer in zip(batch, answers, strict=True):
                if one.answer.done():
                    continue
                if isinstance(answer, Exception):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)
            if len(batch) > 1:
                await asyncio.sleep(_GATHER_S)

    def _next_batch(self) -> Iterator[_Waiting]:
        taken = 0
        while self._waiting and taken < _MOST:
            one = self._waiting.popleft()
            if one.answer.done():
                continue
            if one.deadline - time.monotonic() < _LEAST_S:
                one.answer.set_exception(_busy())
                continue
            taken += 1
            yield one

    def _answer_together(
        self, check_ins: Sequence[CheckIn], deadline: float
    ) -> list[CreateTaskAssignmentResponse | Exception]:
        return [self._message(decision) for decision in self._decide(self._separated(check_ins), deadline)]

    def _decide(self, check_ins: Sequence[CheckIn], deadline: float) -> Sequence[Decision]:
        try:
            return self._decide_together(check_ins, deadline)
        except FedComputeError as error:
            return [error] * len(check_ins)
        except Exception as error:
            if len(check_ins) == 1:
                return [error]
            # One of them is more than the database takes; the others need not share that.
            _LOG.warning("%d check-ins failed together: %s", len(check_ins), type(error).__name__)
            return [self._decide([one], deadline)[0] for one in check_ins]

    def _decide_together(self, check_ins: Sequence[CheckIn], deadline: float) -> list[Decision]:
        database = self._context.database
        decisions: list[Decision | None] = [None] * len(check_ins)
        if not self._roomy.issuperset(one.population for one in check_ins):
            # Who finds nothing to take has no need of the write lock. What was freed before this moment is seen.
            with database.read() as tx:
                decisions = [*standing_answers(tx, check_ins, now())]
        left = [index for index, decision in enumerate(decisions) if decision is None]
        populations = sorted({check_ins[index].population for index in left})
        for group in [populations] if database.takes_turns else [[one] for one in populations]:
            members = [index for index in left if check_ins[index].population in group]
            if not members:
                continue
            with database.write(max(0.0, deadline - time.monotonic())) as tx:
                made = assign_all(tx, [check_ins[index] for index in members], now(), choose=secrets.randbelow)
            for index, decision in zip(members, made, strict=True):
                decisions[index] = decision
        self._note_room(check_ins, decisions)
        return [one if one is not None else _busy() for one in decisions]

    def _note_room(self, check_ins: Sequence[CheckIn], decisions: Sequence[Decision | None]) -> None:
        """Remembers where to try writing first: a guess that costs a transaction if it is wrong, and no answer."""
        for one, decision in zip(check_ins, decisions, strict=True):
            if isinstance(decision, Assigned):
                self._roomy.add(one.population)
            else:
                self._roomy.discard(one.population)

    def _separated(self, check_ins: Sequence[CheckIn]) -> Sequence[CheckIn]:
        """The check-ins, with the separations of their population's tasks where somebody is known by name."""
        populations = {one.population for one in check_ins if one.participant is not None}
        if not populations:
            return check_ins
        found = {population: separations(self._context, population) for population in populations}
        return [
            one if one.participant is None else replace(one, separations=found[one.population]) for one in check_ins
        ]

    def _message(self, decision: Decision) -> CreateTaskAssignmentResponse | Exception:
        try:
            match decision:
                case Assigned():
                    return CreateTaskAssignmentResponse(task_assignment=self._assignment(decision))
                case Declined(kind):
                    return CreateTaskAssignmentResponse(rejection_info=declined(self._context.settings, kind))
        except Exception as error:
            return error
        return decision

    def _assignment(self, assigned: Assigned) -> TaskAssignment:
        """The round's assignment, made once a second because its URLs expire, with the session's name in it."""
        key, second = assigned.iteration.key, int(time.time())
        made, prepared = self._prepared.get(key, (0, None))
        if prepared is None or made != second:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            prepared = assignment_of_round(self._context, assigned.iteration, assigned.task)
            self._prepared[key] = second, prepared
        return name_session(prepared, assigned.assignment.key.session_id)


def check_ins_of(request: Request) -> CheckIns:
    """The check-ins of the server that a request has reached."""
    found = request.app.state.check_ins
    assert isinstance(found, CheckIns)
    return found


def _busy() -> OperationFailed:
    return OperationFailed(Reason.SERVER_BUSY, "the database was busy for longer than a check-in may take")
