"""Honest answers about readiness, in time, whatever hangs."""

import asyncio
import contextlib
import threading
import time

import httpx

from fedcompute.errors import OperationFailed, Reason
from fedcompute.server import readiness
from fedcompute.server.api import health
from fedcompute.server.readiness import Readiness


def ask(asked):
    return asyncio.run(asked.problems())


def test_a_part_that_raises_is_named_with_its_words():
    def fail():
        raise OperationFailed(Reason.STORAGE_FAILED, "the disk is full")

    def surprise():
        raise ZeroDivisionError("secret words")

    problems = ask(Readiness({"disk": fail, "luck": surprise, "rest": lambda: None}))
    assert problems == {"disk": "the disk is full", "luck": "unexpected ZeroDivisionError"}


def test_a_part_that_hangs_is_a_problem_in_time_costs_one_thread_and_is_well_again_when_it_answers():
    opened = threading.Event()
    asked = Readiness({"database": lambda: opened.wait(60) and None}, patience=0.2)
    threads = threading.active_count()
    for _ in range(3):
        start = time.monotonic()
        assert "no answer" in ask(asked)["database"]
        assert time.monotonic() - start < 10
    assert threading.active_count() == threads + 1
    opened.set()
    deadline = time.monotonic() + 30
    while ask(asked) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ask(asked) == {}


def test_many_who_ask_at_once_cost_one_question_a_second():
    asked = []
    probe = Readiness({"store": lambda: asked.append(1)})
    for _ in range(20):
        ask(probe)
    assert len(asked) <= 3


def test_a_server_whose_database_is_frozen_says_so_in_time_though_every_request_thread_waits(
    run_server, hand_made, postgresql, postgresql_url
):
    running = run_server(database_url=postgresql_url)
    url = running.api.url
    running.api.open_task("stuck", hand_made.process_of())
    assert httpx.get(f"{url}/ready", timeout=30).status_code == 200
    devices = [threading.Thread(target=check_in, args=(running.api,)) for _ in range(50)]
    with postgresql.frozen():
        for device in devices:
            device.start()
        time.sleep(1.5)
        start = time.monotonic()
        answer = httpx.get(f"{url}/ready", timeout=60)
        assert time.monotonic() - start < 20
        assert answer.status_code == 503
        assert "no answer" in answer.json()["problems"]["database"]
        assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200
    for device in devices:
        device.join(60)
    running.api.wait(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 200)


def check_in(api):
    with contextlib.suppress(httpx.TransportError):
        api.check_in("stuck")


def test_a_store_is_not_written_to_by_every_probe(run_server, monkeypatch):
    running = run_server()
    monkeypatch.setattr(readiness, "_FRESH_S", 0.0)
    written = []
    store = running.app.state.context.blobs
    put = type(store).put

    def counted(self, bucket, path, *arguments, **options):
        written.append(path)
        return put(self, bucket, path, *arguments, **options)

    monkeypatch.setattr(type(store), "put", counted)
    for _ in range(20):
        assert running.api.http.get(f"{running.api.url}/ready").status_code == 200
    assert written.count(health._PROBE) <= 2


def test_strangers_hear_what_failed_and_not_where_it_lies(run_server, caplog):
    running = run_server(host="0.0.0.0")
    base = f"http://127.0.0.1:{running.settings.port}"
    with running.app.state.context.database.write() as tx:
        tx.exec_driver_sql("DROP TABLE alembic_version")
        tx.exec_driver_sql("DROP TABLE encryption_key")
        tx.exec_driver_sql("DROP TABLE api_key")
    running.api.wait(lambda: httpx.get(f"{base}/ready", timeout=30).status_code == 503)
    assert httpx.get(f"{base}/ready", timeout=30).json()["problems"] == {"database": "the server's log tells why"}
    key = {"x-api-key": "fc_0f0f0f0f0f0f_" + "A" * 43}
    for path, headers in (("/.well-known/odp/v1/public-keys", {}), ("/api/v1/tasks", key)):
        answer = httpx.get(base + path, headers=headers, timeout=30)
        assert answer.status_code >= 500
        assert "table" not in answer.text
        assert answer.headers["x-request-id"] in answer.text
    assert "no such table: encryption_key" in caplog.text
    assert "no such table: api_key" in caplog.text


def test_a_server_with_a_damaged_database_is_alive_and_not_ready(run_server):
    running = run_server()
    url = running.api.url
    assert httpx.get(f"{url}/ready", timeout=30).status_code == 200
    with running.app.state.context.database.write() as tx:
        tx.exec_driver_sql("DROP TABLE alembic_version")
    running.api.wait(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 503)
    assert "database" in httpx.get(f"{url}/ready", timeout=30).json()["problems"]
    assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200


def test_a_change_is_logged_once(caplog):
    problem = ["the disk is full"]
    probe = Readiness({"disk": lambda: problem[0]})
    caplog.set_level("INFO")
    for _ in range(3):
        ask(probe)
    problem[0] = None
    time.sleep(1.1)
    ask(probe)
    ask(probe)
    assert [record.getMessage() for record in caplog.records if "disk" in record.getMessage()] == [
        "not ready: disk: the disk is full",
        "disk does its work again",
    ]
