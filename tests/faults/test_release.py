"""kill -9 at any line of a release: what is released then is released once, and the ledger says so."""

import time

import pytest

from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.privacy.chain import verify_chain, verify_epsilons, verify_events
from fedcompute.privacy.ledger_document import ledger_from

DELTA = 1e-6


# A release runs about 180 of these lines, a refusal about 50; behind the last the server just lives on.
@pytest.mark.parametrize(("allowed", "line"), [(True, 1), (True, 110), (True, 175), (False, 45)])
def test_a_server_killed_at_any_line_of_a_release_releases_once_or_not_at_all(
    start, connect, fixed_gaussian, tmp_path, allowed, line
):
    server = start([{"line": line}], revive=False, seeded=False)
    client = connect(server)
    task_id = client.open_task(3, 1, fixed_gaussian)
    # A budget that is known before would open no round.
    client.wait(task_id, lambda found: found["iterations"])
    budget = {"epsilon": gaussian_epsilon(1.0, DELTA) * (1.1 if allowed else 0.9), "delta": DELTA}
    client.call("PUT", "/api/v1/populations/faults/budget", json=budget)
    client.contribute(0.01, fixed_gaussian)
    deadline = time.monotonic() + 5
    while server.runs() and time.monotonic() < deadline:
        time.sleep(0.01)
    path = tmp_path / "data" / "blobs" / "model" / "faults" / str(task_id) / "1" / "s" / "0" / "checkpoint"
    stored = None if server.runs() or not path.exists() else path.read_bytes()
    server.revive = True
    found = client.wait(task_id, lambda found: found["task"]["status"] == "COMPLETED")
    assert found["task"]["reason"] == "budget_spent"
    assert found["failure"]["code"] == "budget_spent"
    entries = ledger_from(client.call("GET", "/api/v1/populations/faults/ledger").json()).entries
    assert [*verify_chain(entries), *verify_events(entries), *verify_epsilons(entries)] == []
    assert [one.released for one in entries] == (["model", "metrics"] if allowed else [])
    assert [one["status"] for one in found["iterations"]] == (["COMPLETED"] if allowed else ["CANCELED"])
    assert path.exists() is allowed
    # The noise of the first run is the noise that was released.
    assert stored is None or path.read_bytes() == stored
