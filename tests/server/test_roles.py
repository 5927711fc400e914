"""Servers that divide the work among them, on one PostgreSQL and one blob store."""

import httpx
import pytest

from fedcompute.errors import OperationFailed
from fedcompute.server.settings import Settings

SWEEP_SECONDS = 60


def test_two_that_answer_devices_and_one_that_runs_rounds_complete_a_task_together(
    run_server, hand_made, postgresql_url
):
    process = hand_made.process_of()
    # The sweep that finds what another server took in follows from the time-outs.
    shared = {"database_url": postgresql_url, "upload_timeout": 8.0, "local_compute_timeout": 60.0}
    first, second = (run_server(roles=("api",), **shared) for _ in range(2))
    engine = run_server(roles=("engine",), **shared)
    task = first.api.create_task("shared", goal=2, rounds=2)
    task_id = first.api.open_task("digits", process, goal=2, rounds=2)
    assert second.api.task("shared", task.task_id)["task"]["status"] == "CREATED"
    for round_number in (1, 2):
        for server in (first, second):
            server.api.contribute("digits", hand_made.update_of(process, hand_made.initial))
        first.api.wait(lambda n=round_number: _rounds(second.api, task_id).get(n) == "COMPLETED", SWEEP_SECONDS)
    second.api.wait_for("digits", task_id, "COMPLETED")
    for one in (first, second):
        assert one.app.state.context.uploads.all() == set()
        assert one.app.state.context.jobs._flights == {}
    assert httpx.get(f"{engine.api.url}/ready").status_code == 200


def _rounds(api, task_id):
    return {one["iteration_id"]: one["status"] for one in api.task("digits", task_id)["iterations"]}


def test_a_server_that_only_runs_rounds_answers_nobody_else(run_server, postgresql_url):
    running = run_server(roles=("engine",), database_url=postgresql_url)
    url = running.api.url
    for path in ("/ready", "/healthz"):
        assert httpx.get(url + path, timeout=30).status_code == 200
    for path in ("/api/v1/tasks", "/.well-known/odp/v1/public-keys", "/blobs/v1/model/x"):
        assert httpx.get(url + path).status_code == 404
    assert running.api.check_in("digits").status_code == 404


def test_a_server_without_the_engine_is_ready_and_opens_no_task(run_server, hand_made, postgresql_url):
    running = run_server(roles=("api",), database_url=postgresql_url)
    assert httpx.get(f"{running.api.url}/ready", timeout=30).status_code == 200
    with pytest.raises(AssertionError, match="in time"):
        running.api.open_task("waiting", hand_made.process_of(), within=3)
    assert running.api.task("waiting", 1)["task"]["status"] == "CREATED"


@pytest.mark.parametrize("roles", [(), ("api",), ("engine",), ("api", "builder")])
def test_no_roles_unknown_ones_and_a_part_of_them_on_sqlite_are_refused(tmp_path, roles):
    with pytest.raises(OperationFailed, match="roles"):
        Settings(data_dir=tmp_path, roles=roles)
