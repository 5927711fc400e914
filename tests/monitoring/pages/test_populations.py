"""The first page: what runs, in which population."""

import re
from html import unescape

import httpx
import pytest

from fedcompute.monitoring.pages.populations import POPULATIONS, TASKS_EACH
from fedcompute.protos import task_pb2
from fedcompute.server.context import now
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.releases import record_metrics
from fedcompute.storage.tasks import cancel_task, create_task


@pytest.fixture(scope="module")
def running(start_server, tmp_path_factory):
    return start_server(tmp_path_factory.mktemp("populations"))


@pytest.fixture(scope="module")
def database(running):
    return running.app.state.context.database


@pytest.fixture(scope="module")
def page(running):
    """Asks for a page; returns the answer."""

    def ask(path="/", **headers):
        return running.api.http.get(running.settings.base_url + path, headers={"accept": "text/html", **headers})

    return ask


def words(answer):
    """What a page says, without its markup."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", answer.text)))


def tile(answer, name):
    found = re.search(rf"<dt>{name}</dt><dd>([\d,]+)</dd>", answer.text)
    return int(found[1].replace(",", ""))


def ended_task(tx, population):
    """A task without a round that nobody waits for."""
    task = task_pb2.Task(
        population_name=population,
        total_iteration=3,
        min_aggregation_size=2,
        max_aggregation_size=5,
        min_client_version="0",
        max_client_version="999999999",
    )
    key = create_task(tx, task, now()).key
    assert cancel_task(tx, key, now())
    return key


def test_a_server_without_any_task_says_how_to_make_one(start_server, tmp_path):
    one = start_server(tmp_path / "data")
    answer = httpx.get(f"{one.settings.base_url}/")
    assert answer.status_code == 200
    for command in ("fedcompute task build", "fedcompute fleet run", "fedcompute quickstart"):
        assert command in answer.text
    assert "<dl" not in answer.text


def test_the_tiles_and_the_tasks_are_those_of_the_api(running, page, hand_made):
    before = page()
    process = hand_made.process_of()
    task_id = running.api.open_task("shown", process, goal=2, rounds=2)
    update = hand_made.update_of(process, hand_made.initial)
    for _ in range(2):
        running.api.contribute("shown", update)
    running.api.wait_for("shown", task_id, "COMPLETED", 1)
    running.api.wait_for("shown", task_id, "COLLECTING", 2)
    running.api.contribute("shown", update)
    running.api.assignment("shown")
    both = {"ASSIGNED": 1, "UPLOAD_COMPLETED": 1}
    running.api.wait(lambda: running.api.task("shown", task_id)["iterations"][1]["assignments"] == both)
    answer = page()
    gained = {
        name: tile(answer, name) - (tile(before, name) if "<dl" in before.text else 0)
        for name in ("Populations", "Active tasks", "Rounds released in the last day", "Devices with an assignment")
    }
    assert list(gained.values()) == [1, 1, 1, 1]
    view = running.api.task("shown", task_id)
    said = words(answer)
    assert "1 of 2 contributions" in said
    metric = next(one for one in view["metrics"] if one["name"].endswith("accuracy"))
    assert f"sparse categorical accuracy {metric['value']:,.4g}" in said
    assert f'href="/tasks/shown/{task_id}"' in answer.text


def test_a_page_that_did_not_change_is_not_sent_again_and_one_that_did_is(page, database):
    first = page()
    again = page(**{"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    with database.write() as tx:
        ended_task(tx, "changed")
    changed = page(**{"if-none-match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.headers["etag"] != first.headers["etag"]


def test_active_tasks_come_first_and_the_others_are_counted(running, page, database, hand_made):
    with database.write() as tx:
        ended = [ended_task(tx, "busy").task_id for _ in range(TASKS_EACH + 2)]
    active = running.api.open_task("busy", hand_made.process_of(), goal=2)
    with database.write() as tx:
        record_metrics(tx, IterationKey("busy", ended[0], 1), {"x/loss": 0.25}, now())
    answer = page("/?after=bus")
    card = answer.text[answer.text.index("/populations/busy") :].partition("</article>")[0]
    shown = [int(found) for found in re.findall(r'href="/tasks/busy/(\d+)"', card)]
    assert shown == [active, *sorted(ended, reverse=True)[: TASKS_EACH - 1]]
    assert f"all {len(ended) + 1} tasks" in card


def test_many_populations_are_paged_and_each_is_on_one_page(page, database):
    names = [f"paged-{number:02}" for number in range(POPULATIONS + 3)]
    with database.write() as tx:
        for name in names:
            ended_task(tx, name)
    found, address = [], "/"
    while address:
        answer = page(address)
        assert answer.status_code == 200
        here = re.findall(r'<h2 class="name"><a href="/populations/([^"]+)"', answer.text)
        assert 0 < len(here) <= POPULATIONS
        found += here
        more = re.search(r'href="(/\?after=[^"]+)">More', answer.text)
        address = more and more[1]
    assert len(found) == len(set(found))
    assert set(names) <= set(found)
    behind = page("/?after=zzzz")
    assert "no population behind zzzz" in words(behind)
    assert "First populations" in behind.text


def test_a_name_is_text_wherever_it_stands(page, database):
    name = "'&;(alert)=$"
    with database.write() as tx:
        key = ended_task(tx, name)
        record_metrics(tx, IterationKey(name, key.task_id, 1), {"a/<b>loss": 1.0}, now())
    answer = page("/?after=%26")
    assert "<b>" not in answer.text
    assert "&#39;&amp;;(alert)=$" in answer.text
    assert 'href="/populations/%27%26%3B%28alert%29%3D%24"' in answer.text
    assert page("/populations/%27%26%3B%28alert%29%3D%24").status_code == 200
    echoed = page("/?after=<script>~~~")
    assert "<script>~" not in echoed.text
