"""The client of the management API against a server that answers what a test wants."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.operator_api import OperatorApi

KEY = "fc_0f0f0f0f0f0f_" + "s" * 43


@pytest.fixture
def answering():
    """`answering(page)`: URL of a server that answers `page(query)` as JSON, and the Authorization headers it saw."""
    started = []

    def start(page):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.headers["authorization"])
                query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
                body = json.dumps(page(query)).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_): ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://localhost:{server.server_port}", seen

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_list_is_followed_to_its_last_page(answering):
    def page(query):
        first = int(query.get("after", 0))
        return {"tasks": [{"task_id": first + 1}], "next": str(first + 1) if first < 4 else None}

    url, seen = answering(page)
    assert [one["task_id"] for one in OperatorApi(url, KEY).tasks()] == [1, 2, 3, 4, 5]
    assert seen == [f"Bearer {KEY}"] * 5


@pytest.mark.parametrize(
    "page",
    [
        lambda query: {"tasks": [{}], "next": "same"},
        lambda query: {"tasks": [], "next": query.get("after", "") + "x"},
        lambda query: {"tasks": "many", "next": None},
        lambda query: [],
    ],
)
def test_a_list_that_does_not_end_or_is_none_is_no_answer(answering, page):
    url, _ = answering(page)
    with pytest.raises(OperationFailed) as failed:
        OperatorApi(url).tasks()
    assert failed.value.reason is Reason.SERVER_ANSWER_INVALID


def test_only_as_much_of_the_audit_log_is_read_as_was_asked_for(answering):
    url, seen = answering(lambda query: {"acts": [{}] * int(query["limit"]), "next": query.get("after", "") + "x"})
    assert len(OperatorApi(url).audit(2500)) == 2500
    assert len(seen) == 3


@pytest.mark.parametrize("key", ["", "two words", "line\nfeed", "é", "x" * 257])
def test_what_no_header_may_hold_is_refused_without_being_repeated(key):
    with pytest.raises(OperationFailed) as failed:
        OperatorApi("http://localhost:1", key)
    assert failed.value.reason is Reason.SETTINGS_INVALID
    assert not key or key not in str(failed.value)
