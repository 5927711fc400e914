"""What the privacy and system pages say, against the ledger and the doctor."""

import time

import httpx
import pytest

from fedcompute.protos import learning_pb2
from fedcompute.server.context import now
from fedcompute.storage import schema
from fedcompute.storage.api_keys import Role, create_api_key

HTML = {"accept": "text/html"}


@pytest.fixture(scope="module")
def spent(start_server, hand_made, tmp_path_factory):
    """A server with a task of two private rounds and a budget."""
    running = start_server(tmp_path_factory.mktemp("spent"))
    process = hand_made.process_of(learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=4.0, report_goal=2))
    api = running.api
    task_id = api.open_task("spent", process, goal=2, room=2, rounds=2)
    budget = {"epsilon": 9.0, "delta": 1e-6}
    assert api.http.put(f"{api.url}/api/v1/populations/spent/budget", json=budget).status_code == 200
    for number in (1, 2):
        for _ in range(2):
            api.contribute("spent", hand_made.update_of(process, [0.1 * one for one in hand_made.initial]))
        api.wait_for("spent", task_id, "COMPLETED", number)
    return running


def page(running, path, **headers):
    return httpx.get(running.api.url + path, headers={**HTML, **headers})


def ledger(running):
    return running.api.http.get(f"{running.api.url}/api/v1/populations/spent/ledger").json()["entries"]


def test_the_ledger_on_the_page_is_the_ledger(spent):
    text = page(spent, "/privacy/spent").text
    entries = ledger(spent)
    assert len(entries) == 4
    for entry in entries:
        assert entry["hash"] in text
    last = entries[-1]["cumulative_epsilon"]
    assert f"{last:,.4g}" in text
    assert f"{9.0 - last:,.4g}" in text
    chart = httpx.get(f"{spent.api.url}/charts/privacy/spent").json()
    assert chart["series"][0]["y"] == [entry["cumulative_epsilon"] for entry in entries]
    assert chart["series"][1]["y"] == [9.0, 9.0]


def test_a_broken_chain_is_told(spent):
    assert "The chain is whole" in page(spent, "/privacy/spent?verify=1").text
    database = spent.app.state.context.database
    entry = schema.privacy_ledger.c
    mine = (entry.population_name == "spent") & (entry.sequence == 2)
    with database.write() as tx:
        tx.execute(schema.privacy_ledger.update().where(mine).values(contributions=7))
    try:
        assert "The ledger does not hold" in page(spent, "/privacy/spent?verify=1").text
    finally:
        with database.write() as tx:
            tx.execute(schema.privacy_ledger.update().where(mine).values(contributions=2))


def test_the_report_of_a_task_is_a_page_of_its_own_to_keep(spent):
    answer = page(spent, "/privacy/spent/tasks/1/report")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="privacy_spent_1.html"'
    assert "The chain is whole" in answer.text
    assert "<script" not in answer.text
    assert page(spent, "/privacy/spent/tasks/9/report").status_code == 404
    assert page(spent, "/privacy/nobody").status_code == 404


def test_a_page_that_has_not_changed_is_not_sent_again(spent):
    for path in ("/privacy", "/privacy/spent", "/compare", "/"):
        first = page(spent, path)
        again = page(spent, path, **{"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b""), path


def test_what_is_stuck_is_told_in_full_to_operators_alone(start_server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("open")
    directory.chmod(0o755)
    running = start_server(directory, require_api_keys=True)
    with running.app.state.context.database.write() as tx:
        keys = {role: create_api_key(tx, role, role.value, now())[1] for role in (Role.VIEWER, Role.OPERATOR)}
    texts = {}
    for role, key in keys.items():
        deadline = time.monotonic() + 10
        while "data readable" not in texts.get(role, "") and time.monotonic() < deadline:
            texts[role] = page(running, "/system", authorization=f"Bearer {key}").text
        assert "data readable" in texts[role]
    assert "has mode 755" in texts[Role.OPERATOR]
    assert "require_api_keys" in texts[Role.OPERATOR]
    for words in ("has mode", str(directory), "require_api_keys"):
        assert words not in texts[Role.VIEWER]
