"""What the privacy and system pages say, against the ledger and the doctor."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import unescape
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import select

from fedcompute.monitoring.pages import privacy
from fedcompute.privacy.budget import Budget, BudgetAssumption, spent_of
from fedcompute.privacy.charges import releases
from fedcompute.privacy.ledger_document import budget_document
from fedcompute.protos import learning_pb2, task_pb2
from fedcompute.server.context import now
from fedcompute.storage import schema
from fedcompute.storage.api_keys import Role, create_api_key
from fedcompute.storage.tasks import cancel_task, create_task

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


@contextmanager
def changed(running, sequence, **values):
    """An entry of the ledger with other values, until the end of the block."""
    table, database = schema.privacy_ledger, running.app.state.context.database
    mine = (table.c.population_name == "spent") & (table.c.sequence == sequence)
    with database.write() as tx:
        before = tx.execute(select(*(table.c[name] for name in values)).where(mine)).one()._asdict()
        tx.execute(table.update().where(mine).values(values))
    try:
        yield
    finally:
        with database.write() as tx:
            tx.execute(table.update().where(mine).values(before))


def some_task(tx, population):
    task = task_pb2.Task(
        population_name=population,
        total_iteration=3,
        min_aggregation_size=2,
        max_aggregation_size=5,
        min_client_version="0",
        max_client_version="99",
    )
    return create_task(tx, task, now()).key


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
    with changed(spent, 2, contributions=7):
        assert "The ledger does not hold" in page(spent, "/privacy/spent?verify=1").text


def test_a_chain_is_verified_again_for_who_asks_again(spent):
    # Browsers ask with the tag of what they keep; this they may not keep.
    assert page(spent, "/privacy/spent?verify=1").headers["cache-control"] == "no-store"


def test_an_entry_that_is_shown_and_does_not_follow_is_told_without_being_asked(spent):
    assert "These entries follow from each other" in page(spent, "/privacy/spent").text
    with changed(spent, 3, contributions=7):
        assert "entry 3 was changed" in page(spent, "/privacy/spent").text
        # Those before it hold, and are judged alone.
        assert "These entries follow from each other" in page(spent, "/privacy/spent?before=3").text
    assert "No entry is older." in page(spent, "/privacy/spent?before=1").text


def test_what_is_left_is_counted_as_the_budget_is_enforced(spent):
    api, address = spent.api, f"{spent.api.url}/api/v1/populations/spent/budget"
    context = spent.app.state.context
    try:
        for delta, assumption in ((1e-10, BudgetAssumption.CLAIMED), (1e-6, BudgetAssumption.NO_AMPLIFICATION)):
            budget = Budget(9.0, delta, assumption)
            assert api.http.put(address, json=budget_document(budget)).status_code == 200
            with context.database.read() as tx:
                enforced = spent_of(budget, releases(context.accounts.spending(tx, "spent").spent))
            text = page(spent, "/privacy/spent").text
            assert f"<dt>Left of the budget</dt><dd>{9.0 - enforced:,.4g} <small>{enforced:,.4g} spent" in text
            # Its entries are at another delta or under other assumptions: no line to compare them with.
            assert len(httpx.get(f"{api.url}/charts/privacy/spent").json()["series"]) == 1
    finally:
        assert api.http.put(address, json={"epsilon": 9.0, "delta": 1e-6}).status_code == 200


def test_a_budget_before_the_first_task_has_a_page(spent):
    budget = {"epsilon": 2.0, "delta": 1e-6}
    assert spent.api.http.put(f"{spent.api.url}/api/v1/populations/planned/budget", json=budget).status_code == 200
    text = page(spent, "/privacy/planned").text
    assert "<dt>Left of the budget</dt><dd>2 " in text
    assert "The ledger is empty" in text


def test_a_page_is_sent_again_after_a_task_or_budget_of_it_has_changed(spent):
    with spent.app.state.context.database.write() as tx:
        key = some_task(tx, "moving")
    paths = ("/privacy", "/privacy?after=movi", "/privacy/moving")

    def sent(tags):
        answers = [page(spent, path, **{"if-none-match": tag}) for path, tag in zip(paths, tags, strict=True)]
        return [answer.status_code for answer in answers], [answer.headers["etag"] for answer in answers]

    _, tags = sent(["", "", ""])
    with spent.app.state.context.database.write() as tx:
        assert cancel_task(tx, key, now())
    codes, tags = sent(tags)
    assert codes == [200, 200, 200]
    budget = {"epsilon": 2.0, "delta": 1e-6}
    assert spent.api.http.put(f"{spent.api.url}/api/v1/populations/moving/budget", json=budget).status_code == 200
    codes, tags = sent(tags)
    assert codes == [200, 200, 200]
    assert sent(tags)[0] == [304, 304, 304]


def test_a_command_to_copy_quotes_the_name(spent):
    name = "a;$(reboot)"
    with spent.app.state.context.database.write() as tx:
        some_task(tx, name)
    text = unescape(page(spent, f"/privacy/{quote(name, safe='')}").text)
    assert "--population 'a;$(reboot)' --epsilon" in text
    assert f"--population {name}" not in text


def test_reports_that_wait_for_each_other_keep_nobody_else_waiting(spent, monkeypatch):
    done = threading.Event()
    # A report that takes as long as the test wants; real ones take a minute only over thousands of entries.
    monkeypatch.setattr(privacy, "_report", lambda *_: "late" if done.wait(30) else "never")
    with ThreadPoolExecutor(45) as callers:
        reports = [callers.submit(page, spent, "/privacy/spent/tasks/1/report") for _ in range(45)]
        try:
            time.sleep(1)
            for path in ("/", "/.well-known/odp/v1/public-keys"):
                assert page(spent, path).status_code == 200
        finally:
            done.set()
        assert {report.result().text for report in reports} == {"late"}


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
