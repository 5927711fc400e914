"""The trace of a build: client program, builder service with its worker process, and a real server."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from fedcompute.app import server
from fedcompute.builder.client import build_request, send
from fedcompute.builder.service import ServiceSettings, create_service
from fedcompute.protos import task_builder_pb2
from fedcompute.server.settings import Settings

STEPS = ["validate", "differential_privacy", "load_model", "client_graph", "tflite", "op_check", "plan"]


@pytest.fixture
def builder(serve, collector, tmp_path):
    """The URL of a builder whose tasks go to a real server; both trace into the collector, and as one service."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    running = server(Settings(data_dir=tmp_path / "data", port=port, workers=1, tracing_url=collector.url))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    with serve(create_service(ServiceSettings(f"http://localhost:{port}"))) as url:
        yield url
    running.should_exit = True
    thread.join(30)


def test_a_build_is_one_trace_from_the_client_to_the_server(builder, collector, dense_model, config, tmp_path):
    (tmp_path / "config.pbtxt").write_text(str(config))
    program = [sys.executable, "-c", "from fedcompute.cli.task_builder_client import main; main()"]
    inputs = [f"--saved_model={dense_model}", f"--task_config={tmp_path / 'config.pbtxt'}"]
    done = subprocess.run(
        [*program, *inputs, f"--task_builder_server={builder}"],
        env={**os.environ, "FEDCOMPUTE_TRACING_URL": f"{collector.url}/v1/traces?token=hidden"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [client] = collector.wait("request_build")
    [build] = collector.wait("build")
    collector.wait("upload_artifacts", 2)
    spans = {one.id: one for one in collector.spans() if one.trace == client.trace}
    children = [one.name for one in spans.values() if one.parent == build.id]
    assert (client.service, client.parent, build.parent) == ("fedcompute-task-builder-client", b"", client.id)
    assert {name: children.count(name) for name in STEPS} == dict.fromkeys(STEPS[:3], 1) | dict.fromkeys(STEPS[3:], 2)
    registered = [one for one in spans.values() if one.name == "register_task"]
    created = [one for one in spans.values() if one.name == "create_task"]
    assert [spans[one.parent].facts["task"] for one in created] == [one.facts["task"] for one in created] == [1, 2]
    assert len({one.facts["correlation_id"] for one in [*registered, *created]}) == 1
    steps = [one for one in spans.values() if one.name in STEPS]
    assert all(build.began <= one.began <= one.ended <= build.ended for one in steps)
    assert sum(one.facts["bytes"] for one in spans.values() if one.name == "plan") > 1_000
    sent = b"".join(collector.bodies)
    assert not [word for word in (b"hidden", b"signature", str(dense_model).encode()) if word in sent]


def test_a_build_that_is_refused_says_so_in_its_trace(builder, collector, dense_model, config):
    config.federated_learning.learning_process.runtime_config.report_goal = 0
    answer = send(build_request(str(dense_model), config, task_builder_pb2.ExperimentFlags()), builder)
    assert answer.HasField("error_info")
    [build], [step] = collector.wait("build"), collector.wait("validate")
    assert (build.facts["error.type"], step.facts["error.type"]) == ("INVALID_REQUEST", "config_invalid")
    assert step.parent == build.id
