"""A server that cannot keep up, and what devices hear of it: never 429, never 503, never a silence of 30 s."""

import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import pytest

from fedcompute.protos import federatedcompute_pb2, task_assignments_pb2
from fedcompute.server.api import admission

Report = task_assignments_pb2.ReportResultRequest
CheckInAnswer = task_assignments_pb2.CreateTaskAssignmentResponse
ReportAnswer = task_assignments_pb2.ReportResultResponse


@contextmanager
def locked(server):
    """The database, locked against everybody else; yields what unlocks it early."""
    with closing(sqlite3.connect(server.settings.data_dir / "fedcompute.db", check_same_thread=False)) as connection:
        connection.isolation_level = None
        connection.execute("PRAGMA busy_timeout = 30000")
        connection.execute("BEGIN EXCLUSIVE")
        try:
            yield lambda: connection.execute("ROLLBACK")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


@pytest.fixture
def hasty(monkeypatch):
    """Patience of two seconds where a device has thirty."""
    for name in ("CHECK_IN_S", "REPORT_S", "UPLOAD_S"):
        for module in ("admission", "assignments", "reports", "blobs", "device_auth"):
            monkeypatch.setattr(f"fedcompute.server.api.{module}.{name}", 2.0, raising=False)


def turned_away(response, message=CheckInAnswer):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-protobuf"
    answer = message.FromString(response.content)
    assert answer.rejection_info.reason == federatedcompute_pb2.RejectionReason.NO_TASK_AVAILABLE
    window = answer.rejection_info.retry_window
    assert 0 < window.delay_min.ToMilliseconds() <= window.delay_max.ToMilliseconds()
    return True


def test_a_check_in_that_meets_a_locked_database_gets_a_window_and_no_place_later(run_server, hand_made, hasty):
    server = run_server()
    task_id = server.api.open_task("locked", hand_made.process_of())
    with locked(server):
        started = time.monotonic()
        turned_away(server.api.check_in("locked"))
        assert time.monotonic() - started < 5
    time.sleep(2.5)
    assert server.api.task("locked", task_id)["assignments"] == {}
    assert server.api.assignment("locked").assignment_id


def test_a_report_waits_for_the_database_and_loses_nothing(run_server, hand_made):
    server = run_server()
    server.api.open_task("waiting", hand_made.process_of())
    assignment = server.api.assignment("waiting")
    with locked(server) as unlock:
        threading.Timer(2, unlock).start()
        started = time.monotonic()
        instruction = server.api.upload_instruction(assignment)
        assert time.monotonic() - started > 1
    assert instruction.upload_location


def test_a_report_that_cannot_wait_longer_gets_a_window_and_changes_nothing_later(run_server, hand_made, hasty):
    server = run_server()
    task_id = server.api.open_task("impatient", hand_made.process_of())
    one, two = (server.api.assignment("impatient") for _ in range(2))
    with locked(server):
        turned_away(server.api.report(one), ReportAnswer)
        # Its answer is not read; what counts is that the device does not repeat it.
        assert server.api.report(two, Report.FAILED).status_code == 200
    time.sleep(2.5)
    assert server.api.task("impatient", task_id)["assignments"] == {"ASSIGNED": 2}


def test_an_upload_needs_no_writer_of_the_database(run_server, hand_made):
    server = run_server()
    server.api.open_task("uploading", hand_made.process_of())
    instruction = server.api.upload_instruction(server.api.assignment("uploading"))
    with locked(server) as unlock:
        # Readers pass a writer's lock.
        assert server.api.upload(instruction, b"an update").status_code == 200
        unlock()


def test_hundreds_of_check_ins_at_a_locked_database_are_all_answered_in_time(run_server, hand_made, hasty):
    server = run_server()
    server.api.open_task("crowd", hand_made.process_of())
    late = server.api.assignment("crowd")
    with locked(server):
        started = time.monotonic()
        with ThreadPoolExecutor(200) as threads:
            answers = list(threads.map(lambda _: server.api.check_in("crowd"), range(200)))
            assert all(turned_away(answer) for answer in answers)
            assert server.api.http.get(f"{server.api.url}/healthz").status_code == 200
        assert time.monotonic() - started < 20
    assert server.api.wait(lambda: server.api.check_in("crowd").status_code == 201)
    assert server.api.upload_instruction(late).upload_location


def test_check_ins_beyond_the_limit_are_turned_away_at_once_and_reports_wait_for_a_place(run_server, hand_made):
    server = run_server(max_check_ins=2, max_reports=1)
    server.api.open_task("limited", hand_made.process_of(), goal=5)
    one, two = (server.api.assignment("limited") for _ in range(2))
    with ThreadPoolExecutor(8) as threads, locked(server) as unlock:
        waiting = [threads.submit(server.api.check_in, "limited") for _ in range(2)]
        reports = [threads.submit(server.api.upload_instruction, assignment) for assignment in (one, two)]
        time.sleep(1)
        started = time.monotonic()
        turned_away(server.api.check_in("limited"))
        assert time.monotonic() - started < 1
        unlock()
        assert [one.result().status_code for one in waiting] == [201, 201]
        assert all(one.result().upload_location for one in reports)


def test_requests_that_are_not_all_there_take_no_place(run_server, hand_made):
    server = run_server(max_check_ins=1, max_reports=1)
    server.api.open_task("dawdling", hand_made.process_of(), goal=5)
    assignment = server.api.assignment("dawdling")
    port = int(server.api.url.rpartition(":")[2])
    fields = b"HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nContent-Length: 9\r\n\r\n\x0a"
    calls = (b"POST /taskassignment/v1/population/dawdling:create-task-assignment ",)
    calls += (f"PUT /taskassignment/v1{assignment.self_uri}:report-result ".encode(),)
    wires = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(6)]
    try:
        for number, wire in enumerate(wires):
            wire.sendall(calls[number % 2] + fields)
        time.sleep(0.5)
        assert server.api.check_in("dawdling").status_code == 201
        assert server.api.upload_instruction(assignment).upload_location
    finally:
        for wire in wires:
            wire.close()


def test_reports_that_find_no_place_get_a_window(run_server, hand_made, monkeypatch):
    monkeypatch.setattr(admission, "PLACE_S", 1.0)
    server = run_server(max_reports=1)
    server.api.open_task("crammed", hand_made.process_of(), goal=5)
    one, two = (server.api.assignment("crammed") for _ in range(2))
    with ThreadPoolExecutor(1) as threads, locked(server) as unlock:
        first = threads.submit(server.api.report, one)
        time.sleep(0.3)
        turned_away(server.api.report(two), ReportAnswer)
        unlock()
        assert first.result().status_code == 200


def test_uploads_that_find_no_place_are_a_typed_500(run_server, hand_made, monkeypatch):
    monkeypatch.setattr(admission, "PLACE_S", 1.0)
    server = run_server(max_uploads=1)
    server.api.open_task("stuffed", hand_made.process_of(), goal=5)
    one, two = (server.api.upload_instruction(server.api.assignment("stuffed")) for _ in range(2))
    release = threading.Event()

    def slowly():
        yield b"half"
        release.wait(30)
        yield b"rest"

    with ThreadPoolExecutor(1) as threads, httpx.Client(timeout=60) as client:
        headers = dict(one.extra_request_headers)
        first = threads.submit(client.put, one.upload_location, content=slowly(), headers=headers)
        time.sleep(0.5)
        second = server.api.upload(two, b"x")
        assert (second.status_code, second.json()["code"]) == (500, "server_busy")
        release.set()
        assert first.result().status_code == 200
    assert server.api.upload(two, b"x").status_code == 200


def test_a_store_that_takes_nothing_is_a_typed_500_for_the_upload_and_the_next_one_is_well(run_server, hand_made):
    server = run_server()
    server.api.open_task("full-disk", hand_made.process_of())
    instruction = server.api.upload_instruction(server.api.assignment("full-disk"))
    store = server.settings.data_dir / "blobs"
    store.rename(store.with_name("gone"))
    store.write_text("in the way")
    response = server.api.upload(instruction, b"x")
    assert (response.status_code, response.json()["code"]) == (500, "storage_failed")
    assert str(server.settings.data_dir) not in response.text
    store.unlink()
    store.with_name("gone").rename(store)
    assert server.api.upload(instruction, b"x").status_code == 200


def test_a_server_that_stops_turns_devices_away_as_gently(run_server, hand_made):
    server = run_server(stop_grace=1)
    server.api.open_task("stopping", hand_made.process_of())
    assignment = server.api.assignment("stopping")
    with ThreadPoolExecutor(2) as threads, locked(server) as unlock:
        asked = threads.submit(server.api.check_in, "stopping")
        reported = threads.submit(server.api.report, assignment)
        time.sleep(0.5)
        threading.Timer(3, unlock).start()
        client, server.api.http = server.api.http, httpx.Client()
        server.stop()
        turned_away(asked.result())
        turned_away(reported.result(), ReportAnswer)
        client.close()


@pytest.fixture
def on_postgresql(run_server, postgresql_url):
    return run_server(database_url=postgresql_url)


@contextmanager
def table_locked(url):
    """PostgreSQL's table of assignments, locked against everybody else."""
    from fedcompute.storage.database import Database

    database = Database.open(url)
    try:
        with database.write() as tx:
            tx.exec_driver_sql("LOCK TABLE assignment IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        database.close()


def test_a_locked_postgresql_turns_devices_away_in_time_and_nothing_happens_later(
    on_postgresql, postgresql_url, hand_made, hasty
):
    api = on_postgresql.api
    task_id = api.open_task("locked-pg", hand_made.process_of())
    assignment = api.assignment("locked-pg")
    with table_locked(postgresql_url):
        started = time.monotonic()
        turned_away(api.check_in("locked-pg"))
        turned_away(api.report(assignment), ReportAnswer)
        assert time.monotonic() - started < 15
    time.sleep(2.5)
    assert api.task("locked-pg", task_id)["assignments"] == {"ASSIGNED": 1}
    assert api.upload_instruction(assignment).upload_location
