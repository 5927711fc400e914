"""How a server ends: a process of its own, real signals."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedcompute.server.rounds.aggregate import aggregate

FEDCOMPUTE = Path(sys.executable).parent / "fedcompute"


@pytest.fixture
def start(tmp_path):
    """Returns start(*options) -> (process, url) of a running server."""
    started = []

    def run(*options):
        command = [FEDCOMPUTE, "server", "--data-dir", tmp_path / "data", "--port", "0", "--json", "--workers", "1"]
        environment = {**os.environ, "FEDCOMPUTE_RETRY_NO_TASK": "0.01:0.02"}
        process = subprocess.Popen(
            [*map(str, command), *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return process, json.loads(line)["url"]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def children(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(folder)
    return found


def gone(folders):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(folder.exists() for folder in folders):
        time.sleep(0.05)
    return not any(folder.exists() for folder in folders)


@pytest.fixture
def half_sent(hand_made):
    """Returns half_sent(api) -> (connection, rest of the body): an upload of which the server waits for the rest."""
    connections = []

    def run(api):
        process = hand_made.process_of()
        api.open_task("stopping", process, goal=1, room=5)
        instruction = api.upload_instruction(api.assignment("stopping"))
        body = api.seal(hand_made.update_of(process, hand_made.initial))
        place = urlsplit(instruction.upload_location)
        head = f"PUT {place.path}?{place.query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in instruction.extra_request_headers.items())
        client = socket.create_connection(("127.0.0.1", place.port))
        connections.append(client)
        client.settimeout(60)
        client.sendall(head.encode() + b"\r\n" + body[:20])
        time.sleep(0.3)
        return client, body[20:]

    yield run
    for connection in connections:
        connection.close()


def refused(url):
    place = urlsplit(url)
    try:
        socket.create_connection((place.hostname, place.port), timeout=30).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_server_that_stops_answers_who_is_being_served_takes_nobody_new_and_leaves_nobody_behind(
    start, make_api, half_sent, how
):
    process, url = start("--stop-grace", "60")
    api = make_api(url)
    client, rest = half_sent(api)
    api.wait(lambda: children(process.pid), 60)
    workers = children(process.pid)
    process.send_signal(how)
    api.wait(lambda: refused(url))
    time.sleep(0.5)
    assert process.poll() is None
    client.sendall(rest)
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert gone(workers)
    process, url = start()
    assert make_api(url).wait_for("stopping", 1, "COMPLETED")["iterations"][0]["status"] == "COMPLETED"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_second_signal_ends_the_server_at_once_and_the_next_one_goes_on(start, make_api, half_sent, hand_made, how):
    process, url = start("--stop-grace", "600")
    api = make_api(url)
    half_sent(api)
    api.wait(lambda: children(process.pid), 60)
    workers = children(process.pid)
    process.send_signal(how)
    api.wait(lambda: refused(url))
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(how)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + how
    assert "Traceback" not in err
    assert gone(workers)
    _, url = start()
    api = make_api(url)
    task = api.task("stopping", 1)["task"]
    assert task["status"] == "OPEN"
    api.contribute("stopping", hand_made.update_of(hand_made.process_of(), hand_made.initial))
    api.wait_for("stopping", 1, "COMPLETED")


def test_one_signal_that_arrives_twice_is_one(start, make_api, half_sent):
    process, url = start("--stop-grace", "60")
    client, rest = half_sent(make_api(url))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    client.sendall(rest)
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert process.wait(60) == 0


def test_a_server_whose_database_hangs_still_ends(tmp_path, postgresql, postgresql_url):
    code = "import fedcompute.server.web_server as w, fedcompute.cli\nw._LONGEST_END = 2.0\nfedcompute.cli.main()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "server", "--port", "0", "--json", "--stop-grace", "0", "--workers", "1"],
        env={**os.environ, "FEDCOMPUTE_DATABASE_URL": postgresql_url},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline()
        with postgresql.frozen():
            time.sleep(1.5)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "could not stop in good order" in err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_an_engine_that_stops_hands_its_jobs_to_another_at_once(run_server, make_gate, hand_made, postgresql_url):
    gate = make_gate(aggregate)
    shared = {"database_url": postgresql_url, "lease_lifetime": 3600.0}
    first = run_server(executor=gate, **shared)
    process = hand_made.process_of()
    task_id = first.api.open_task("handed", process, goal=1)
    first.api.contribute("handed", hand_made.update_of(process, hand_made.initial))
    assert gate.reached.wait(60)
    second = run_server(**shared)
    time.sleep(2)
    assert second.api.task("handed", task_id)["task"]["status"] == "OPEN"
    first.stop()
    second.api.wait_for("handed", task_id, "COMPLETED")
