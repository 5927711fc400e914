from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.security.url_signing import Grant, check_url, sign_url

KEY = bytes(range(32))
HEADERS = {"content-type": "application/octet-stream", "content-encoding": "gzip"}


def grant(method="PUT", path="pop:a.b/1/1/d/s/gradient", expires=1_000, headers=HEADERS):
    return Grant(method, "gradient", path, expires, headers)


def check(url, *, method="PUT", headers=HEADERS, now=999.0, key=KEY, path=None, bucket=None, query=None):
    parts = urlsplit(url)
    _, _, _, url_bucket, url_path = unquote(parts.path).split("/", 4)
    return check_url(
        key,
        method=method,
        bucket=bucket or url_bucket,
        path=path or url_path,
        query=dict(parse_qsl(parts.query), **(query or {})),
        headers=headers,
        now=now,
    )


def refused(reason, url, **changes):
    with pytest.raises(RequestRejected) as caught:
        check(url, **changes)
    assert caught.value.reason is reason
    assert "signature=" not in str(caught.value)


def test_a_signed_url_grants_what_was_signed():
    url = sign_url("http://localhost:1", KEY, grant())
    assert url.startswith("http://localhost:1/blobs/v1/gradient/pop:a.b/1/1/d/s/gradient?")
    assert check(url) == grant()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "GET"},
        {"path": "pop:a.b/1/1/d/t/gradient"},
        {"bucket": "model"},
        {"key": bytes(32)},
        {"headers": {"content-type": "application/octet-stream"}},
        {"headers": {**HEADERS, "content-encoding": "identity"}},
        {"query": {"expires": "2000"}},
        {"query": {"expires": "١٢"}},
        {"query": {"expires": "9" * 5000}},
        {"query": {"headers": ""}},
        {"query": {"signature": "ü"}},
        {"query": {"signature": ""}},
    ],
)
def test_a_url_changed_in_any_part_is_refused(changes):
    refused(Reason.BAD_SIGNATURE, sign_url("http://localhost:1", KEY, grant()), **changes)


def test_an_expired_url_says_so():
    refused(Reason.URL_EXPIRED, sign_url("http://localhost:1", KEY, grant()), now=1_001.0)


def test_header_values_cannot_be_moved_between_fields():
    one = sign_url("", KEY, grant(headers={"a": "bc"}))
    two = sign_url("", KEY, grant(headers={"ab": "c"}))
    assert one.rpartition("=")[2] != two.rpartition("=")[2]
