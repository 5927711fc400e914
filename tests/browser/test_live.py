"""A page that is open when something happens, and names that would like to be more than names."""

import threading
import time
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote

import pytest

from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import record_metrics


@pytest.fixture(scope="module")
def running(serve):
    with serve() as one:
        yield one


def announces(window, words):
    return words in window.run("return document.getElementById('announcement').textContent")


def draws(window, rounds):
    charts = [lines for address, lines in window.charts().items() if "accuracy" in address]
    return charts and charts[0] and charts[0][0]["x"] == rounds


def test_a_round_that_ends_is_on_the_page_within_two_seconds(window, running, hand_made):
    process = hand_made.process_of()
    task_id = running.api.open_task("live", process, goal=2, rounds=3)
    window.open(f"{running.settings.base_url}/tasks/live/{task_id}")
    assert "No round" not in window.text("#rounds")
    update = hand_made.update_of(process, hand_made.initial)
    for number in (1, 2):
        devices = [threading.Thread(target=running.api.contribute, args=("live", update)) for _ in range(2)]
        for device in devices:
            device.start()
        window.wait(partial(announces, window, f"Round {number} released"))
        seen = time.time()
        for device in devices:
            device.join()
        one = next(one for one in running.api.task("live", task_id)["iterations"] if one["iteration_id"] == number)
        assert seen - datetime.fromisoformat(one["completed"]).timestamp() < 2.0
        # The chart follows with its point.
        window.wait(partial(draws, window, list(range(1, number + 1))), 2)
    assert window.text(".live") == "live"


def test_a_server_that_is_gone_is_told_and_comes_back(window, serve):
    with serve() as one:
        window.open(f"{one.settings.base_url}/")
        window.wait(lambda: window.text(".live") == "live")
    window.wait(lambda: window.text(".live") == "no answer from the server")
    assert "quickstart" in window.text()
    # What the browser itself says of a server that is not there is no fault of the page.
    assert all("ERR_CONNECTION_REFUSED" in one for one in window.complaints())


def test_names_are_words_and_never_markup(window, running, hand_made):
    name = "a'&b;(alert)"
    task_id = running.api.open_task(name, hand_made.process_of(), goal=2)
    evil = "x/<img src=x onerror=\"document.title='stolen'\"><b>bold{{7*7}}&lt;"
    with running.app.state.context.database.write() as tx:
        for number in (1, 2):
            metrics = {evil: 0.5, "accuracy</script><script>": 1.0}
            record_metrics(tx, IterationKey(name, task_id, number), metrics, datetime.now(UTC))
    place = quote(name, safe="")
    task = f"{place}/{task_id}"
    for page in (f"/tasks/{task}", f"/populations/{place}", f"/compare?run={task}", f"/privacy/{place}", "/"):
        window.open(running.settings.base_url + page)
        window.see_all()
        assert "stolen" not in window.run("return document.title")
        assert window.run("return document.querySelectorAll('main img, main b, main script').length") == 0
        assert window.run("return document.querySelectorAll('.plot a, .plot image').length") == 0
        assert "49" not in window.text("h3")
    window.open(f"{running.settings.base_url}/tasks/{place}/{task_id}")
    window.see_all()
    titles = window.run("return [...document.querySelectorAll('[data-chart] h3')].map(one => one.textContent)")
    assert any(one.lower().endswith("<b>bold{{7*7}}&lt;") for one in titles)
