"""Tokens of a metadata server, an OAuth server and an IAM service, all on loopback."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from fedcompute.builder.identity import id_token_header
from fedcompute.errors import BuildFailed, Reason

ENDPOINT = "https://builder.example.org/taskbuilder/v1:build-task-group"


@pytest.fixture
def google(monkeypatch, tmp_path):
    """`asked`: (path, query, headers, body) of every request; `answers`: path ending -> answer, None for a 403."""

    class Handler(BaseHTTPRequestHandler):
        asked: list = []  # noqa: RUF012
        answers = {  # noqa: RUF012
            "/identity": "TOKEN-1\n",
            "default/token": '{"access_token": "TOKEN-2"}',
            "/oauth": '{"access_token": "TOKEN-3"}',
            ":generateIdToken": '{"token": "TOKEN-4"}',
        }

        def do_GET(self):
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.asked.append((parts.path, parse_qs(parts.query), headers, body))
            answer = next(text for ending, text in self.answers.items() if parts.path.endswith(ending))
            self.send_response(200 if answer is not None else 403)
            self.end_headers()
            self.wfile.write(("denied" if answer is None else answer).encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_): ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    monkeypatch.setenv("IAM_CREDENTIALS_URL", f"http://{address}")
    monkeypatch.setenv("OAUTH_TOKEN_URL", f"http://{address}/oauth")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_token_in_any_log(caplog):
    caplog.set_level(logging.DEBUG)
    yield
    assert "TOKEN-" not in caplog.text
    assert "SECRET" not in caplog.text


def test_the_metadata_servers_token_is_made_for_the_whole_endpoint(google):
    assert id_token_header(ENDPOINT) == {"authorization": "Bearer TOKEN-1"}
    ((path, query, headers, _),) = google.asked
    assert path.endswith("/service-accounts/default/identity")
    assert query == {"audience": [ENDPOINT]}
    assert headers["metadata-flavor"] == "Google"


@pytest.mark.parametrize("url", ["http://localhost:5000/x", "http://127.0.0.1:1/x", "http://[::1]:1/x"])
def test_this_machines_own_services_get_no_token(google, url):
    assert id_token_header(url) == {}
    assert not google.asked


@pytest.mark.parametrize("answer", [None, "", "two lines\nof text", "x" * 70_000])
def test_without_a_usable_token_there_is_no_header(google, monkeypatch, answer):
    monkeypatch.setitem(google.answers, "/identity", answer)
    assert id_token_header(ENDPOINT) == {}


def test_without_a_metadata_server_there_is_no_header(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    assert id_token_header(ENDPOINT) == {}


def test_an_impersonated_accounts_token_has_its_email_and_comes_with_the_machines_credentials(google):
    header = id_token_header(ENDPOINT, "builder@project.iam.gserviceaccount.com")
    assert header == {"authorization": "Bearer TOKEN-4"}
    path, _, headers, body = google.asked[-1]
    assert path == "/v1/projects/-/serviceAccounts/builder@project.iam.gserviceaccount.com:generateIdToken"
    assert json.loads(body) == {"audience": ENDPOINT, "includeEmail": True}
    assert headers["authorization"] == "Bearer TOKEN-2"


def test_a_persons_credentials_come_before_the_machines(google, monkeypatch, tmp_path):
    file = tmp_path / "adc.json"
    file.write_text(json.dumps({"type": "authorized_user", "client_id": "c", "client_secret": "SECRET",
                                "refresh_token": "SECRET2"}))  # fmt: skip
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert id_token_header(ENDPOINT, "a@b.example") == {"authorization": "Bearer TOKEN-4"}
    assert parse_qs(google.asked[0][3])["refresh_token"] == ["SECRET2"]
    assert google.asked[1][2]["authorization"] == "Bearer TOKEN-3"


@pytest.mark.parametrize("broken", ["default/token", ":generateIdToken"])
def test_a_refused_impersonation_is_an_error_that_names_the_account_and_no_token(google, monkeypatch, broken):
    monkeypatch.setitem(google.answers, broken, None)
    with pytest.raises(BuildFailed) as caught:
        id_token_header(ENDPOINT, "a@b.example")
    assert caught.value.reason == Reason.SETTINGS_INVALID
    assert "TOKEN-" not in str(caught.value)


def test_what_is_no_account_is_refused_before_any_request(google):
    with pytest.raises(BuildFailed, match="no service account"):
        id_token_header(ENDPOINT, "a@b/../../x")
    assert not google.asked
