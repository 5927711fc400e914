"""A server whose database is PostgreSQL."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.privacy.chain import verify_chain, verify_epsilons, verify_events
from fedcompute.privacy.ledger_document import ledger_from
from fedcompute.protos import learning_pb2, task_assignments_pb2

PASSWORD = "correct-horse"


def test_a_private_task_runs_to_its_end_over_http_and_its_ledger_verifies(run_server, hand_made, postgresql_url):
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=1.0, report_goal=2))
    running = run_server(database_url=postgresql_url)
    task_id = running.api.open_task("letters", process, goal=2, rounds=2, room=2)
    body = running.api.seal(hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial]))

    def run_round(api, iteration_id):
        with ThreadPoolExecutor(2) as devices:
            list(devices.map(lambda _: api.contribute("letters", body=body), range(2)))
        api.wait_for("letters", task_id, "COMPLETED", iteration=iteration_id)

    run_round(running.api, 1)
    running.stop()
    running = run_server(database_url=postgresql_url)
    api = running.api
    run_round(api, 2)
    found = api.wait_for("letters", task_id, "COMPLETED")
    assert [one["contributions"] for one in found["ledger"]] == [2, 2]
    entries = ledger_from(api.http.get(f"{api.url}/api/v1/populations/letters/ledger").json()).entries
    assert [(one.iteration_id, one.released) for one in entries] == [
        (1, "model"),
        (1, "metrics"),
        (2, "model"),
        (2, "metrics"),
    ]
    assert [*verify_chain(entries), *verify_events(entries), *verify_epsilons(entries)] == []
    assert not np.array_equal(
        api.checkpoint("letters", task_id, 2)["server/global_model_weights/trainable/0"], hand_made.initial[0]
    )
    strange = f"{api.url}/taskassignment/v1/population/letters/task/{task_id}/aggregation/2/task-assignment/a%00b"
    report = task_assignments_pb2.ReportResultRequest(result=task_assignments_pb2.ReportResultRequest.COMPLETED)
    answer = api.http.put(
        f"{strange}:report-result",
        content=report.SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    assert answer.status_code in (400, 404), answer.text
    assert not (running.settings.data_dir / "fedcompute.db").exists()


def test_a_database_that_is_away_is_told_in_words_that_hold_no_password(tmp_path):
    pytest.importorskip("psycopg")
    with socket.socket() as unused:
        # Bound and not listening: nobody else can take the port meanwhile.
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://someone:{PASSWORD}@127.0.0.1:{unused.getsockname()[1]}/fedcompute"
        program = "from fedcompute.cli import main; main()"
        command = [sys.executable, "-c", program, "server", "--port", "0", "--data-dir", str(tmp_path / "data")]
        command += ["--database-url", url, "--log-level", "debug"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0
    told = ran.stdout + ran.stderr
    assert "the database refused" in " ".join(told.split())
    assert PASSWORD not in told
