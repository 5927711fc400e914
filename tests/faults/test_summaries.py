"""A server is killed before and after it sums a round up: the sums count every device once."""

import sqlite3
import time

SUMS = "server.rounds.summarize.summarize commit"


def rows(directory, query):
    connection = sqlite3.connect(directory / "data" / "fedcompute.db", timeout=30)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_killed_before_and_after_it_sums_a_round_up_a_server_counts_every_device_once(start, connect, tmp_path):
    faults = [{"point": f"{SUMS}:{moment}", "count": 1, "how": "SIGKILL"} for moment in ("before", "after")]
    server = start(faults, retention_period=0)
    connect(server).run()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.starts == 3 and not rows(tmp_path, "SELECT 1 FROM iteration WHERE settled_time IS NULL"):
            break
        time.sleep(0.05)
    assert server.starts == 3
    assert rows(tmp_path, "SELECT count(*) FROM iteration_summary") == [(2,)]
    # Two rounds of three devices: what became of them, and each status on their way.
    assert rows(tmp_path, "SELECT status, sum(sessions) FROM iteration_outcome GROUP BY status") == [(2, 6)]
    passed = rows(tmp_path, "SELECT status, sum(sessions) FROM assignment_minute GROUP BY status ORDER BY status")
    assert passed == [(0, 6), (1, 6), (2, 6)]
