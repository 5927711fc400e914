"""The system's page: what is stuck, with the way to it, and what the server stands on."""

import re
from datetime import timedelta
from html import unescape

import httpx
import pytest
from sqlalchemy import update

from fedcompute.monitoring.pages.attention import attention
from fedcompute.server.context import now
from fedcompute.storage import schema


@pytest.fixture(scope="module")
def running(start_server, tmp_path_factory, hand_made):
    """A server whose data directory is closed, with a round that has collected for two days."""
    directory = tmp_path_factory.mktemp("system")
    directory.chmod(0o700)
    one = start_server(directory)
    one.api.open_task("a&b", hand_made.process_of(), goal=3)
    with one.app.state.context.database.write() as tx:
        old = update(schema.iteration).where(schema.iteration.c.population_name == "a&b")
        tx.execute(old.values(status_time=now() - timedelta(days=2)))
    return one


def page(one, **headers):
    return httpx.get(f"{one.settings.base_url}/system", headers={"accept": "text/html", **headers})


def found(one, words):
    """The page, once it says so; looks are made behind it."""

    def said():
        answer = page(one)
        return answer if words in answer.text else None

    return one.api.wait(said)


def test_a_finding_leads_to_its_round_and_says_what_to_do(running):
    text = found(running, "round below goal").text
    assert '<a href="/tasks/a%26b/1/rounds/1">a&amp;b/1/1/0</a>' in text
    assert "has collected for 2 days and has 0 of 3 contributions" in text
    assert "let more devices check in" in text
    assert attention(running.app.state.context) >= 1


def test_the_round_under_way_is_listed_with_its_age(running):
    row = re.search(r"<tr><td><a[^>]*>[^<]*round 1</a>.*?</tr>", page(running).text)[0]
    assert "collecting" in row
    assert re.search(r"<td class=\"number\">2 d</td>", row)


def test_a_file_system_is_listed_once_however_many_folders_lie_on_it(running):
    (place,) = re.findall(r"<dt>free at ([^<]*)", page(running).text)
    assert unescape(place) == str(running.settings.data_dir)


def test_the_page_says_when_it_was_looked_and_is_sent_again_when_that_changes(running):
    first = found(running, "Looked at")
    assert "once in 15 seconds while somebody looks" in first.text
    changed = running.api.wait(
        lambda: (
            answer if (answer := page(running, **{"if-none-match": first.headers["etag"]})).status_code == 200 else None
        ),
        10,
    )
    assert changed.headers["etag"] != first.headers["etag"]
