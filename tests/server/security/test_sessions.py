"""Browser sessions: what a cookie opens, for how long, and what a page of another origin can do with it."""

from datetime import timedelta

import httpx
import pytest

from fedcompute.server.context import now
from fedcompute.server.security.sessions import session_value
from fedcompute.storage.api_keys import Role, create_api_key

PAUSE = "/tasks/digits/1/pause"


@pytest.fixture
def locked(run_server):
    """A server that asks for keys, a key's text, and the cookie that it was given for it."""
    running = run_server(require_api_keys=True)
    with running.app.state.context.database.write() as tx:
        key, text = create_api_key(tx, Role.OPERATOR, "me", now())
    answer = httpx.post(f"{running.settings.base_url}/login", data={"key": text, "next": "/system"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/system")
    return running, key, answer.headers["set-cookie"]


def ask(running, value, path="/", method="GET", **headers):
    cookie = {"cookie": f"fedcompute_session={value}"}
    return httpx.request(method, running.settings.base_url + path, headers={"accept": "text/html", **cookie, **headers})


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites_and_is_not_the_key(locked):
    _, _, cookie = locked
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "fc_" not in cookie


def test_a_session_opens_pages_until_it_is_twelve_hours_old_or_changed(locked):
    running, key, cookie = locked
    value = cookie.partition("=")[2].partition(";")[0]
    secret = running.app.state.context.session_key
    assert ask(running, value).status_code == 200
    assert ask(running, session_value(secret, key.id, now() - timedelta(hours=11))).status_code == 200
    for bad in (
        session_value(secret, key.id, now() - timedelta(hours=13)),
        session_value(secret, key.id, now() + timedelta(hours=1)),
        session_value(b"another secret", key.id, now()),
        value[:-1] + ("0" if value[-1] != "0" else "1"),
        value.replace(key.id, "0" * 12),
        "",
        "x" * 9000,
    ):
        answer = ask(running, bad)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/")


def test_a_page_of_another_origin_changes_nothing_with_the_session(locked, hand_made):
    running, _, cookie = locked
    value = cookie.partition("=")[2].partition(";")[0]
    own = running.settings.base_url
    for headers in (
        {},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": own.replace("http", "https") + "0"},
        {"origin": own, "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        answer = ask(running, value, PAUSE, "POST", **headers)
        assert (answer.status_code, "foreign_origin" in answer.text) == (403, True), headers
    # There is no such task; that it is asked at all is what counts.
    assert ask(running, value, PAUSE, "POST", origin=own).status_code == 404


@pytest.mark.parametrize(
    "following", ["//evil.example", "https://evil.example", "/\\evil.example", "/x\r\nset-cookie: a=b", "evil", ""]
)
def test_signing_in_leads_nowhere_else(locked, following):
    running, _, _ = locked
    with running.app.state.context.database.write() as tx:
        _, text = create_api_key(tx, Role.VIEWER, "you", now())
    answer = httpx.post(f"{running.settings.base_url}/login", data={"key": text, "next": following})
    assert answer.headers["location"] == "/"
    assert "set-cookie: a" not in str(answer.headers)


def test_signing_in_and_out_and_a_wrong_key_are_in_the_audit_log(locked):
    running, key, cookie = locked
    value = cookie.partition("=")[2].partition(";")[0]
    url = running.settings.base_url
    assert httpx.post(f"{url}/login", data={"key": "fc_000000000000_x"}).status_code == 401
    assert httpx.post(f"{url}/login", content=b"x" * 5000).status_code == 413
    out = ask(running, value, "/logout", "POST", origin=url)
    assert (out.status_code, "Max-Age=0" in out.headers["set-cookie"]) == (303, True)
    acts = httpx.get(f"{url}/api/v1/audit", cookies={"fedcompute_session": value}).json()["acts"]
    told = [(act["action"], act["status"]) for act in acts]
    assert told == [("session.close", 303), ("session.open", 413), ("session.open", 401), ("session.open", 303)]
    assert acts[0]["actor"] == acts[-1]["actor"] == f"{key.id} (me)"


def test_a_program_without_a_key_hears_of_it_in_json(locked):
    running, _, _ = locked
    for path in ("/", "/api/v1/tasks", "/charts/service/rate"):
        answer = httpx.get(running.settings.base_url + path)
        assert (answer.status_code, answer.json()["code"]) == (401, "api_key_missing")


def test_cookies_of_other_programs_do_not_end_a_session(locked):
    running, _, cookie = locked
    value = cookie.partition("=")[2].partition(";")[0]
    for other in ('theme={"dark":true}', "flag", "x=a b", "a@b=1"):
        headers = {"cookie": f"{other}; fedcompute_session={value}; {other}", "accept": "text/html"}
        assert httpx.get(running.settings.base_url, headers=headers).status_code == 200


def test_another_kind_of_authorization_is_refused_in_words_and_leaves_the_sign_in_page_open(locked):
    running, _, _ = locked
    url, headers = running.settings.base_url, {"authorization": "Basic eDp5", "accept": "text/html"}
    assert httpx.get(f"{url}/login", headers=headers).status_code == 200
    assert httpx.get(f"{url}/static/dashboard.css", headers=headers).status_code == 200
    answer = httpx.get(url, headers=headers)
    assert (answer.status_code, "api_key_invalid" in answer.text) == (401, True)


def test_strangers_fill_no_log_by_signing_in_and_out(locked):
    running, _, cookie = locked
    url = running.settings.base_url
    for _ in range(80):
        assert httpx.post(f"{url}/login", data={"key": "wrong"}).status_code == 401
        assert httpx.get(url, headers={"accept": "text/html"}).status_code == 303
    value = cookie.partition("=")[2].partition(";")[0]
    found = httpx.get(f"{url}/api/v1/audit?limit=1000", cookies={"fedcompute_session": value}).json()["acts"]
    assert len([act for act in found if act["actor"] == "anonymous"]) <= 2 * 60


def test_another_site_cannot_sign_anybody_out(locked):
    running, _, _ = locked
    answer = httpx.post(f"{running.settings.base_url}/logout", headers={"sec-fetch-site": "cross-site"})
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


def test_nothing_for_operators_is_kept_by_a_cache(locked):
    running, _, cookie = locked
    value = cookie.partition("=")[2].partition(";")[0]
    for path in ("/api/v1/tasks", "/metrics", "/api/v1/openapi.json"):
        answer = ask(running, value, path)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        assert answer.headers["x-content-type-options"] == "nosniff"
