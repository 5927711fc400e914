"""Spans on their way to a collector: where, under which names, which of them, and what of them stays at home."""

import logging
import socket
import subprocess
import sys
import time

import pytest

from fedcompute import tracing
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.monitoring.tracing import start_tracing
from fedcompute.tracing import Finished, Origin

SEED = b"seed"


@pytest.fixture
def trace():
    """`trace(url)` traces this process until the end of the test, or until what it returns is called."""
    stops = []

    def start(url, service="service"):
        stops.append(start_tracing(url, service))
        return lambda: stops.pop()(5)

    yield start
    while stops:
        stops.pop()(5)


def test_a_span_carries_its_reason_and_neither_detail_nor_traceback(collector, trace):
    stop = trace(collector.url)
    with pytest.raises(ArtifactInvalid), tracing.span("step", {"bytes": 3}):
        raise ArtifactInvalid(Reason.PLAN_MALFORMED, "what only the log may hold")
    with pytest.raises(ValueError, match="nobody"), tracing.span("other"):
        raise ValueError("nobody foresaw that")
    stop()
    first, second = collector.spans()
    assert first.facts == {"bytes": 3, "error.type": "plan_malformed"}
    assert (first.status.code, first.status.message) == (2, "plan_malformed")
    assert second.facts == {"error.type": "ValueError"}
    sent = b"".join(collector.bodies)
    assert b"only the log" not in sent
    assert b"foresaw" not in sent
    assert b"Traceback" not in sent


def test_spans_inside_spans_are_their_children_and_attributes_of_a_place_are_theirs_too(collector, trace):
    stop = trace(collector.url)
    ids = tracing.derived_ids(SEED, "digits/1/1")
    with (
        tracing.within(tracing.below(ids, "round", {"population": "digits"})),
        tracing.span("outer") as outer,
        tracing.span("inner"),
    ):
        outer["late"] = True
    tracing.record_root(ids, Finished("round", 1_000, 2_000, {"status": "completed"}))
    stop()
    [root], [outer], [inner] = (collector.named(name) for name in ("round", "outer", "inner"))
    assert (root.parent, outer.parent, inner.parent) == (b"", root.id, outer.id)
    assert {root.trace, outer.trace, inner.trace} == {ids[0].to_bytes(16)}
    assert outer.facts == {"population": "digits", "late": True}
    assert inner.facts == {"population": "digits"}
    assert (root.began, root.ended) == (1_000, 2_000)


def test_spans_that_another_process_kept_hang_where_it_was_given_its_job(collector, trace):
    stop = trace(collector.url)
    with tracing.span("asks"):
        place = tracing.origin()
    with tracing.keep() as spans, tracing.span("works", {"uploads": 2}):
        pass
    assert isinstance(place, Origin)
    assert [one.name for one in spans] == ["works"]
    tracing.tell(spans, place)
    stop()
    [asks], [works] = collector.named("asks"), collector.named("works")
    assert (works.parent, works.trace, works.began) == (asks.id, asks.trace, spans[0].started)


def test_a_request_carries_its_place_to_the_next_service(collector, trace):
    stop = trace(collector.url)
    with tracing.span("client"):
        headers = tracing.headers()
    with tracing.span("server", parent=tracing.received(headers), serves=True):
        pass
    stop()
    [client], [server] = collector.named("client"), collector.named("server")
    assert (server.parent, server.trace) == (client.id, client.trace)


@pytest.mark.parametrize(("ratio", "least", "most"), [("0.0", 0, 0), ("0.5", 10, 50), ("1.0", 60, 60)])
def test_sampling_keeps_whole_rounds(collector, trace, monkeypatch, ratio, least, most):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    stop = trace(collector.url)
    for number in range(60):
        ids = tracing.derived_ids(SEED, str(number))
        with tracing.span("update", parent=tracing.below(ids, "round", {})):
            pass
        tracing.record_root(ids, Finished("round", 1, 2, {}))
    stop()
    rounds = {one.trace for one in collector.named("round")}
    assert least <= len(rounds) <= most
    assert rounds == {one.trace for one in collector.named("update")}


def test_the_variables_of_opentelemetry_are_obeyed(collector, trace, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    stop = trace(collector.url, "fedcompute-server")
    with tracing.span("one"):
        pass
    stop()
    assert {one.service for one in collector.spans()} == {"mine"}
    assert collector.headers[0]["authorization"] == "Bearer abc"


@pytest.mark.parametrize(("given", "path"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/otlp?key=1", "/otlp?key=1")])
def test_a_url_without_a_path_means_the_usual_one(collector, trace, given, path):
    stop = trace(collector.url + given)
    with tracing.span("one"):
        pass
    stop()
    assert collector.paths == [path]


@pytest.mark.parametrize("url", ["collector:4318", "grpc://collector", "https:///v1", "http://host:port"])
def test_a_url_that_is_none_is_refused_without_being_shown(url):
    with pytest.raises(OperationFailed, match="tracing_url") as refused:
        start_tracing(url, "service")
    assert refused.value.reason is Reason.SETTINGS_INVALID
    assert url not in str(refused.value)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(OperationFailed) as refused:
        start_tracing("http://localhost:4318", "service")
    assert refused.value.remedy == "pip install 'fedcompute[tracing]'"
    assert tracing.installed() is None


def test_a_collector_that_never_answers_does_not_keep_a_process_from_ending(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        stop = start_tracing(f"http://127.0.0.1:{silent.getsockname()[1]}", "service")
        began = time.monotonic()
        for _ in range(5_000):
            with tracing.span("one"):
                pass
        assert time.monotonic() - began < 5
        began = time.monotonic()
        stop(0.2)
        assert time.monotonic() - began < 1.5


def test_spans_that_are_lost_are_logged_once_and_so_is_the_end_of_it(collector, trace, caplog):
    trace(f"{collector.url}/v1/traces?token=hidden")
    caplog.set_level(logging.DEBUG)
    collector.status = 401
    for number in (1, 2):
        with tracing.span("one"):
            pass
        _until(lambda number=number: len(collector.paths) == number)
    collector.status = 200
    with tracing.span("two"):
        pass
    collector.wait("two")
    _until(lambda: "again" in caplog.text)
    assert [one.split(":")[0] for one in caplog.messages] == [
        "spans do not reach the collector and are lost",
        "spans reach the collector again",
    ]
    assert "hidden" not in caplog.text


def test_a_process_that_traces_nothing_loads_nothing_of_opentelemetry():
    script = (
        "import sys; from fedcompute import tracing\n"
        "with tracing.span('one'): tracing.origin(), tracing.headers(), tracing.received({})\n"
        "print(*[name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def _until(question, seconds=10):
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.01)
