"""Encryption keys: how long they live, when they are fetched, which one is drawn."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from starlette.responses import Response
from starlette.routing import Route

from fedcompute.crypto.keys import DEFAULT_LIFETIME, PublicKey, generate_key_pair, key_lifetime, public_keys_json
from fedcompute.device.client.http import Retries, Transport
from fedcompute.device.client.keys import EncryptionKeys, default_url
from fedcompute.errors import DeviceRunFailed, Reason


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"cache-control": "max-age=600"}, 600),
        ({"cache-control": "public, Max-Age=600, must-revalidate", "age": "100"}, 500),
        ({"cache-control": "max-age=600,max-age=300"}, 300),
        ({"cache-control": "max-age=600", "age": "600"}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=600", "age": "601"}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=0"}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=soon"}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=-5"}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=600", "age": "x"}, DEFAULT_LIFETIME),
        ({"cache-control": "no-cache"}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=" + "9" * 5000}, DEFAULT_LIFETIME),
        ({"cache-control": "max-age=600", "age": "9" * 5000}, DEFAULT_LIFETIME),
        ({}, DEFAULT_LIFETIME),
    ],
)
def test_keys_live_for_max_age_minus_age_or_14_days(headers, seconds):
    assert key_lifetime(headers) == seconds


class Service:
    def __init__(self):
        self.answer = Response(b"")
        self.fetches = 0

    async def __call__(self, request):
        self.fetches += 1
        return self.answer


@pytest.fixture
def service(serve):
    service = Service()

    async def answer(request):
        return await service(request)

    with serve([Route("/.well-known/odp/v1/public-keys", answer)]) as url:
        service.url = default_url(url)
        yield service


def pairs(count):
    return [generate_key_pair(datetime.now(UTC), timedelta(days=1)) for _ in range(count)]


def published(keys, **headers):
    return Response(public_keys_json(pair.published for pair in keys), headers=headers)


def choosing(service, clock=lambda: 0.0, times=1, chance=None):
    async def run():
        async with Transport(retries=Retries(delay=0.001)) as transport:
            keys = EncryptionKeys(transport, service.url, clock=clock, chance=chance)
            return [await keys.choose() for _ in range(times)]

    return asyncio.run(run())


def test_keys_are_fetched_once_and_drawn_at_random(service):
    keys = pairs(4)
    service.answer = published(keys)
    drawn = choosing(service, times=60, chance=random.Random(1))
    assert service.fetches == 1
    assert {key.id for key in drawn} == {pair.id for pair in keys}
    assert all(isinstance(key, PublicKey) for key in drawn)


def test_expired_keys_are_fetched_again(service):
    service.answer = published(pairs(1), **{"Cache-Control": "max-age=100"})
    now = iter(range(0, 100_000, 60))
    choosing(service, clock=lambda: float(next(now)), times=6)
    assert service.fetches > 1


def test_at_most_five_keys_are_in_the_draw(service):
    service.answer = published(pairs(9))
    assert len({key.id for key in choosing(service, times=200)}) <= 5


@pytest.mark.parametrize(
    "answer",
    [
        Response(b'{"keys":[]}'),
        Response(b"{}"),
        Response(b"no json"),
        Response(b'{"keys":[{"id":"a"}]}'),
        Response(b'{"keys":[{"id":"a","key":"AAAA"}]}'),
        Response(public_keys_json([PublicKey("a", bytes(32))]), 404),
        Response(b"x" * (2 << 20)),
    ],
    ids=["none", "no member", "no json", "no key", "short key", "status 404", "too long"],
)
def test_without_usable_keys_there_is_no_key(service, answer):
    service.answer = answer
    with pytest.raises(DeviceRunFailed) as caught:
        choosing(service)
    assert caught.value.reason is Reason.NO_ENCRYPTION_KEY


def test_a_fetch_that_takes_too_long_is_given_up(serve):
    async def slow(request):
        await asyncio.sleep(0.5)

    async def run(url):
        async with Transport() as transport:
            await EncryptionKeys(transport, url, fetch_timeout=0.05).choose()

    with serve([Route("/", slow)]) as url, pytest.raises(DeviceRunFailed, match=r"within 0\.05 s") as caught:
        asyncio.run(run(f"{url}/"))
    assert caught.value.reason is Reason.NO_ENCRYPTION_KEY
