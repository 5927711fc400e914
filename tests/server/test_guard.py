import re
from datetime import timedelta

import httpx
import pytest

from fedcompute.protos import task_pb2
from fedcompute.server.api.guard import is_open
from fedcompute.server.api.operations import OPERATIONS
from fedcompute.server.context import now
from fedcompute.server.security.operators import is_loopback
from fedcompute.storage.api_keys import Role, create_api_key, revoke_api_key

GUARDED = [one for one in OPERATIONS if one.role is not None]
PROTO = {"content-type": "application/x-protobuf"}


def make_key(running, role, **options):
    with running.app.state.context.database.write() as tx:
        return create_api_key(tx, Role(role), f"{role}'s key", now(), **options)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def call(running, operation, **options):
    path = re.sub(r"{\w+}", "1", operation.path)
    return httpx.request(operation.method, f"http://127.0.0.1:{running.settings.port}{path}", **options)


def refused(response, status, code):
    assert response.status_code == status, response.text
    document = response.json()
    assert document["code"] == code
    assert document["message"]
    assert document["remedy"]
    return response


@pytest.fixture(scope="module")
def public(tmp_path_factory, start_server):
    """A server that listens on every network."""
    return start_server(tmp_path_factory.mktemp("public"), host="0.0.0.0")


@pytest.fixture(scope="module")
def private(tmp_path_factory, start_server):
    """A server that listens on this machine's own address."""
    return start_server(tmp_path_factory.mktemp("private"))


@pytest.mark.parametrize("operation", GUARDED, ids=lambda one: f"{one.method} {one.path}")
def test_no_management_route_of_a_public_server_answers_without_a_key(public, operation):
    response = refused(call(public, operation), 401, "api_key_missing")
    assert response.headers["www-authenticate"].startswith("Bearer ")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "localhost:8080", "[::1]", ""])
def test_no_host_header_opens_a_public_server(public, host):
    refused(call(public, GUARDED[0], headers={"host": host}), 401, "api_key_missing")


@pytest.mark.parametrize("path", ["/", "/dashboard", "/api", "/api/v2/tasks", "//api/v1/tasks", "/ready/", "/docs"])
def test_what_no_route_is_for_needs_a_key_too(public, path):
    refused(httpx.get(f"http://127.0.0.1:{public.settings.port}{path}"), 401, "api_key_missing")


@pytest.mark.parametrize(
    "path",
    [
        "/taskassignment/../api/v1/tasks",
        "/blobs/..%2fapi/v1/tasks",
        "/.well-known/../api/v1/tasks",
        "/healthz/../api/v1/tasks",
    ],
)
def test_a_path_that_begins_like_a_devices_reaches_no_management_route(public, path):
    # Sent as it is: a client library would resolve the dots.
    request = httpx.Request("GET", f"http://127.0.0.1:{public.settings.port}/")
    with httpx.HTTPTransport() as transport:
        request.url = request.url.copy_with(raw_path=path.encode())
        response = transport.handle_request(request)
        response.read()
    assert response.status_code in (400, 401, 403, 404)
    assert b'tasks"' not in response.content


def test_devices_and_orchestrators_need_no_key(public):
    base = f"http://127.0.0.1:{public.settings.port}"
    assert httpx.get(f"{base}/healthz").status_code == 200
    assert httpx.get(f"{base}/ready").status_code == 200
    assert httpx.get(f"{base}/.well-known/odp/v1/public-keys").status_code == 200
    assert public.api.check_in("nobody").status_code == 200
    assert httpx.get(f"{base}/blobs/v1/model/nobody/1/0/s/0/plan").status_code == 403


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("operation", GUARDED, ids=lambda one: f"{one.method} {one.path}")
def test_a_role_opens_exactly_the_routes_of_the_table(public, role, operation):
    _, key = make_key(public, role)
    response = call(public, operation, headers=bearer(key))
    order = list(Role)
    if order.index(role) >= order.index(operation.role):
        assert response.status_code not in (401, 403, 405), response.text
    else:
        response = refused(response, 403, "role_insufficient")
        assert "insufficient_scope" in response.headers["www-authenticate"]
        assert operation.role.value in response.json()["message"]


def test_a_key_that_is_wrong_expired_or_revoked_opens_nothing(public):
    _, good = make_key(public, "operator")
    _, expiring = make_key(public, "operator", expires=now() + timedelta(milliseconds=50))
    revoked, ended = make_key(public, "operator")
    with public.app.state.context.database.write() as tx:
        assert revoke_api_key(tx, revoked.id, now())
        assert not revoke_api_key(tx, revoked.id, now())
    public.api.wait(lambda: call(public, GUARDED[0], headers=bearer(expiring)).status_code == 401)
    other = "A" if good[-2] != "A" else "B"
    tasks = next(one for one in GUARDED if one.name == "task.list")
    assert call(public, tasks, headers=bearer(good)).status_code == 200
    for text in (
        good[:-2] + other + good[-1], good + "x", good[:-1], good.upper(), good.replace("fc_", "fd_"),
        expiring, ended, "fc_", "fc__", "x" * 5000, f"{good} {good}",
    ):  # fmt: skip
        response = refused(call(public, tasks, headers=bearer(text)), 401, "api_key_invalid")
        assert "invalid_token" in response.headers["www-authenticate"]
        assert good not in response.text
    refused(call(public, tasks, auth=("user", good)), 401, "api_key_invalid")


def test_a_key_travels_in_its_own_header_beside_the_token_of_a_gateway(public):
    _, key = make_key(public, "viewer")
    tasks = next(one for one in GUARDED if one.name == "task.list")
    assert call(public, tasks, headers={"x-api-key": key, "authorization": "Bearer eyJ0eXAi"}).status_code == 200


def test_a_machines_own_programs_need_no_key(private):
    assert private.api.http.get(f"{private.api.url}/api/v1/caller").json() == {"actor": "loopback", "role": "operator"}


def test_a_wrong_key_is_refused_also_where_none_is_needed(private):
    refused(call(private, GUARDED[0], headers=bearer("fc_0f0f0f0f0f0f_" + "A" * 43)), 401, "api_key_invalid")


def test_a_setting_demands_keys_on_the_machines_own_address(start_server, tmp_path):
    running = start_server(tmp_path, require_api_keys=True)
    tasks = next(one for one in GUARDED if one.name == "task.list")
    refused(call(running, tasks), 401, "api_key_missing")
    _, key = make_key(running, "viewer")
    assert call(running, tasks, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example.com"},
        {"host": "192.0.2.7:8080"},
        {"host": "localhost.example.com"},
        {"host": ""},
        {"host": "[::1]example.com"},
        {"host": "example.com\\@localhost"},
        {"host": "localhost/example.com"},
        {"host": "localhost?example.com"},
        {"x-forwarded-for": "192.0.2.7"},
        {"x-forwarded-port": "443"},
        {"x-client-ip": "192.0.2.7"},
        {"cf-connecting-ip": "192.0.2.7"},
        {"true-client-ip": "192.0.2.7"},
        {"forwarded": "for=192.0.2.7"},
        {"via": "1.1 proxy"},
    ],
)
def test_a_proxy_or_a_rebound_name_is_not_this_machine(private, headers):
    tasks = next(one for one in GUARDED if one.name == "task.list")
    refused(call(private, tasks, headers=headers), 401, "api_key_missing")
    _, key = make_key(private, "viewer")
    assert call(private, tasks, headers={**headers, **bearer(key)}).status_code == 200


@pytest.mark.parametrize(
    "published", [{"public_url": "https://learn.example.com"}, {"trusted_proxies": "127.0.0.1"}], ids=str
)
def test_a_server_that_strangers_reach_through_a_proxy_asks_for_keys_though_the_proxy_leaves_no_trace(
    start_server, tmp_path, published
):
    # Some proxies hand on requests with this machine's own name as their host and no header of their own.
    running = start_server(tmp_path, **published)
    tasks = next(one for one in GUARDED if one.name == "task.list")
    refused(call(running, tasks), 401, "api_key_missing")
    _, key = make_key(running, "viewer")
    assert call(running, tasks, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example.com"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize(
    "operation", [one for one in GUARDED if one.changes], ids=lambda one: f"{one.method} {one.path}"
)
def test_a_page_of_another_origin_changes_nothing_on_the_machine_it_is_shown_on(private, operation, headers):
    refused(call(private, operation, headers=headers), 403, "foreign_origin")


def test_a_page_of_the_servers_own_origin_may_change_something(private):
    cancel = next(one for one in GUARDED if one.name == "task.cancel")
    origin = {"origin": f"http://127.0.0.1:{private.settings.port}", "sec-fetch-site": "same-origin"}
    refused(call(private, cancel, headers=origin), 404, "not_found")


def test_only_who_may_upload_artifacts_sees_where_they_go(public):
    _, viewer = make_key(public, "viewer")
    _, builder = make_key(public, "builder")
    url = f"http://127.0.0.1:{public.settings.port}/taskmanagement/v1/population/unopened"
    task = task_pb2.Task(
        total_iteration=1,
        min_aggregation_size=1,
        max_aggregation_size=1,
        min_client_version="0",
        max_client_version="1",
    )
    body = task_pb2.CreateTaskRequest(task=task).SerializeToString()
    refused(
        httpx.post(f"{url}:create-task", content=body, headers={**PROTO, **bearer(viewer)}), 403, "role_insufficient"
    )
    created = httpx.post(f"{url}:create-task", content=body, headers={**PROTO, **bearer(builder)})
    assert created.status_code == 200, created.text
    task_id = task_pb2.CreateTaskResponse.FromString(created.content).task.task_id
    for key, shown in ((viewer, 0), (builder, 1)):
        response = httpx.get(f"{url}/tasks/{task_id}:get", headers=bearer(key))
        assert len(task_pb2.GetTaskByIdResponse.FromString(response.content).task.server_phase_url) == shown


def test_a_builder_may_take_back_a_task_that_never_opened_and_no_other(start_server, tmp_path, hand_made):
    running = start_server(tmp_path)
    _, builder = make_key(running, "builder")
    base = f"{running.api.url}/api/v1/tasks"
    opened = running.api.open_task("open", hand_made.process_of())
    refused(httpx.post(f"{base}/open/{opened}/cancel", headers=bearer(builder)), 403, "role_insufficient")
    assert running.api.task("open", opened)["task"]["status"] == "OPEN"
    created = running.api.create_task("unopened").task_id
    response = httpx.post(f"{base}/unopened/{created}/cancel", headers=bearer(builder))
    assert response.json()["task"]["status"] == "CANCELED"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("localhost", True), ("LOCALHOST.", True), ("box.localhost", True), ("127.0.0.1", True), ("127.9.9.9", True),
        ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("::", False), ("", False), ("192.168.0.1", False),
        ("localhost.example.com", False), ("127.0.0.1.example.com", False), ("2130706433", False), ("127.1", False),
    ],
)  # fmt: skip
def test_only_names_that_can_be_nothing_else_are_this_machine(name, own):
    assert is_loopback(name) is own


@pytest.mark.parametrize("path", ["/readyz", "/ready/x", "/blobs", "/taskassignment", "/healthz/", "/.well-known"])
def test_a_path_is_open_only_if_it_is_a_devices_whole_name(path):
    assert not is_open(path)
