"""A whole round of a server that logs everything it can, searched for every secret that took part in it."""

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedcompute.protos import task_assignments_pb2

FEDCOMPUTE = Path(sys.executable).parent / "fedcompute"


@pytest.fixture
def start(tmp_path):
    """Returns start(*options, **variables) -> (url, stop), where stop() -> everything that the server wrote."""
    running = []

    def run(*options, **variables):
        command = [FEDCOMPUTE, "server", "--data-dir", tmp_path / "data", "--port", "0", "--json", *options]
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        running.append(process)
        written = []
        reader = threading.Thread(target=lambda: written.extend(process.stderr))
        reader.start()
        line = process.stdout.readline()
        assert line, "".join(written)

        def stop():
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            reader.join(60)
            return "".join(written)

        return json.loads(line)["url"], stop

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_key_token_signature_session_or_secret_of_a_round_is_in_the_log(
    start, make_api, hand_made, devices, tmp_path, form
):
    operator_secret = secrets.token_hex(32)
    environment = {"FEDCOMPUTE_SECRET": operator_secret, "FEDCOMPUTE_RETRY_NO_TASK": "0.01:0.02"}
    made = subprocess.run(
        [FEDCOMPUTE, "api-key", "create", "--role", "operator", "--label", "x", "--data-dir", tmp_path / "data"],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, **environment},
        check=True,
    )
    api_key = made.stdout.strip().splitlines()[-1]
    url, stop = start(
        *("--log-level", "debug", "--log-format", form, "--workers", "1"),
        *("--require-api-keys", "--authentication", "enrolment"),
        **environment,
    )
    api = make_api(url)
    assert api.http.get(f"{url}/api/v1/tasks", headers={"authorization": "Bearer fc_wrong"}).status_code == 401
    api.http.headers["authorization"] = f"Bearer {api_key}"
    found = [operator_secret, api_key, api_key[-43:]]
    process = hand_made.process_of()
    task = api.open_task("quiet", process, goal=2, room=4)
    bodies = [b"no update at all", *(api.seal(hand_made.update_of(process, hand_made.initial)) for _ in range(2))]
    for body in bodies:
        (enrolment,) = api.http.post(f"{url}/api/v1/enrolments", json={"label": "test"}).json()["enrolments"]
        secret = base64.b64decode(enrolment["secret"])
        device = devices.enrolled(api, enrolment["id"], secret)
        assignment = device.take_part("quiet")
        answer = task_assignments_pb2.ReportResultResponse.FromString(device.report(assignment).content)
        instruction = answer.upload_instruction
        spoilt = instruction.upload_location[:-4] + "0000"
        assert api.http.put(spoilt, content=body).status_code in (400, 401, 403)
        assert api.upload(instruction, body).status_code == 200
        found += [enrolment["secret"], secret.hex(), device.token, assignment.assignment_id]
        found.append(re.search(r"signature=(\w+)", instruction.upload_location)[1])
    assert api.wait_for("quiet", task, "COMPLETED", iteration=1)
    log = stop()
    assert "/blobs/v1/gradient/quiet/" in log
    assert "rejected" in log
    assert len(found) == 3 + 5 * len(bodies)
    for one in found:
        assert one not in log
    assert not re.search(r"signature=(?!\*\*\*)|Bearer|PRIVATE KEY", log)
