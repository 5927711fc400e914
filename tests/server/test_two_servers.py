"""Two servers, each a process of its own, on one PostgreSQL and one blob store."""

import contextlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

SERVE = (
    "import sys, pathlib\n"
    "from fedcompute.app import serve\n"
    "from fedcompute.server.settings import RetryWindow, Settings\n"
    "fast = RetryWindow(0.01, 0.02)\n"
    "serve(Settings(data_dir=pathlib.Path(sys.argv[1]), port=int(sys.argv[2]), database_url=sys.argv[3], workers=1,\n"
    "               collector_batch_size=2, lease_lifetime=2.0, retry_no_task=fast, retry_no_active_task=fast))\n"
)


class Process:
    """A server in a process of its own; all of them share database, blobs and the operator's secret."""

    def __init__(self, data_dir, port, database_url) -> None:
        self.url = f"http://localhost:{port}"
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(data_dir), str(port), database_url])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not start")


@pytest.fixture
def start(tmp_path, hand_made, postgresql_url):
    running = []

    def run():
        running.append(Process(tmp_path / "data", hand_made.settings_of(tmp_path).port, postgresql_url))
        return running[-1]

    yield run
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGCONT)
        one.process.kill()
        one.process.wait(20)


def contribute(api, population, hand_made, process, value):
    api.contribute(population, hand_made.update_of(process, [np.full(leaf.shape, value) for leaf in hand_made.initial]))


def expected(hand_made, rounds, mean):
    return hand_made.initial[0] - hand_made.rate * rounds * mean


def test_rounds_run_on_two_servers_and_every_device_counts_once(start, make_api, hand_made):
    apis = [make_api(start().url), make_api(start().url)]
    process = hand_made.process_of()
    task_id = apis[0].open_task("both", process, goal=5, room=5, rounds=3)
    for number in range(1, 4):
        with ThreadPoolExecutor(2) as pool:
            # Each device talks to one of the servers, as a load balancer would have it.
            list(pool.map(lambda i: contribute(apis[i % 2], "both", hand_made, process, float(i + 1)), range(5)))
        apis[0].wait(lambda n=number: _completed(apis[1].task("both", task_id), n), 60)
    found = apis[0].wait_for("both", task_id, "COMPLETED")
    assert [one["assignments"] for one in found["iterations"]] == [{"UPLOAD_COMPLETED": 5}] * 3
    state = apis[1].checkpoint("both", task_id, 3)["server/global_model_weights/trainable/0"]
    np.testing.assert_allclose(state, expected(hand_made, 3, 3.0), atol=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_server_that_is_killed_or_frozen_leaves_its_rounds_to_the_other(start, make_api, hand_made, how):
    servers = [start(), start()]
    apis = [make_api(one.url) for one in servers]
    process = hand_made.process_of()
    task_id = apis[0].open_task("one", process, goal=5, room=5, rounds=3)
    for value in range(3):
        contribute(apis[value % 2], "one", hand_made, process, 1.0)
    servers[0].process.send_signal(how)
    for number in range(1, 4):
        for _ in range(2 if number == 1 else 5):
            contribute(apis[1], "one", hand_made, process, 1.0)
        apis[1].wait(lambda n=number: _completed(apis[1].task("one", task_id), n), 90)
    if how is signal.SIGSTOP:
        # What it goes on with is over, and changes nothing.
        servers[0].process.send_signal(signal.SIGCONT)
        time.sleep(1)
    found = apis[1].wait_for("one", task_id, "COMPLETED")
    assert [one["assignments"] for one in found["iterations"]] == [{"UPLOAD_COMPLETED": 5}] * 3
    state = apis[1].checkpoint("one", task_id, 3)["server/global_model_weights/trainable/0"]
    np.testing.assert_allclose(state, expected(hand_made, 3, 1.0), atol=1e-4)


def _completed(found, number):
    return any(one["iteration_id"] == number and one["status"] == "COMPLETED" for one in found["iterations"])
