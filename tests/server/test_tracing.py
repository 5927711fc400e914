"""The trace of a round, as a collector gets it from a real server with real worker processes."""

import logging
import os
import socket
import time

import numpy as np
import pytest

from fedcompute import tracing
from fedcompute.protos import task_assignments_pb2

SERVER, INTERNAL = 2, 1
DELTAS = (np.ones((3, 2), np.float32), np.ones(2, np.float32))
PHASES = ["collecting", "aggregating", "applying"]


@pytest.fixture
def process(hand_made):
    return hand_made.process_of()


@pytest.fixture
def leaves(hand_made, process):
    return hand_made.update_of(process, DELTAS)


def test_a_round_is_one_trace_from_check_in_to_release(run_server, collector, process, leaves):
    server = run_server(tracing_url=f"{collector.url}/v1/traces?token=hidden")
    api = server.api
    task_id = api.open_task("digits", process, goal=2, room=3)
    assignments = [api.assignment("digits") for _ in range(3)]
    bodies = [b"nonsense", api.seal(leaves), api.seal(leaves)]
    instructions = [api.upload_instruction(one) for one in assignments]
    for instruction, body in zip(instructions, bodies, strict=True):
        assert api.upload(instruction, body).status_code == 200
    api.wait_for("digits", task_id, "COMPLETED")
    [root] = collector.wait("round")
    server.stop()

    spans = [one for one in collector.spans() if one.trace == root.trace]
    children = [one for one in spans if one.id != root.id]
    assert root.parent == b""
    assert {one.parent for one in children} == {root.id}
    names = [one.name for one in children]
    assert [names.count(name) for name in ("check_in", "report", "upload", "update", "release")] == [3, 3, 3, 1, 1]
    phases = sorted((one for one in children if one.name in PHASES), key=lambda one: one.began)
    assert phases[0].name == "collecting"
    assert phases[-1].name == "applying"
    assert (phases[0].began, phases[-1].ended) == (root.began, root.ended)
    assert {(one.facts["population"], one.facts["task"], one.facts["iteration"]) for one in spans} == {
        ("digits", task_id, 1)
    }
    assert root.facts["status"] == "completed"
    assert root.facts["assignments.upload_completed"] == 2
    assert {one.kind for one in children if one.name in ("check_in", "report", "upload")} == {SERVER}
    assert os.getpid() not in {one.facts["worker"] for one in children if one.name in ("aggregate", "update")}
    assert {one.service for one in spans} == {"fedcompute-server"}
    [release] = [one for one in children if one.name == "release"]
    assert (release.facts["outcome"], release.facts["contributions"]) == ("released", 2)
    assert sorted(one.facts["bytes"] for one in children if one.name == "upload") == sorted(map(len, bodies))
    sums = [one for one in children if one.name == "aggregate"]
    assert sum(one.facts["uploads"] for one in sums) == 3
    assert sum(one.facts["accepted"] for one in sums) == 2
    [reason] = {key for one in sums for key in one.facts if key.startswith("rejected.")}
    assert root.facts[reason] == 1
    assert all(one.began <= one.ended for one in spans)

    sent = b"".join(collector.bodies)
    secrets = [one.assignment_id for one in assignments] + [one.upload_location.split("?")[1] for one in instructions]
    assert not [secret for secret in secrets if secret.encode() in sent]
    for word in (b"signature", b"hidden", b"http://"):
        assert word not in sent.replace(b"telemetry.sdk", b"")


def test_two_servers_do_not_share_the_traces_of_rounds_with_one_name(run_server, collector, process, tmp_path):
    for name in ("first", "second"):
        server = run_server(tracing_url=collector.url, data_dir=tmp_path / name)
        server.api.open_task("digits", process, goal=1)
        server.api.assignment("digits")
        server.stop()
    first, second = collector.named("check_in")
    assert first.facts == second.facts
    assert first.trace != second.trace


def test_the_attempts_of_a_round_share_its_trace_and_its_end_says_why(run_server, collector, process):
    server = run_server(tracing_url=collector.url, round_expiry=0.2, round_attempts=2)
    task_id = server.api.open_task("digits", process, goal=1)
    server.api.wait_for("digits", task_id, "FAILED")
    [root] = collector.wait("round")
    first, second = collector.named("collecting")
    assert (first.facts["attempt"], second.facts["attempt"]) == (0, 1)
    assert {first.parent, second.parent} == {root.id}
    assert {one.facts["error.type"] for one in (root, first, second)} == {"round_expired"}
    assert root.facts["attempt"] == 1
    assert root.began == first.began


def test_a_canceled_round_ends_its_trace(run_server, collector, process):
    server = run_server(tracing_url=collector.url)
    task_id = server.api.open_task("digits", process, goal=1)
    server.api.http.post(f"{server.api.url}/api/v1/tasks/digits/{task_id}/cancel").raise_for_status()
    [root] = collector.wait("round")
    assert (root.facts["status"], root.facts["error.type"]) == ("canceled", "canceled")


def test_a_failed_report_and_a_failed_upload_say_why_in_the_trace(run_server, collector, process, leaves):
    server = run_server(tracing_url=collector.url)
    api = server.api
    api.open_task("digits", process, goal=2)
    failed = api.assignment("digits")
    api.report(failed, task_assignments_pb2.ReportResultRequest.FAILED_MODEL_COMPUTATION)
    assert api.report(failed).status_code == 404
    instruction = api.upload_instruction(api.assignment("digits"))
    assert api.upload(instruction, b"").status_code == 400
    told, late, _ = collector.wait("report", 3)
    assert (told.facts["result"], told.status.code) == ("FAILED_MODEL_COMPUTATION", 0)
    assert (late.facts["error.type"], late.status.code) == ("assignment_not_active", 2)
    [upload] = collector.wait("upload")
    assert (upload.facts["error.type"], upload.trace) == ("malformed_request", told.trace)


def test_creating_a_task_joins_the_trace_of_whoever_asks_and_devices_join_none(run_server, collector, process):
    server = run_server(tracing_url=collector.url)
    api = server.api
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    api.http.headers["traceparent"] = f"00-{trace}-{span}-01"
    task_id = api.open_task("digits", process, goal=1)
    api.assignment("digits")
    [created] = collector.wait("create_task")
    assert (created.trace.hex(), created.parent.hex(), created.facts["task"]) == (trace, span, task_id)
    [check_in] = collector.wait("check_in")
    assert check_in.trace.hex() != trace


def test_nothing_is_sent_and_no_sdk_works_while_no_collector_is_named(run_server, collector, process, leaves):
    server = run_server()
    assert tracing.installed() is None
    server.api.open_task("digits", process, goal=1)
    server.api.contribute("digits", leaves)
    server.stop()
    assert collector.paths == []


@pytest.mark.parametrize("collector_is", ["refusing", "silent"])
def test_a_collector_that_is_away_delays_no_round_and_is_logged_once(
    run_server, process, leaves, caplog, monkeypatch, collector_is
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    # The silent one takes connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if collector_is == "refusing":
            silent.close()
        server = run_server(tracing_url=f"http://127.0.0.1:{port}/v1/traces?token=hidden", stop_grace=1.0)
        task_id = server.api.open_task("digits", process, goal=2)
        for _ in range(2):
            server.api.contribute("digits", leaves)
        began = time.monotonic()
        server.api.wait_for("digits", task_id, "COMPLETED")
        assert time.monotonic() - began < 5
        server.api.wait(lambda: "do not reach the collector" in caplog.text)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 5
    assert caplog.text.count("do not reach the collector") == 1
    assert "hidden" not in caplog.text
