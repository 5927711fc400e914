"""The transport against a real server: what is tried again, what is refused, what is sent."""

import asyncio
import gzip
import logging

import httpx
import pytest
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from fedcompute.device.client.http import Retries, Transport, check_url, join_url
from fedcompute.errors import DeviceRunFailed, Reason

FAST = Retries(delay=0.001)


@pytest.fixture
def script(serve):
    """`with script(answer, ...) as (url, requests):` answers the n-th request with the n-th answer, then the last."""
    from contextlib import contextmanager

    @contextmanager
    def run(*answers):
        requests = []

        async def answer(request):
            requests.append((request.method, dict(request.headers), await request.body()))
            return answers[min(len(requests), len(answers)) - 1]

        with serve([Route("/{rest:path}", answer, methods=["GET", "POST", "PUT"])]) as url:
            yield f"{url}/it", requests

    return run


def send(url, method="GET", **keywords):
    async def one():
        async with Transport(retries=FAST) as transport:
            return await transport.request(method, url, what="test", **keywords)

    return asyncio.run(one())


@pytest.mark.parametrize("status", [204, 206, 302, 400, 404, 409, 429, 500, 503])
def test_any_status_but_200_and_201_is_tried_three_times_in_all(script, status):
    with script(Response(b"", status)) as (url, requests):
        response = send(url, "PUT", body=b"body", headers={"a": "b"})
    assert (response.status, response.ok, len(requests)) == (status, False, 3)
    assert [body for _, _, body in requests] == [b"body"] * 3
    assert all(headers["a"] == "b" for _, headers, _ in requests)


@pytest.mark.parametrize("status", [200, 201])
def test_success_ends_the_attempts(script, status):
    with script(Response(b"no", 500), Response(b"yes", status)) as (url, requests):
        response = send(url)
    assert (response.ok, response.body, len(requests)) == (True, b"yes", 2)


@pytest.mark.parametrize("status", [401, 403])
def test_an_authorization_failure_is_not_tried_again(script, status):
    with script(Response(b"challenge", status)) as (url, requests):
        response = send(url, "POST", body=b"x")
    assert (response.status, response.body, len(requests)) == (status, b"challenge", 1)


def test_an_error_without_a_body_is_an_empty_body(script):
    with script(Response(None, 500)) as (url, _):
        assert send(url).body == b""


def test_a_server_that_is_not_there_is_tried_three_times_and_named_by_what_was_asked():
    with pytest.raises(DeviceRunFailed, match=r"test: ConnectError after 3 attempts") as caught:
        send("http://localhost:1/secret-path?signature=abc")
    assert caught.value.reason is Reason.SERVER_UNREACHABLE
    assert "secret" not in str(caught.value)


def test_a_gzip_body_arrives_as_it_was_sent(script):
    packed = gzip.compress(b"plain")
    with script(Response(packed, headers={"Content-Encoding": "gzip"})) as (url, requests):
        response = send(url, headers={"accept-encoding": "gzip"})
    assert response.body == packed
    assert response.headers["content-encoding"] == "gzip"
    assert requests[0][1]["accept-encoding"] == "gzip"


def test_no_header_is_set_that_the_protocol_does_not_name(script):
    with script(Response(b"")) as (url, requests):
        send(url)
        send(url, "POST", body=b"123")
    assert set(requests[0][1]) == {"host", "connection", "user-agent"}
    assert set(requests[1][1]) == {"host", "connection", "user-agent", "content-length"}
    assert requests[1][1]["content-length"] == "3"


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "Host"])
def test_a_header_that_the_client_owns_is_refused_before_anything_is_sent(script, name):
    with script(Response(b"")) as (url, requests), pytest.raises(DeviceRunFailed) as caught:
        send(url, "PUT", body=b"x", headers={name: "5"})
    assert caught.value.reason is Reason.SERVER_ANSWER_INVALID
    assert requests == []


@pytest.mark.parametrize("value", ["a\r\nb: c", "ä\u4e16"])
def test_a_header_value_that_cannot_be_sent_is_refused(script, value):
    with script(Response(b"")) as (url, _), pytest.raises(DeviceRunFailed) as caught:
        send(url, "PUT", body=b"x", headers={"a": value})
    assert caught.value.reason is Reason.SERVER_ANSWER_INVALID


def test_an_answer_over_the_limit_is_refused_at_once(script):
    with script(Response(b"x" * 101)) as (url, requests):
        assert len(send(url, limit=101).body) == 101
        with pytest.raises(DeviceRunFailed, match="more than 100 bytes") as caught:
            send(url, limit=100)
    assert caught.value.reason is Reason.SERVER_ANSWER_INVALID
    assert len(requests) == 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_get_follows_redirects_and_a_post_or_put_does_not(serve, status):
    async def moved(request):
        return RedirectResponse("/new", status)

    async def new(request):
        return Response(b"here")

    methods = ["GET", "POST", "PUT"]
    with serve([Route("/old", moved, methods=methods), Route("/new", new, methods=methods)]) as url:
        assert send(f"{url}/old").body == b"here"
        for method in ("POST", "PUT"):
            assert send(f"{url}/old", method, body=b"x").status == status


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/x", "http://example.com/"])
def test_a_redirect_leads_to_allowed_urls_only(script, target):
    with script(RedirectResponse(target, 302)) as (url, requests), pytest.raises(DeviceRunFailed) as caught:
        send(url)
    assert caught.value.reason is Reason.URL_NOT_ALLOWED
    assert len(requests) == 1


def test_redirects_in_a_circle_end(script):
    with script(RedirectResponse("/it", 302)) as (url, requests):
        assert send(url).status == 302
    assert len(requests) == 3 * 21


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080/",
        "http://localhost/",
        "http://localhost.evil.org:80/",
        "ftp://localhost:1",
        "",
        "file:///etc",
    ],
)
def test_only_https_and_localhost_with_a_port_are_allowed(url):
    with pytest.raises(DeviceRunFailed) as caught:
        check_url(url, "test")
    assert caught.value.reason is Reason.URL_NOT_ALLOWED


def test_urls_join_with_one_slash_and_no_escaping():
    assert join_url("https://a/b/", "/c d:e") == "https://a/b/c d:e"
    assert join_url("https://a//", "c") == "https://a//c"


def test_no_url_is_logged(script, caplog):
    with caplog.at_level(logging.INFO), script(Response(b"")) as (url, _):
        send(f"{url}?signature=secret")
    assert "secret" not in caplog.text


def test_a_slow_answer_ends_with_the_read_timeout(serve):
    async def slow(request):
        await asyncio.sleep(0.5)
        return Response(b"")

    async def one(url):
        async with Transport(read_timeout=0.05, retries=Retries(attempts=1)) as transport:
            await transport.request("GET", url, what="test")

    with serve([Route("/", slow)]) as url, pytest.raises(DeviceRunFailed, match=httpx.ReadTimeout.__name__):
        asyncio.run(one(f"{url}/"))
