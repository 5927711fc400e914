"""What is traced of builds and rounds: spans by OpenTelemetry's API, and nothing at all until `install` is called.

A job in another process keeps its spans as data (`keep`), and whoever gave it the job sends them (`tell`): no worker,
which may hold a hostile model or upload, knows of a collector.
"""

import contextlib
import hmac
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedcompute.errors import FedComputeError

if TYPE_CHECKING:
    # Its context looks through every installed package, which whoever traces nothing need not wait for.
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

Value = str | bool | int | float
Attributes = Mapping[str, Value]

_PREFIX = "fedcompute."
_AMBIENT = "fedcompute-attributes"

_tracer: "Tracer | None" = None
_kept: "ContextVar[list[Finished] | None]" = ContextVar("kept_spans", default=None)
chosen_ids: ContextVar[tuple[int, int] | None] = ContextVar("chosen_ids", default=None)
"""Trace id and span id of the next root span; whoever makes the tracer that is installed lets it ask here."""


@dataclass(frozen=True)
class Finished:
    """A span that is over, as data. Times: nanoseconds since 1970. `error`: a reason's code or an exception's name."""

    name: str
    started: int
    ended: int
    attributes: Attributes
    error: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where in a trace a job was asked for, as data that another process can hold."""

    headers: Mapping[str, str]
    attributes: Attributes


@dataclass(frozen=True)
class Told:
    """What a job in another process gave, with its spans."""

    result: Any
    origin: Origin
    spans: tuple[Finished, ...]


def install(tracer: "Tracer | None") -> None:
    """Gives this process its tracer; None turns tracing off."""
    global _tracer
    _tracer = tracer


def installed() -> "Tracer | None":
    """The tracer of this process, if it has one."""
    return _tracer


@contextlib.contextmanager
def span(
    name: str, attributes: Attributes | None = None, *, parent: "Context | None" = None, serves: bool = False
) -> Iterator[dict[str, Value]]:
    """A span around the block, below `parent` or else below the span that is open here.

    Yields its attributes, which the block may add to; names get the prefix `fedcompute.`, and one named `error` marks
    the span as failed. A typed error that leaves the block does so with its reason, any other with its name; details
    and tracebacks stay out of traces. `serves`: whether it answers a request from elsewhere.
    """
    found = dict(attributes or {})
    kept = _kept.get()
    if _tracer is None and kept is None:
        yield found
        return
    error: str | None = None
    started = time.time_ns()
    with _opened(name, parent, started, serves=serves) if kept is None else contextlib.nullcontext() as one:
        try:
            yield found
        except BaseException as raised:
            error = error_name(raised)
            raise
        finally:
            ended = time.time_ns()
            marked = found.pop("error", None)
            error = error or (None if marked is None else str(marked))
            if one is not None:
                _finish(one, found, error, ended)
            elif kept is not None:
                kept.append(Finished(name, started, ended, found, error))


def record(one: Finished, parent: "Context | None" = None, *, serves: bool = False) -> None:
    """Sends a span that is over, below `parent` or else below the span that is open here."""
    tracer = _tracer
    if tracer is not None:
        _finish(_start(tracer, one.name, parent, one.started, serves=serves), one.attributes, one.error, one.ended)


def error_name(error: BaseException) -> str:
    """How traces name an error: the code of its reason, or else its class."""
    return error.reason.value if isinstance(error, FedComputeError) else type(error).__name__


def derived_ids(seed: bytes, name: str) -> tuple[int, int]:
    """Trace id and root span id for a name; everyone who knows the seed finds the same.

    Formal guarantees: the ids are parts of HMAC-SHA-256 under `seed`; who sees them learns nothing about a secret seed,
    and sampling by trace id treats them like random ones.
    """
    digest = hmac.digest(seed, f"fedcompute trace 1 {name}".encode(), "sha256")
    return int.from_bytes(digest[:16]), int.from_bytes(digest[16:24])


def below(ids: tuple[int, int], name: str, attributes: Attributes) -> "Context | None":
    """The place below a root span `name` with chosen ids, which is sent elsewhere or later; None while tracing is off.

    Spans there are sampled as the root will be, and carry `attributes` too.
    """
    tracer = _tracer
    if tracer is None:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context, set_value

    # Never ended, and so never sent: it only tells how the sampler decides.
    root = _root(tracer, ids, name, None)
    return set_value(_AMBIENT, dict(attributes), trace.set_span_in_context(root, Context()))


def record_root(ids: tuple[int, int], one: Finished) -> None:
    """Sends a root span with chosen ids."""
    tracer = _tracer
    if tracer is not None:
        _finish(_root(tracer, ids, one.name, one.started), one.attributes, one.error, one.ended)


@contextlib.contextmanager
def within(place: "Context | None") -> Iterator[None]:
    """Makes `place` the one below which spans of the block go; None changes nothing."""
    if place is None:
        yield
        return
    from opentelemetry.context import attach, detach

    token = attach(place)
    try:
        yield
    finally:
        detach(token)


def headers() -> dict[str, str]:
    """W3C trace context headers of the span that is open here, for a request; none while tracing is off."""
    if _tracer is None:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return found


def received(found: Mapping[str, str]) -> "Context | None":
    """The place that a request's W3C trace context headers name; None while tracing is off."""
    if _tracer is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(dict(found), Context())


def origin() -> Origin | None:
    """The place of the span that is open here, for a job in another process; None while tracing is off."""
    if _tracer is None:
        return None
    return Origin(headers(), _ambient(None))


@contextlib.contextmanager
def keep() -> Iterator[list[Finished]]:
    """Keeps the spans of the block as data instead of sending them, in the order in which they end."""
    spans: list[Finished] = []
    token = _kept.set(spans)
    try:
        yield spans
    finally:
        _kept.reset(token)


def tell(spans: Iterable[Finished], place: Origin | None = None) -> None:
    """Sends spans that another process kept, below the `place` at which it was given its job, or the one here."""
    if _tracer is None:
        return
    parent = None
    if place is not None:
        from opentelemetry.context import set_value

        parent = set_value(_AMBIENT, dict(place.attributes), received(place.headers))
    for one in spans:
        record(one, parent)


def _start(tracer: "Tracer", name: str, parent: "Context | None", started: int, *, serves: bool) -> "Span":
    from opentelemetry.trace import SpanKind

    kind = SpanKind.SERVER if serves else SpanKind.INTERNAL
    one = tracer.start_span(name, parent, kind, start_time=started)
    one.set_attributes(_named(_ambient(parent)))
    return one


@contextlib.contextmanager
def _opened(name: str, parent: "Context | None", started: int, *, serves: bool) -> Iterator["Span | None"]:
    tracer = _tracer
    if tracer is None:
        yield None
        return
    from opentelemetry import trace

    one = _start(tracer, name, parent, started, serves=serves)
    with within(trace.set_span_in_context(one, parent)):
        yield one


def _root(tracer: "Tracer", ids: tuple[int, int], name: str, started: int | None) -> "Span":
    from opentelemetry.context import Context

    token = chosen_ids.set(ids)
    try:
        return tracer.start_span(name, Context(), start_time=started)
    finally:
        chosen_ids.reset(token)


def _finish(one: "Span", attributes: Attributes, error: str | None, ended: int) -> None:
    from opentelemetry.trace import Status, StatusCode

    one.set_attributes(_named(attributes))
    if error is not None:
        one.set_attribute("error.type", error)
        one.set_status(Status(StatusCode.ERROR, error))
    one.end(ended)


def _ambient(place: "Context | None") -> Attributes:
    from opentelemetry.context import get_value

    found = get_value(_AMBIENT, place)
    return found if isinstance(found, dict) else {}


def _named(attributes: Attributes) -> dict[str, Value]:
    return {f"{_PREFIX}{name}": value for name, value in attributes.items()}
