import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

SERVE = (
    "import sys, pathlib\n"
    "from fedcompute.app import serve\n"
    "from fedcompute.server.settings import RetryWindow, Settings\n"
    "fast = RetryWindow(0.01, 0.02)\n"
    "serve(Settings(data_dir=pathlib.Path(sys.argv[1]), port=int(sys.argv[2]), workers=1, collector_batch_size=2,\n"
    "               retry_no_task=fast, retry_no_active_task=fast))\n"
)


class Process:
    """A server in a process of its own."""

    def __init__(self, settings) -> None:
        self.url = settings.base_url
        command = [sys.executable, "-c", SERVE, str(settings.data_dir), str(settings.port)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            time.sleep(0.02)
        raise AssertionError("the server did not start")

    def end(self, how) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)


@pytest.fixture
def start(tmp_path, hand_made):
    settings = hand_made.settings_of(tmp_path / "data")
    running = []

    def run():
        running.append(Process(settings))
        return running[-1]

    yield run
    for one in running:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def children(pid):
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found.append(folder)
    return found


def survivors(folders):
    """Those that still run after a few seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(folder.exists() for folder in folders):
        time.sleep(0.05)
    return [folder for folder in folders if folder.exists()]


# Before any upload is aggregated, amid batches, at the goal; `tests/faults` has a kill at each write between them.
@pytest.mark.parametrize("kill_after", [1, 3, 5])
def test_after_kill_9_the_round_completes_and_every_upload_counts_once(start, hand_made, make_api, kill_after):
    server = start()
    api = make_api(server.url)
    process = hand_made.process_of()
    task_id = api.open_task("phoenix", process, goal=5, rounds=2, room=5)
    # Powers of two: any upload lost or counted twice changes the mean.
    updates = [[np.full(weight.shape, 2.0**i) for weight in hand_made.initial] for i in range(5)]
    bodies = [api.seal(hand_made.update_of(process, deltas)) for deltas in updates]
    instructions = [api.upload_instruction(api.assignment("phoenix")) for _ in bodies]
    for sent, (instruction, body) in enumerate(zip(instructions, bodies, strict=True)):
        if sent == kill_after:
            server.end(signal.SIGKILL)
            server = start()
        assert api.upload(instruction, body).status_code == 200
    if kill_after == len(bodies):
        server.end(signal.SIGKILL)
        server = start()
    found = api.wait_for("phoenix", task_id, "COMPLETED", iteration=1)
    assert found["iterations"][0]["assignments"] == {"UPLOAD_COMPLETED": 5}
    state = api.checkpoint("phoenix", task_id, 1)
    expected = hand_made.initial[0] - hand_made.rate * 31 / 5
    np.testing.assert_allclose(state["server/global_model_weights/trainable/0"], expected, atol=1e-6)


def test_kill_9_leaves_no_worker_behind(start, hand_made, make_api):
    server = start()
    api = make_api(server.url)
    process = hand_made.process_of()
    task_id = api.open_task("orphans", process, goal=1)
    api.contribute("orphans", hand_made.update_of(process, hand_made.initial))
    api.wait_for("orphans", task_id, "COMPLETED")
    workers = children(server.process.pid)
    assert workers
    server.end(signal.SIGKILL)
    assert not survivors(workers)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_soon_and_leaves_no_process(start, hand_made, make_api, how):
    server = start()
    api = make_api(server.url)
    process = hand_made.process_of()
    task_id = api.open_task("stopped", process, goal=1)
    api.contribute("stopped", hand_made.update_of(process, hand_made.initial))
    api.wait_for("stopped", task_id, "COMPLETED")
    api.http.close()
    workers = children(server.process.pid)
    begun = time.monotonic()
    code = server.end(how)
    assert code == 0
    assert time.monotonic() - begun < 5
    assert not survivors(workers)
