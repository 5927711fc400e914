"""Spans on their way to a collector: OpenTelemetry's SDK, loaded only where `tracing_url` is set.

What the environment says by the names of OpenTelemetry's specification holds here too: OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and the like.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedcompute import __version__, tracing
from fedcompute.errors import OperationFailed, Reason

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_LOG = logging.getLogger(__name__)
_SIGNAL = "/v1/traces"
# They log URLs, which may hold a token, and the same failure over and over.
_TALKATIVE = ("opentelemetry.exporter", "urllib3", "requests")
SERVER = "fedcompute-server"
TASK_BUILDER = "fedcompute-task-builder"
TASK_BUILDER_CLIENT = "fedcompute-task-builder-client"
TRACING_VARIABLE = "FEDCOMPUTE_TRACING_URL"
FLUSH_S = 3.0


def start_tracing(url: str | None, service: str) -> Callable[[float], None]:
    """Traces this process into the OTLP/HTTP collector at `url`, None: not at all; returns what ends it.

    `url` without a path means its `/v1/traces`. `service` is the name of the process in traces, unless the environment
    gives it one. What is returned takes the seconds that sending the last spans may take; spans that are not sent by
    then are lost. Spans wait in a bounded queue and are sent by a thread of their own, so a collector that is slow or
    away costs spans and nothing else; it is logged once.

    Raises OperationFailed(SETTINGS_INVALID) for a URL that is none, for variables of OpenTelemetry that mean nothing
    and where the extra `tracing` is not installed.
    """
    if url is None:
        return lambda _seconds: None
    endpoint = _endpoint(url)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        detail = "tracing_url is set, and OpenTelemetry's SDK is not installed"
        raise OperationFailed(Reason.SETTINGS_INVALID, detail, remedy="pip install 'fedcompute[tracing]'") from error
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    try:
        exporter = OTLPSpanExporter(endpoint)
        # At the end of the process nothing may wait for a collector that is away.
        provider = TracerProvider(resource=resource, id_generator=_ids(), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(_reporting(exporter)))
    except (ValueError, TypeError) as error:
        detail = f"tracing cannot start: {type(error).__name__}"
        remedy = "check the variables OTEL_*; see docs/tracing.md"
        raise OperationFailed(Reason.SETTINGS_INVALID, detail, remedy=remedy) from None
    tracer = provider.get_tracer("fedcompute", __version__)
    tracing.install(tracer)

    def stop(seconds: float) -> None:
        if tracing.installed() is tracer:
            tracing.install(None)
        ending = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(seconds)
        if ending.is_alive():
            # Cuts off its pauses between attempts.
            exporter.shutdown()  # type: ignore[no-untyped-call]

    return stop


@contextlib.contextmanager
def traced(url: str | None, service: str) -> Iterator[None]:
    """Traces the block; see `start_tracing`."""
    stop = start_tracing(url, service)
    try:
        yield
    finally:
        stop(FLUSH_S)


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        # Without the URL, which may hold a token.
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            "setting tracing_url: needs http:// or https:// and a host",
            remedy="write it as http://localhost:4318",
        )
    return url if parts.path.strip("/") else parts._replace(path=_SIGNAL).geturl()


def _ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Random ids, but for roots that `tracing.chosen_ids` names."""

        def generate_trace_id(self) -> int:
            chosen = tracing.chosen_ids.get()
            return super().generate_trace_id() if chosen is None else chosen[0]

        def generate_span_id(self) -> int:
            chosen = tracing.chosen_ids.get()
            return super().generate_span_id() if chosen is None else chosen[1]

    return Ids()


def _reporting(exporter: "SpanExporter") -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Reporting(SpanExporter):
        """Says once when spans begin to be lost, and once when they no longer are."""

        def __init__(self) -> None:
            self._failing = False

        def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
            try:
                result = exporter.export(spans)
                cause = "it refuses them or does not answer"
            except Exception as error:
                # Whatever a transport raises must not end the thread that sends.
                result, cause = SpanExportResult.FAILURE, type(error).__name__
            failing = result is not SpanExportResult.SUCCESS
            if failing and not self._failing:
                _LOG.warning(
                    "spans do not reach the collector and are lost: %s; check tracing_url and its token", cause
                )
            elif self._failing and not failing:
                _LOG.warning("spans reach the collector again")
            self._failing = failing
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Reporting()
