"""kill -9 at any line of a release: what is released then is released once, and the ledger says so."""

import contextlib
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.privacy.chain import verify_chain, verify_epsilons, verify_events
from fedcompute.privacy.ledger_document import ledger_from
from fedcompute.protos import learning_pb2

# Kills its own process at the n-th line that it runs in the modules that close rounds, once a round is applied.
SERVE = """
import os, pathlib, signal, sys, threading
from fedcompute.app import serve
from fedcompute.server.rounds import passes, release
from fedcompute.server.settings import RetryWindow, Settings
from fedcompute.storage import budgets, iterations, releases

LINES = {module.__file__ for module in (release, iterations, releases, budgets)}
left = int(sys.argv[3])

def trace(frame, event, argument):
    if frame.f_code.co_filename not in LINES:
        return None if frame.f_code.co_filename.startswith("<") else trace
    global left
    if event == "line":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

def traced(step):
    def run(context, iteration):
        outcome = context.jobs._flights.get(iteration.key)
        if outcome is None or outcome.future is None or not outcome.future.done():
            return step(context, iteration)
        sys.settrace(trace)
        try:
            return step(context, iteration)
        finally:
            sys.settrace(None)
    return run

if left:
    passes._STEPS[passes.IterationStatus.APPLYING] = traced(release.apply)
fast = RetryWindow(0.01, 0.02)
serve(Settings(data_dir=pathlib.Path(sys.argv[1]), port=int(sys.argv[2]), workers=1,
               retry_no_task=fast, retry_no_active_task=fast))
"""
DELTA = 1e-6


class Process:
    def __init__(self, settings, kill_at=0) -> None:
        command = [sys.executable, "-c", SERVE, str(settings.data_dir), str(settings.port), str(kill_at)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{settings.base_url}/ready").status_code == 200:
                    return
            time.sleep(0.02)
        raise AssertionError("the server did not start")


@pytest.fixture
def start(tmp_path, hand_made):
    settings = hand_made.settings_of(tmp_path / "data")
    running = []

    def run(kill_at=0):
        running.append(Process(settings, kill_at))
        return running[-1].process

    yield run, settings
    for one in running:
        one.process.kill()
        one.process.wait(20)


# A release runs about 180 of these lines, a refusal about 50; behind the last the server just lives on.
@pytest.mark.parametrize(
    ("allowed", "kill_at"),
    [(True, 1), (True, 110), (True, 175), (False, 45)],
)
def test_a_server_killed_at_any_line_of_a_release_releases_once_or_not_at_all(
    start, hand_made, make_api, allowed, kill_at
):
    run, settings = start
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=1))
    server = run(kill_at)
    api = make_api(settings.base_url)
    task_id = api.open_task("lines", process, goal=1, rounds=3, room=1)
    budget = {"epsilon": gaussian_epsilon(1.0, DELTA) * (1.1 if allowed else 0.9), "delta": DELTA}
    assert api.http.put(f"{api.url}/api/v1/populations/lines/budget", json=budget).status_code == 200
    api.contribute("lines", hand_made.update_of(process, [np.full(one.shape, 0.01) for one in hand_made.initial]))
    path = settings.data_dir / "blobs" / "model" / "lines" / str(task_id) / "1" / "s" / "0" / "checkpoint"
    stored = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert server.wait(5) == -signal.SIGKILL
        stored = path.read_bytes() if path.exists() else None
        run()
    found = api.wait_for("lines", task_id, "COMPLETED")
    assert found["task"]["reason"] == "budget_spent"
    assert found["failure"]["code"] == "budget_spent"
    entries = ledger_from(api.http.get(f"{api.url}/api/v1/populations/lines/ledger").json()).entries
    assert [*verify_chain(entries), *verify_events(entries), *verify_epsilons(entries)] == []
    assert [one.released for one in entries] == (["model", "metrics"] if allowed else [])
    assert [one["status"] for one in found["iterations"]] == (["COMPLETED"] if allowed else ["CANCELED"])
    assert path.exists() is allowed
    # The noise of the first run is the noise that was released.
    assert stored is None or path.read_bytes() == stored
