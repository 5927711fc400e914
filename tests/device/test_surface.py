"""Tokens of surfaces and URLs of events: what their own device makes of them, and what it makes of others."""

import base64
import re

import msgspec
import pytest

from fedcompute.crypto.secret_box import seal_secret
from fedcompute.device.developer.errors import Status
from fedcompute.device.isolation.worker_call import WorkerFailed
from fedcompute.device.owner import Owner
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_secret import sealing_key
from fedcompute.device.surface import Event, Surface, event_url, open_event_url, open_surface, seal_surface

KEY = bytes(range(32))
SURFACE = Surface(Owner("com.example.app", "com.example.app.Service"), "com.example.caller", 7, ("a", "é"))
EVENT = Event("com.example.app/Service-AA", {"n": 1, "b": b"\xff", "none": None}, b"pixel", "image/gif")


def refuses(attempt) -> str:
    with pytest.raises(WorkerFailed) as caught:
        attempt()
    assert caught.value.platform_status is Status.INTERNAL
    return caught.value.detail


def test_a_device_reads_its_own_tokens():
    assert open_surface(KEY, seal_surface(KEY, SURFACE)) == SURFACE


def test_two_tokens_of_one_surface_differ_and_neither_shows_it():
    first, second = seal_surface(KEY, SURFACE), seal_surface(KEY, SURFACE)
    assert first != second
    assert b"example" not in base64.urlsafe_b64decode(first)


@pytest.mark.parametrize("destination", [None, "https://example.com/?a=1&e=2#f", "odp://localhost?e=x", ""])
def test_a_device_reads_its_own_event_urls(destination):
    url = event_url(KEY, EVENT, destination)
    assert url.startswith("odp://localhost?e=")
    assert open_event_url(KEY, url) == (EVENT, destination or None)


def test_every_changed_byte_makes_a_token_void():
    sealed = base64.urlsafe_b64decode(seal_surface(KEY, SURFACE))
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        refuses(lambda changed=changed: open_surface(KEY, base64.urlsafe_b64encode(changed)))
    for length in range(len(sealed)):
        refuses(lambda length=length: open_surface(KEY, base64.urlsafe_b64encode(sealed[:length])))
    refuses(lambda: open_surface(KEY, base64.urlsafe_b64encode(sealed + b"\0")))


def test_a_token_of_another_device_is_void():
    keys = []
    for _ in range(2):
        database = DeviceDatabase()
        with database.write() as tx:
            keys.append(sealing_key(tx))
            assert sealing_key(tx) == keys[-1]
        database.close()
    token, url = seal_surface(keys[0], SURFACE), event_url(keys[0], EVENT, None)
    refuses(lambda: open_surface(keys[1], token))
    refuses(lambda: open_event_url(keys[1], url))


def test_a_surface_is_no_event_and_an_event_no_surface():
    url = event_url(KEY, EVENT, None)
    token = seal_surface(KEY, SURFACE)
    refuses(lambda: open_surface(KEY, url.removeprefix("odp://localhost?e=").encode()))
    refuses(lambda: open_event_url(KEY, f"odp://localhost?e={token.decode()}"))


@pytest.mark.parametrize(
    ("context", "content"),
    [
        (b"fedcompute surface", {"owner": {}}),
        (b"fedcompute surface", {"owner": 1, "app_package": "", "request_id": 0, "keys": []}),
        (b"fedcompute event", {"owner": "o"}),
        (b"fedcompute event", [1]),
    ],
)
def test_what_this_device_sealed_in_another_form_is_void(context, content):
    sealed = base64.urlsafe_b64encode(seal_secret(KEY, msgspec.msgpack.encode(content), context))
    refuses(lambda: open_surface(KEY, sealed))
    refuses(lambda: open_event_url(KEY, f"odp://localhost?e={sealed.decode()}"))


@pytest.mark.parametrize("token", [b"", b"=", b"token", b"\xff\xfe", b"*" * 100, bytes(1 << 20), bytes(range(100))])
def test_bytes_that_are_no_token_are_refused_by_their_number(token):
    assert f"{len(token)} characters" in refuses(lambda: open_surface(KEY, token))


SEALED = event_url(KEY, EVENT, None).removeprefix("odp://localhost?")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "odp://localhost",
        "odp://localhost?",
        "odp://localhost?e=",
        "odp://localhost?e=x",
        "odp://localhost?r=https://example.com",
        f"http://localhost?{SEALED}",
        f"odp://example.com?{SEALED}",
        f"odp://user@localhost?{SEALED}",
        f"odp://localhost:80?{SEALED}",
        f"odp:localhost?{SEALED}",
        f"odp://localhost?{SEALED}&{SEALED}",
        f"odp://localhost?{SEALED}&r=a&r=b",
        f"odp://localhost?{SEALED}&a=1&b=2",
        f"odp://[?{SEALED}",
        f"odp://[::1?{SEALED}",
        "odp://localhost?e=é\ud800",
        "odp://localhost?" + "&" * 10_000,
        "odp://localhost?e=" + "A" * (2 << 20),
        f"odp://localhost?{SEALED}&r=" + "x" * (1 << 20),
    ],
)
def test_a_url_that_is_no_event_url_is_refused_and_not_repeated(url):
    detail = refuses(lambda: open_event_url(KEY, url))
    assert re.fullmatch(r"a token or event URL of \d+ characters that this device did not make", detail)


@pytest.mark.parametrize(("data", "destination"), [(bytes(256 << 10), None), (None, "/" * (256 << 10))])
def test_what_a_service_may_put_into_a_url_fits_into_it(data, destination):
    event = Event(EVENT.owner, {}, data, None)
    assert open_event_url(KEY, event_url(KEY, event, destination)) == (event, destination)
