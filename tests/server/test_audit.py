import httpx
from sqlalchemy import text

from fedcompute.server.context import now
from fedcompute.storage.api_keys import Role, create_api_key


def make_key(running, role):
    with running.app.state.context.database.write() as tx:
        return create_api_key(tx, Role(role), f"{role}'s key", now())


def acts_of(running, **query):
    response = running.api.http.get(f"{running.api.url}/api/v1/audit", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def test_every_change_tells_who_did_what_to_what_and_how_it_went(run_server, hand_made):
    running = run_server()
    api = running.api
    stored, key = make_key(running, "operator")
    task_id = api.open_task("audited", hand_made.process_of())
    base = f"{api.url}/api/v1/tasks/audited/{task_id}"
    headers = {"authorization": f"Bearer {key}"}
    answers = [
        httpx.post(f"{base}/pause", headers=headers),
        httpx.post(f"{base}/pause", headers=headers),
        httpx.post(f"{base}/resume", headers=headers),
        httpx.put(
            f"{api.url}/api/v1/populations/audited/budget",
            json={"epsilon": 5, "delta": 1e-6, "assumption": "CLAIMED"},
            headers=headers,
        ),
        httpx.post(f"{base}/cancel", headers=headers),
        httpx.post(f"{base}/clone", headers=headers),
        httpx.post(f"{api.url}/api/v1/tasks/audited/999/cancel", headers=headers),
    ]
    acts = list(reversed(acts_of(running)["acts"]))
    me = f"{stored.id} (operator's key)"
    assert [(act["actor"], act["role"], act["action"], act["subject"], act["status"]) for act in acts] == [
        ("loopback", "operator", "task.create", "audited/1", 200),
        (me, "operator", "task.pause", "audited/1", 200),
        (me, "operator", "task.pause", "audited/1", 409),
        (me, "operator", "task.resume", "audited/1", 200),
        (me, "operator", "budget.set", "audited", 200),
        (me, "operator", "task.cancel", "audited/1", 200),
        (me, "operator", "task.clone", "audited/1 -> audited/2", 201),
        (me, "operator", "task.cancel", "audited/999", 404),
    ]
    assert [act["request_id"] for act in acts[1:]] == [answer.headers["x-request-id"] for answer in answers]
    assert sorted(acts, key=lambda act: act["time"]) == acts


def test_who_is_refused_is_in_the_log_and_no_secret_ever_is(run_server, caplog):
    running = run_server(require_api_keys=True)
    _, operator = make_key(running, "operator")
    viewer, key = make_key(running, "viewer")
    wrong = f"{key[:-1]}{'A' if key[-1] != 'A' else 'B'}"
    url = f"{running.api.url}/api/v1"
    with caplog.at_level("DEBUG"):
        httpx.post(f"{url}/tasks/p/1/cancel")
        httpx.get(f"{url}/tasks", headers={"authorization": f"Bearer {wrong}"})
        httpx.delete(f"{url}/populations/p/budget", headers={"x-api-key": key})
        made = httpx.post(
            f"{url}/api-keys", json={"label": "new", "role": "viewer"}, headers={"authorization": f"Bearer {operator}"}
        )
        response = httpx.get(f"{url}/audit", headers={"authorization": f"Bearer {operator}"})
    new = made.json()
    told = [
        (act["actor"], act["role"], act["action"], act["subject"], act["status"]) for act in response.json()["acts"]
    ]
    assert list(reversed(told)) == [
        ("anonymous", "none", "task.cancel", "p/1", 401),
        ("anonymous", "none", "task.list", "", 401),
        (f"{viewer.id} (viewer's key)", "viewer", "budget.remove", "p", 403),
        (told[0][0], "operator", "api_key.create", f"{new['api_key']['id']} (new) viewer", 201),
    ]
    assert made.headers["cache-control"] == "no-store"
    database = (running.settings.data_dir / "fedcompute.db").read_bytes()
    log = (running.settings.data_dir / "fedcompute.db-wal").read_bytes()
    for text_of_key in (operator, key, wrong, new["key"]):
        secret = text_of_key[-20:]
        assert secret not in caplog.text
        assert secret not in response.text
        assert secret.encode() not in database + log


def test_a_change_that_cannot_be_written_down_does_not_happen(run_server, hand_made):
    running = run_server()
    task_id = running.api.open_task("unaudited", hand_made.process_of())
    with running.app.state.context.database.write() as tx:
        tx.execute(text("DROP TABLE audit_log"))
    response = running.api.http.post(f"{running.api.url}/api/v1/tasks/unaudited/{task_id}/cancel")
    assert response.status_code == 500
    assert running.api.task("unaudited", task_id)["task"]["status"] == "OPEN"


def test_strangers_cannot_fill_the_log(run_server):
    running = run_server(require_api_keys=True)
    _, key = make_key(running, "operator")
    with httpx.Client() as client:
        for _ in range(130):
            assert client.post(f"{running.api.url}/api/v1/tasks/p/1/cancel").status_code == 401
    viewer, shown = make_key(running, "viewer")
    tried = httpx.delete(f"{running.api.url}/api/v1/populations/p/budget", headers={"x-api-key": shown})
    assert tried.status_code == 403
    response = httpx.get(f"{running.api.url}/api/v1/audit?limit=1000", headers={"x-api-key": key})
    newest, *acts = response.json()["acts"]
    assert 60 <= len(acts) <= 120
    # What the holder of a key tries is not lost among them.
    assert (newest["actor"], newest["action"]) == (f"{viewer.id} (viewer's key)", "budget.remove")


def test_the_log_is_read_page_by_page_and_by_operators_alone(run_server):
    running = run_server()
    for _ in range(7):
        running.api.http.post(f"{running.api.url}/api/v1/tasks/paged/1/cancel")
    whole = acts_of(running)["acts"]
    assert len(whole) == 7
    found, after = [], None
    while True:
        page = acts_of(running, limit=3, **({"after": after} if after else {}))
        found += page["acts"]
        after = page["next"]
        if after is None:
            break
        assert len(page["acts"]) == 3
    assert found == whole
    _, key = make_key(running, "builder")
    response = httpx.get(f"{running.api.url}/api/v1/audit", headers={"x-api-key": key})
    assert response.status_code == 403


def test_a_name_made_to_look_like_another_row_stays_one_subject(run_server):
    running = run_server()
    running.api.http.post(f"{running.api.url}/api/v1/tasks/a%0a2026%20task.cancel{'x' * 500}/1/cancel")
    (act,) = acts_of(running)["acts"]
    assert act["subject"].startswith("a?2026 task.cancel")
    assert len(act["subject"]) == 256
