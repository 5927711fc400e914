"""Acts: changes that operators make, written to the audit log together with what they change."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import HTTPConnection

from fedcompute.server.context import context_of, now
from fedcompute.server.security.operators import Caller
from fedcompute.storage.audit import ANONYMOUS, NO_ROLE, Act, record
from fedcompute.storage.database import Transaction


@contextmanager
def audited(request: HTTPConnection) -> Iterator[Transaction]:
    """A write transaction that ends with the request's row in the audit log: both are there, or neither is.

    A request that raises inside is recorded by the guard, after its answer is known.
    """
    with context_of(request).database.write() as tx:
        yield tx
        record(tx, act_of(request, request.state.success), now())
    request.state.recorded = True


def name_subject(request: HTTPConnection, subject: str) -> None:
    """Says what the request's act is done to, where its path does not say it all."""
    request.state.subject = subject


def caller_of(request: HTTPConnection) -> Caller:
    """Who makes the request; the guard has seen to it."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def act_of(request: HTTPConnection, status: int) -> Act:
    """The request as the audit log tells it; who was refused before a name was known is `anonymous`."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return Act(
        actor=ANONYMOUS if caller is None else caller.actor,
        role=NO_ROLE if caller is None else caller.role.value,
        action=request.state.action,
        subject=getattr(request.state, "subject", request.state.default_subject),
        status=status,
        request_id=request.state.request_id,
    )
