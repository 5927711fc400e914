"""Signing in with a key, and what each role finds on the pages and may do there."""

import httpx
import pytest

from fedcompute.server.context import now
from fedcompute.storage.api_keys import Role, create_api_key, revoke_api_key
from fedcompute.storage.database import Database


@pytest.fixture(scope="module")
def locked(serve):
    with serve(require_api_keys=True) as one:
        yield one


@pytest.fixture(scope="module")
def keys(locked):
    """Role -> key."""
    with locked.app.state.context.database.write() as tx:
        return {role: create_api_key(tx, role, role.value, now())[1] for role in Role}


@pytest.fixture
def sign_in(window, locked, keys):
    def sign(role, page="/"):
        window.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        window.open(locked.settings.base_url + page)
        assert window.driver.current_url.startswith(f"{locked.settings.base_url}/login")
        window.run("document.getElementById('key').value = arguments[0]", keys[role])
        window.run("document.querySelector('main form').requestSubmit()")
        window.wait(lambda: "/login" not in window.driver.current_url)
        window.settled()

    return sign


@pytest.fixture
def open_task(locked, keys, hand_made):
    """An open task of a population of its own; returns its path."""

    def opened(population):
        locked.api.http.headers["authorization"] = f"Bearer {keys[Role.OPERATOR]}"
        return f"/tasks/{population}/{locked.api.open_task(population, hand_made.process_of(), goal=2)}"

    return opened


def buttons(window):
    return set(window.run("return [...document.querySelectorAll('#head .button')].map(one => one.innerText)"))


def test_a_visitor_is_asked_for_a_key_and_led_to_where_they_wanted(window, sign_in):
    sign_in(Role.VIEWER, "/tasks/quickstart/1?before=3")
    assert window.driver.current_url.endswith("/tasks/quickstart/1?before=3")
    assert window.text(".who") == "viewer"


def test_a_wrong_key_is_refused_in_words(window, locked):
    window.open(f"{locked.settings.base_url}/login")
    window.run("document.getElementById('key').value = 'fc_000000000000_nothing'")
    window.run("document.querySelector('main form').requestSubmit()")
    window.wait(lambda: window.text("#problem"))
    assert "not one of this server" in window.text("#problem")
    assert all("401" in one for one in window.complaints())


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Role.VIEWER, set()),
        (Role.BUILDER, {"Clone"}),
        (Role.OPERATOR, {"Clone", "Pause", "Cancel"}),
    ],
)
def test_buttons_are_there_for_who_may_press_them(window, sign_in, open_task, role, expected):
    sign_in(role, open_task(f"buttons-{role.value}"))
    assert buttons(window) == expected


def test_who_may_not_press_is_refused_also_without_a_button(window, sign_in, open_task, locked):
    path = open_task("refused")
    sign_in(Role.VIEWER, path)
    cookie = window.driver.get_cookie("fedcompute_session")
    for verb in ("pause", "cancel", "clone"):
        answer = httpx.post(
            f"{locked.settings.base_url}{path}/{verb}",
            cookies={cookie["name"]: cookie["value"]},
            headers={"origin": locked.settings.base_url, "accept": "text/html"},
        )
        assert answer.status_code == 403
        assert "needs the role" in answer.text
    assert locked.api.task("refused", 1)["task"]["status"] == "OPEN"


def test_an_operator_pauses_goes_on_cancels_and_clones(window, sign_in, open_task, locked):
    sign_in(Role.OPERATOR, open_task("pressed"))
    window.click("Pause")
    window.wait(lambda: "paused" in window.text("#head"))
    window.click("Go on")
    window.wait(lambda: "open" in window.text("#head"))
    window.click("Cancel")
    window.wait(lambda: window.text("h1") == "Cancel task pressed/1?")
    assert locked.api.task("pressed", 1)["task"]["status"] == "OPEN"
    window.click("Cancel the task")
    window.wait(lambda: "canceled" in window.text("#head"))
    window.click("Clone")
    window.wait(lambda: window.text("h1") == "Clone task pressed/1?")
    window.click("Clone the task")
    window.wait(lambda: window.text("h1").endswith("task 2"))
    acts = locked.api.http.get(f"{locked.settings.base_url}/api/v1/audit").json()["acts"]
    names = [act["action"] for act in acts if act["subject"].startswith("pressed/")]
    assert names[:4] == ["task.clone", "task.cancel", "task.resume", "task.pause"]


def test_a_session_ends_with_its_key_and_when_it_is_closed(window, sign_in, locked, keys):
    sign_in(Role.VIEWER, "/")
    window.run("document.querySelector('form[action=\"/logout\"]').requestSubmit()")
    window.wait(lambda: "/login" in window.driver.current_url)
    assert window.driver.get_cookie("fedcompute_session") is None
    sign_in(Role.VIEWER, "/")
    database: Database = locked.app.state.context.database
    with database.write() as tx:
        assert revoke_api_key(tx, keys[Role.VIEWER].split("_")[1], now())
    window.driver.get(f"{locked.settings.base_url}/system")
    assert "/login" in window.driver.current_url
