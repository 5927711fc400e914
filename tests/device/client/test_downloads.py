"""Vendor data: which files count, what their values are, how they are asked for."""

import asyncio
import base64
import json
import logging
from types import SimpleNamespace

import pytest
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from fedcompute.device.client.downloads import DOWNLOAD_BYTES_LIMIT, Discarded, Download, fetch_download, parse_download
from fedcompute.device.client.http import Retries, Transport
from fedcompute.errors import DeviceRunFailed, Reason

TOKEN = 7200
ITEM = {"key": "k", "data": "secret value"}


def file(*items, **members):
    return json.dumps({"syncToken": TOKEN, "contents": items or [ITEM], **members}).encode()


def contents(*items):
    found = parse_download(file(*items), None)
    assert isinstance(found, Download), found
    return found.contents


def why(body, stored=None):
    found = parse_download(body, stored)
    assert isinstance(found, Discarded), found
    return found.why


def test_text_and_bytes_are_decoded_by_their_encoding():
    data = base64.b64encode(bytes(range(256))).decode()
    assert contents(
        {"key": "plain", "data": "ä"},
        {"key": "blank", "data": "b", "encoding": " "},
        {"key": "null", "data": "n", "encoding": None},
        {"key": "utf8", "data": "c", "encoding": "UTF8"},
        {"key": "bytes", "data": data, "encoding": "Base64"},
        {"key": "", "data": ""},
    ) == {
        "plain": "ä".encode(),
        "blank": b"b",
        "null": b"n",
        "utf8": b"c",
        "bytes": bytes(range(256)),
        "": b"",
    }


def test_items_without_key_or_data_or_in_another_encoding_are_skipped():
    kept = {"key": "k", "data": "v", "unknown": [1]}
    skipped = [{"data": "v"}, {"key": "a"}, {"key": "b", "data": None}, {"key": "c", "data": "v", "encoding": "utf-16"}]
    assert contents(*skipped, kept) == {"k": b"v"}


def test_of_equal_keys_the_last_counts():
    assert contents({"key": "k", "data": "1"}, {"key": "j", "data": "2"}, {"key": "k", "data": "3"})["k"] == b"3"


@pytest.mark.parametrize("data", ["A", "AA=", "AAAA\n", "AA-_", "ä", "====", "AAAAA"])
def test_bad_base64_fails_the_whole_file(data):
    reason = why(file(ITEM, {"key": "x", "data": data, "encoding": "base64"}))
    assert reason == "item 1 is not base64"


@pytest.mark.parametrize(
    ("token", "stored", "counts"),
    [
        *((0, None, True), (3600, None, True), (3600, 0, True), (7200, 3600, True), (7200, 7199, True)),
        *((7200, 7200, False), (3600, 7200, False), (0, 0, False), (3601, None, False), (3599, 0, False)),
    ],
)
def test_the_token_is_a_multiple_of_3600_above_the_stored_one(token, stored, counts):
    found = parse_download(file(syncToken=token), stored)
    assert isinstance(found, Download) == counts
    assert getattr(found, "sync_token", token) == token


@pytest.mark.parametrize("token", [None, "3600", 3600.0, True, -3600, 1 << 63, 10**400, [3600]])
def test_a_token_that_is_no_long_discards_the_file(token):
    assert "types" in why(file(syncToken=token))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"syncToken":3600',
        b'{"syncToken":3600}',
        b'{"syncToken":3600,"contents":null}',
        b'{"syncToken":3600,"contents":[]}',
        b'{"syncToken":3600,"contents":{}}',
        b'{"syncToken":3600,"contents":["k"]}',
        b'{"syncToken":3600,"contents":[{"key":5,"data":"v"}]}',
        b'{"syncToken":3600,"contents":[{"key":"k","data":["secret value"]}]}',
        b'{"syncToken":3600,"contents":[{"key":"k"}]}',
        b'{"syncToken":3600,"contents":[{"key":"k","data":"\\ud800"}]}',
        b'{"syncToken":3600,"contents":[{"key":"k","data":"\xff"}]}',
        b'{"contents":[{"key":"k","data":"secret value"}]}',
        b'{"syncToken":3600,"x":' + b"[" * 100_000,
        b"\x1f\x8b",
    ],
)
def test_anything_else_discards_the_file_and_says_nothing_of_its_contents(body):
    assert "secret" not in why(body)


@pytest.fixture
def vendor(serve):
    """A server of vendor data: `url`, `answers` by path, the `asked` paths with their queries."""
    vendor = SimpleNamespace(answers={}, asked=[])

    async def answer(request):
        vendor.asked.append(request.url.path + (f"?{request.url.query}" if request.url.query else ""))
        return vendor.answers.get(request.url.path, Response(file()))

    with serve([Route("/{rest:path}", answer)]) as url:
        vendor.url = url
        yield vendor


def fetch(url, stored=None):
    async def run():
        async with Transport(retries=Retries(delay=0.001)) as transport:
            return await fetch_download(transport, url, stored)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "stored", "asked"),
    [
        ("/data", None, "/data"),
        ("/data", 0, "/data?syncToken=0"),
        ("/data?a=b", 3600, "/data?a=b&syncToken=3600"),
        ("/data?a=%2F&sig=x%3D", 3600, "/data?a=%2F&sig=x%3D&syncToken=3600"),
        ("/data?", 3600, "/data?syncToken=3600"),
        ("/data?a&", 3600, "/data?a&syncToken=3600"),
        ("/data#part", 3600, "/data?syncToken=3600"),
        ("/data?a=b#part?", 3600, "/data?a=b&syncToken=3600"),
        ("", 3600, "/?syncToken=3600"),
    ],
)
def test_the_stored_token_joins_the_urls_query(vendor, path, stored, asked):
    assert fetch(vendor.url + path, stored) == Download(TOKEN, {"k": b"secret value"})
    assert vendor.asked == [asked]


def test_a_file_that_does_not_count_is_no_error(vendor):
    assert isinstance(fetch(vendor.url, TOKEN), Discarded)


def test_a_redirect_leads_to_the_file(vendor):
    vendor.answers["/old"] = RedirectResponse("/new")
    assert isinstance(fetch(f"{vendor.url}/old"), Download)


@pytest.mark.parametrize("status", [204, 304, 404, 500])
def test_only_200_and_201_bring_a_file(vendor, status):
    vendor.answers = {"/x": Response(None if status in (204, 304) else file(), status), "/y": Response(file(), 201)}
    with pytest.raises(DeviceRunFailed, match=f"vendor data: the server answers {status}") as caught:
        fetch(f"{vendor.url}/x")
    assert caught.value.reason is Reason.SERVER_ANSWER_INVALID
    assert isinstance(fetch(f"{vendor.url}/y"), Download)


def test_a_file_over_20_mb_is_refused(vendor):
    vendor.answers = {"/x": Response(file() + b" " * DOWNLOAD_BYTES_LIMIT)}
    with pytest.raises(DeviceRunFailed, match="more than 20000000 bytes"):
        fetch(f"{vendor.url}/x")


@pytest.mark.parametrize("url", ["http://example.org/data", "http://127.0.0.1:1/", "file:///etc/passwd", ""])
def test_urls_that_are_neither_https_nor_localhost_are_refused(url):
    with pytest.raises(DeviceRunFailed) as caught:
        fetch(url, 0)
    assert caught.value.reason is Reason.URL_NOT_ALLOWED


def test_nothing_of_a_file_is_logged(vendor, caplog):
    with caplog.at_level(logging.INFO):
        fetch(f"{vendor.url}/data?signature=secret")
    assert "secret" not in caplog.text
