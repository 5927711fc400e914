"""Requests that mean harm: each gets a typed refusal or a harmless answer, nothing is written, and the server lives."""

import io
import json
import logging
import re
import socket
import time
import urllib.parse
import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from fedcompute.protos import task_assignments_pb2
from fedcompute.server.security.url_signing import Grant, sign_url
from fedcompute.storage.paths import GRADIENT, MODEL

CHECK_IN_BODY = b"\x0a\x03\x0a\x011"
REPORT_BODY = b"\x08\x01"
PROTO = {"content-type": "application/x-protobuf"}

NAMES = [
    "..", ".", "%2e%2e", "%2E%2E%2F%2e%2e%2fetc%2fpasswd", "..%2f..%2f..%2fetc%2fpasswd", "%252e%252e%252f",
    "..%5c..%5c", "..;", "%2e%2e;x", "%c0%ae%c0%ae%c0%af", "%e0%80%ae", "%ef%bc%8e%ef%bc%8e%ef%bc%8f",
    "%u002e%u002e", "a%00b", "%00", "'%20OR%20'1'='1", "1;DROP%20TABLE%20task;--",
    "%27%3B%20DELETE%20FROM%20assignment%3B--", "1%20UNION%20SELECT%201", "%22%29%29%20OR%201%3D1--",
    "a'%7C%7C(SELECT%20version())", "%25s%25s%25n", "{{7*7}}", "$%7Bjndi:ldap://x/a%7D", "a%0d%0aSet-Cookie:%20x=1",
    "a%0aINFO%20forged%20line", "%1b%5b31mred", "%e2%80%ae%e2%80%a8", "%f0%9f%92%a3", "%ff%fe", "a" * 65,
    "a" * 5000, "-1", "+1", "1.0", "1e3", "0x10", "%d9%a1", "%c2%b2", "1_000", "%201", str(2**63), str(2**64),
    "9" * 100, "NaN", "Infinity", "null", "*", "?", "[]", "<script>alert(1)</script>",
]  # fmt: skip
ROUTES = [
    ("POST", "/taskassignment/v1/population/{}:create-task-assignment", CHECK_IN_BODY),
    ("PUT", "/taskassignment/v1/population/{}/task/1/aggregation/1/task-assignment/s:report-result", REPORT_BODY),
    ("PUT", "/taskassignment/v1/population/hostile/task/{}/aggregation/1/task-assignment/s:report-result", REPORT_BODY),
    ("PUT", "/taskassignment/v1/population/hostile/task/1/aggregation/{}/task-assignment/s:report-result", REPORT_BODY),
    ("PUT", "/taskassignment/v1/population/hostile/task/1/aggregation/1/task-assignment/{}:report-result", REPORT_BODY),
    ("POST", "/taskmanagement/v1/population/{}:create-task", b""),
    ("GET", "/taskmanagement/v1/population/{}/tasks/1:get", b""),
    ("GET", "/taskmanagement/v1/population/hostile/tasks/{}:get", b""),
    ("POST", "/taskmanagement/v1/population/hostile/tasks/{}:cancel", b""),
    ("GET", "/api/v1/tasks/{}/1", b""),
    ("GET", "/api/v1/tasks/hostile/{}", b""),
    ("GET", "/api/v1/tasks/hostile/1/checkpoint?iteration={}", b""),
    ("GET", "/api/v1/tasks?population={}", b""),
    ("GET", "/api/v1/tasks?limit={}&after={}", b""),
    ("GET", "/api/v1/{}", b""),
    ("GET", "/blobs/v1/{}/a/1?expires=9999999999&signature=0", b""),
    ("GET", "/blobs/v1/model/{}?expires=9999999999&signature=0", b""),
    ("PUT", "/blobs/v1/gradient/{}/1/1/d/s/gradient?expires=9999999999&signature=0", b"x"),
    ("GET", "/blobs/v1/model/a?expires={}&signature={}", b""),
    ("GET", "/.well-known/{}", b""),
    ("GET", "/{}", b""),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, start_server):
    """A server of its own, in a folder that shows what was written beside its data."""
    return start_server(tmp_path_factory.mktemp("around") / "data")


def ask(server, method, path, body=b"", headers=None):
    """One request as it stands, on a connection of its own: status, headers and body of the answer."""
    fields = {"host": "localhost", "connection": "close", **(PROTO if headers is None else headers)}
    if body:
        fields["content-length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    with socket.create_connection(("127.0.0.1", urlsplit(server.api.url).port), 30) as wire:
        wire.sendall("\r\n".join(lines).encode() + body)
        received = b""
        while part := wire.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 ") == 1, received
    head, _, content = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    answered = dict(line.lower().split(": ", 1) for line in lines)
    assert int(answered["content-length"]) == (len(content) if method != "HEAD" else int(answered["content-length"]))
    return int(status.split()[1]), answered, content


def files_around(server):
    root = server.settings.data_dir.parent
    return {str(path.relative_to(root)) for path in root.rglob("*") if "fedcompute.db" not in path.name}


def is_refused_or_harmless(server, answer):
    status, headers, content = answer
    assert status in (200, 400, 401, 403, 404, 405, 413, 415), (status, content)
    assert "set-cookie" not in headers
    assert b"Traceback" not in content
    assert str(server.settings.data_dir).encode() not in content
    if status != 200:
        document = json.loads(content)
        assert document["code"]
        assert document["message"]


def try_names(server, route):
    """Every name at one place of a path or query."""
    method, pattern, body = route
    for name in NAMES:
        answer = ask(server, method, pattern.replace("{}", name.replace(" ", "%20")), body)
        is_refused_or_harmless(server, answer)
        if answer[0] == 200 and "taskassignment" in pattern:
            message = task_assignments_pb2.CreateTaskAssignmentResponse.FromString(answer[2])
            assert message.HasField("rejection_info"), name


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route[0]} {route[1].split('?')[0]}")
def test_no_name_in_a_path_or_query_gets_anywhere(server, route):
    before = files_around(server)
    try_names(server, route)
    assert files_around(server) == before
    tasks = server.api.http.get(f"{server.api.url}/api/v1/tasks").json()["tasks"]
    assert tasks == []


def test_no_name_gets_anywhere_in_any_route_of_the_application(server):
    """Also those that nobody thought of when the list above was written."""
    seen = 0
    for route in server.app.routes:
        for parameter in route.param_convertors:
            pattern = re.sub(r"\{(\w+)(:\w+)?\}", lambda m, p=parameter: "{}" if m[1] == p else "1", route.path_format)
            for method in sorted(route.methods - {"HEAD"}):
                for name in NAMES[::5]:
                    answer = ask(server, method, pattern.replace("{}", name.replace(" ", "%20")), b"")
                    assert answer[0] < 500, (method, pattern, name, answer[2])
                    seen += 1
    assert seen > 200


def test_no_name_gets_anywhere_with_postgresql_either(run_server, postgresql_url):
    server = run_server(database_url=postgresql_url)
    for route in ROUTES:
        try_names(server, route)
    assert server.api.http.get(f"{server.api.url}/ready").status_code == 200


def test_signed_urls_reach_nothing_but_objects_whatever_name_they_carry(server):
    """Even a valid signature over a hostile path must not leave the store."""
    key = server.app.state.context.url_key
    before = files_around(server)
    paths = [
        "../../../etc/passwd",
        "a/../../b",
        "/etc/passwd",
        "a//b",
        "a/./b",
        "..",
        "a/%2e%2e/b",
        "a\\..\\b",
        "\u2025/x",
    ]
    for method, body in (("GET", b""), ("PUT", b"x")):
        for path in paths:
            for bucket in (MODEL, GRADIENT, "..", "../data"):
                url = sign_url(server.api.url, key, Grant(method, bucket, path, int(time.time()) + 60, {}))
                status, _, content = ask(server, method, url.removeprefix(server.api.url), body, {})
                assert status in (400, 403, 404), (url, status, content)
                assert json.loads(content)["code"] in ("malformed_request", "bad_signature", "not_found")
    assert files_around(server) == before


@pytest.fixture
def upload(server, hand_made):
    """Path, headers and session of a fresh signed upload."""
    population = f"signed-{uuid.uuid4()}"
    server.api.open_task(population, hand_made.process_of(), goal=9, room=9)
    instruction = server.api.upload_instruction(server.api.assignment(population))
    path = instruction.upload_location.removeprefix(server.api.url)
    yield path, dict(instruction.extra_request_headers), population
    server.api.http.post(f"{server.api.url}/taskmanagement/v1/population/{population}/tasks/1:cancel")


def changed(path, name, value):
    place = urlsplit(path)
    query = {**dict(urllib.parse.parse_qsl(place.query)), name: value}
    return f"{place.path}?{urllib.parse.urlencode(query, safe=';')}"


def test_a_signature_holds_for_one_method_one_object_one_time_and_its_headers(server, upload):
    path, headers, population = upload
    tampered = {
        "signature": changed(path, "signature", "0" * 64),
        "no signature": path.partition("&signature=")[0],
        "empty signature": changed(path, "signature", ""),
        "a letter more": path + "0",
        "upper case": changed(
            path, "signature", dict(urllib.parse.parse_qsl(urlsplit(path).query))["signature"].upper()
        ),
        "beyond ascii": changed(path, "signature", "\u0661" * 64),
        "later": changed(path, "expires", str(int(time.time()) + 10_000)),
        "expiry of other digits": changed(path, "expires", "\u0661\u0662"),
        "endless": changed(path, "expires", "9" * 400),
        "other headers": changed(path, "headers", "content-type"),
        "another bucket": path.replace("/gradient/", "/model/", 1),
        "another population": path.replace(population, "another", 1),
        "another task": path.replace(f"{population}/1/", f"{population}/2/", 1),
        "another session": re.sub(r"/d/[^/]+/", f"/d/{uuid.uuid4()}/", path),
        "another file": path.replace("/gradient?", "/other?", 1),
        "two expiries": path + "&expires=9999999999",
    }
    for what, url in tampered.items():
        status, _, content = ask(server, "PUT", url, b"x", headers)
        assert (status, json.loads(content)["code"]) == (403, "bad_signature"), what
    for method in ("GET", "HEAD"):
        assert ask(server, method, path, b"", headers)[0] == 403
    for method in ("POST", "DELETE", "PATCH"):
        assert ask(server, method, path, b"x", headers)[0] == 405
    assert ask(server, "PUT", path, b"x", {**headers, "content-type": "text/html"})[0] == 403
    assert ask(server, "PUT", path, b"x", headers)[0] == 200


def test_an_expired_signature_is_refused_however_often_it_is_sent(server, upload):
    path, headers, _ = upload
    key = server.app.state.context.url_key
    stored = urlsplit(path).path.partition("/gradient/")[2]
    url = sign_url(server.api.url, key, Grant("PUT", GRADIENT, stored, int(time.time()) - 1, headers))
    for _ in range(3):
        status, _, content = ask(server, "PUT", url.removeprefix(server.api.url), b"x", headers)
        assert (status, json.loads(content)["code"]) == (403, "url_expired")


def test_a_forged_session_opens_nothing_and_harms_nobody(server, upload):
    path, _, population = upload
    session = urlsplit(path).path.split("/")[-2]
    base = f"/taskassignment/v1/population/{population}/task/1/aggregation/1/task-assignment"
    near = session[:-1] + ("0" if session[-1] != "0" else "1")
    for forged in (
        near,
        session.upper(),
        session[:8],
        session + "0",
        str(uuid.uuid4()),
        "0",
        "'",
        f"{session}%20",
        f"%20{session}",
    ):
        status, _, content = ask(server, "PUT", f"{base}/{forged}:report-result", REPORT_BODY)
        assert status == 404, forged
        assert session not in content.decode()
        # A failure report about nobody is answered like any other, and fails nobody.
        assert ask(server, "PUT", f"{base}/{forged}:report-result", b"\x08\x02")[0] == 200
    for other in (
        f"{population}-x/task/1/aggregation/1",
        f"{population}/task/2/aggregation/1",
        f"{population}/task/1/aggregation/2",
    ):
        where = f"/taskassignment/v1/population/{other}/task-assignment/{session}:report-result"
        assert ask(server, "PUT", where, REPORT_BODY)[0] == 404
    assert server.api.task(population, 1)["assignments"] == {"LOCAL_COMPLETED": 1}


MALFORMED = [
    b"\x00", b"\xff" * 50, b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", b"\x0b" * 1000, b"\x0c",
    b"\x08" + b"\xff" * 11, b"\x0a\x03\x0a\x01\xff", b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    b"{}", b"<xml/>", b"null", b"PK\x03\x04" + bytes(100), b"\x1f\x8b\x08" + bytes(100),
]  # fmt: skip
VERSIONS = [
    "",
    "1.2",
    "abc",
    "1" * 19,
    "-",
    "--1",
    "+1",
    " 1",
    "1 ",
    "\u0661",
    "0x1",
    "1e9",
    "\n",
    "a" * 10_000,
    "-" + "9" * 18,
]


@pytest.mark.parametrize("route", ROUTES[:2] + ROUTES[5:6], ids=lambda route: route[1])
def test_malformed_messages_are_typed_400s(server, route):
    method, pattern, _ = route
    for body in MALFORMED:
        status, _, content = ask(server, method, pattern.replace("{}", "malformed"), body)
        # Bytes that happen to be a message of unknown fields are one.
        assert status in (200, 400, 404), (body, content)
        if status == 400:
            assert json.loads(content)["code"] in ("malformed_request", "task_invalid")


def test_client_versions_are_64_bit_integers_or_a_typed_400(server):
    for version in VERSIONS:
        message = task_assignments_pb2.CreateTaskAssignmentRequest()
        message.client_version.version_code = version
        message.resource_capabilities.supported_compression_formats.append(1)
        path = "/taskassignment/v1/population/versions:create-task-assignment"
        status, _, content = ask(server, "POST", path, message.SerializeToString())
        fits = version == "" or re.fullmatch(r"-?[0-9]{1,18}", version)
        assert status == (200 if fits else 400), version
        assert len(content) < 1000


def test_unknown_fields_of_newer_clients_are_passed_over(server):
    body = CHECK_IN_BODY + b"\xba\x3e\x03new" + b"\xc0\x3e\x2a"
    assert ask(server, "POST", "/taskassignment/v1/population/newer:create-task-assignment", body)[0] == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/x-protobuf", 200), ("Application/X-Protobuf; charset=utf-8", 200), ("application/json", 415),
        ("text/plain", 415), ("", 415), ("application/x-protobuf, text/html", 415), ("a" * 5000, 415),
    ],
)  # fmt: skip
def test_only_protobuf_is_taken_from_devices(server, content_type, status):
    path = "/taskassignment/v1/population/typed:create-task-assignment"
    assert ask(server, "POST", path, CHECK_IN_BODY, {"content-type": content_type})[0] == status


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"])
def test_a_wrong_verb_is_a_405_with_a_body_and_no_route_redirects(server, method):
    path = "/taskassignment/v1/population/verbs:create-task-assignment"
    status, headers, _ = ask(server, method, path)
    assert status == 405
    assert int(headers["content-length"]) > 0
    status, headers, _ = ask(server, "POST", path + "/", CHECK_IN_BODY)
    assert status == 404
    assert "location" not in headers


TARGETS = [
    "*",
    "//evil.example/x",
    "http://evil.example/healthz",
    "/healthz#x",
    "/%2e%2e/healthz",
    "/./healthz",
    "/healthz/",
]


@pytest.mark.parametrize("target", TARGETS)
def test_odd_request_targets_are_no_route(server, target):
    status, headers, _ = ask(server, "GET", target)
    assert status in (400, 404), target
    assert "evil" not in str(headers)


def test_no_line_of_the_log_can_be_forged(server, caplog):
    with caplog.at_level(logging.DEBUG):
        for name in (
            "a%0aFORGED%20line",
            "a%0d%0aFORGED",
            "%1b%5b2J%1b%5b31mFORGED",
            "%e2%80%a8FORGED",
            "%c2%85FORGED",
            "%00FORGED",
        ):
            ask(server, "POST", f"/taskassignment/v1/population/{name}:create-task-assignment", CHECK_IN_BODY)
            ask(server, "GET", f"/api/v1/tasks/{name}/1")
            ask(server, "PUT", f"/blobs/v1/model/{name}?expires=1&signature=x", b"x", {})
        named = {
            **PROTO,
            "odp-correlation-id": "\x1b[31mFORGED",
            "user-agent": "FORGED\x0b",
            "odp-idempotency-key": "FORGED\x85",
        }
        path = "/taskassignment/v1/population/forged:create-task-assignment"
        ask(server, "POST", path, CHECK_IN_BODY, named)
    formatter = logging.Formatter("%(levelname)s %(message)s")
    lines = io.StringIO("\n".join(formatter.format(record) for record in caplog.records)).read().splitlines()
    assert not [line for line in lines if line.startswith("FORGED")]
    assert not [line for line in lines if "\x1b" in line or "\x85" in line]


def test_header_values_that_are_not_text_do_no_harm(server):
    path = "/taskassignment/v1/population/headers:create-task-assignment"
    for name in (
        "odp-idempotency-key",
        "fcp-owner-id-digest",
        "odp-correlation-id",
        "odp-authorization-key",
        "x-forwarded-for",
    ):
        for value in ("'; DROP TABLE task;--", "a" * 30_000, "\xe9\xff", "[" * 5000, "1 - " + "0" * 300):
            status, _, content = ask(server, "POST", path, CHECK_IN_BODY, {**PROTO, name: value})
            assert status in (200, 400), (name, value[:20], content)


def test_many_connections_that_say_nothing_keep_nobody_out(server):
    idle = [socket.create_connection(("127.0.0.1", urlsplit(server.api.url).port)) for _ in range(300)]
    try:
        for one in idle[::2]:
            one.sendall(b"POST /taskassignment/v1/population/p:create-task-assignment HTTP/1.1\r\nHost: x\r\n")
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: server.api.check_in("busy").status_code, range(50)))
        assert answers == [200] * 50
    finally:
        for one in idle:
            one.close()
