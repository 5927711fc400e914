"""A server is killed before and after each thing that retention does: what is old goes in the end, and nothing else."""

import sqlite3
import time

import pytest

WRITES = (
    "server.retention._delete_folder delete gradient",
    "server.retention._delete_folder delete aggregated",
    "server.retention._clean_rounds commit",
    "server.retention._purge_checkpoints commit",
    "server.retention._remove_checkpoint delete",
    "server.retention._remove_checkpoint commit",
    "server.retention._forget_devices_of commit",
)
LONG_AGO = "2020-01-01 00:00:00.000000"


def rows(directory, query):
    connection = sqlite3.connect(directory / "data" / "fedcompute.db", timeout=30)
    try:
        with connection:
            return connection.execute(query).fetchall()
    finally:
        connection.close()


def objects(directory, bucket):
    root = directory / "data" / "blobs" / bucket
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def old(start, connect, tmp_path):
    """The data of a task that ended years ago."""
    server = start(retention_period=0)
    connect(server).run()
    server.close()
    for statement in (
        f"UPDATE iteration SET status_time = '{LONG_AGO}'",
        f"UPDATE task SET status_time = '{LONG_AGO}', stop_time = '{LONG_AGO}'",
    ):
        rows(tmp_path, statement)
    return tmp_path


@pytest.mark.parametrize("write", WRITES)
def test_killed_before_and_after_each_removal_retention_ends_with_the_same_stores(old, start, connect, write):
    ledger = rows(old, "SELECT * FROM privacy_ledger")
    metrics = rows(old, "SELECT * FROM model_metrics")
    initial = [name for name in objects(old, "model") if name.split("/")[2] == "0"]
    faults = [{"point": f"{write}:{moment}", "count": 1, "how": "SIGKILL"} for moment in ("before", "after")]
    server = start(faults, retention_period=0.05, keep_newest_checkpoints=1)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        # The history of the assignments is what goes last.
        if server.starts == 3 and not rows(old, "SELECT 1 FROM aggregation_batch"):
            break
        time.sleep(0.05)
    assert server.starts == 3
    client = connect(server)
    found = client.call("GET", "/api/v1/tasks/faults/1").json()
    newest = max(one["iteration_id"] for one in found["iterations"])
    assert objects(old, "gradient") == objects(old, "aggregated") == []
    checkpoints = [name for name in objects(old, "model") if name.endswith("/checkpoint")]
    assert {name.split("/")[2] for name in checkpoints} == {"0", str(newest)}
    assert set(initial) <= set(objects(old, "model"))
    assert rows(old, "SELECT 1 FROM assignment") == rows(old, "SELECT 1 FROM assignment_status_history") == []
    assert rows(old, "SELECT count(*) FROM iteration WHERE purged_time > cleaned_time") == [(0,)]
    assert rows(old, "SELECT * FROM privacy_ledger") == ledger
    assert rows(old, "SELECT * FROM model_metrics") == metrics
    assert client.call("GET", "/api/v1/tasks/faults/1/checkpoint").status_code == 200
