"""The server's own encryption keys over months, with several servers and in an emergency."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from fedcompute.crypto.keys import key_lifetime, parse_public_keys
from fedcompute.crypto.sealing import sealer_of
from fedcompute.errors import OperationFailed, Reason
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.server.security.keys import delete_old_keys, publication, rotate_now
from fedcompute.storage.database import Database
from fedcompute.storage.secrets import all_keys, private_keys

SEALER = sealer_of(b"a" * 32)
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def settings(hand_made, tmp_path):
    return hand_made.settings_of(tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, settings):
    return settings.database if request.param == "sqlite" else request.getfixturevalue("postgresql_url")


@pytest.fixture
def database(database_url):
    opened = Database.open(database_url)
    yield opened
    opened.close()


@pytest.fixture
def together(database_url):
    """Runs work(database) on several servers of one database, all at once; returns what each got."""

    def run(count, work):
        databases = [Database.open(database_url) for _ in range(count)]
        start = threading.Barrier(count)

        def one(opened):
            start.wait()
            return work(opened)

        try:
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(one, databases))
        finally:
            for opened in databases:
                opened.close()

    return run


def held(database):
    with database.read() as tx:
        return set(private_keys(tx, SEALER))


@pytest.mark.parametrize("max_age_days", [0.5, 7, 30])
def test_no_device_that_keeps_to_the_headers_ever_uses_a_key_that_is_gone(hand_made, tmp_path, max_age_days):
    settings = hand_made.settings_of(tmp_path, key_max_age=max_age_days * 86_400)
    database = Database.open(settings.database)
    chance = random.Random(7)
    last_use: dict[str, datetime] = {}
    for day in range(120):
        now = START + day * DAY
        found = publication(database, SEALER, settings, now)
        assert 1 <= len(found.keys) <= 3
        # Straight from the server, out of a cache of any age, and where a proxy dropped the headers.
        for age in (0, chance.randrange(found.max_age), found.max_age):
            fetched = now + timedelta(seconds=age)
            headers = {"cache-control": f"public, max-age={found.max_age}", "age": str(age)}
            for told in (headers, {}) if age == 0 else (headers,):
                end = fetched + timedelta(seconds=key_lifetime(told))
                for key in found.keys:
                    last_use[key.id] = max(last_use.get(key.id, end), end)
        delete_old_keys(database, now)
        # A day of margin for the run and its upload.
        needed = {key_id for key_id, end in last_use.items() if now < end + DAY}
        assert needed <= held(database)
    assert len(last_use) >= 17
    assert len(held(database)) < len(last_use)
    database.close()


def test_a_key_made_for_a_shorter_memory_is_told_for_no_longer_than_it_is_kept(hand_made, tmp_path):
    short = hand_made.settings_of(tmp_path, key_max_age=3600)
    longer = hand_made.settings_of(tmp_path, key_max_age=30 * 86_400)
    database = Database.open(short.database)
    publication(database, SEALER, short, START)
    later = START + 13 * DAY
    publication(database, SEALER, short, later - DAY)
    found = publication(database, SEALER, longer, later)
    with database.read() as tx:
        ends = min(key.expires for key in all_keys(tx, SEALER) if key.id in {one.id for one in found.keys})
    assert later + timedelta(seconds=found.max_age) + 15 * DAY <= ends
    database.close()


@pytest.mark.parametrize("day", [0, 8])
def test_servers_of_one_database_make_one_key_when_one_is_due(database, settings, together, day):
    if day:
        publication(database, SEALER, settings, START)
    before = held(database)
    told = together(6, lambda opened: publication(opened, SEALER, settings, START + day * DAY))
    assert len(held(database) - before) == 1
    assert len(set(told)) == 1


def test_servers_that_rotate_at_once_in_an_emergency_leave_one_key_published(database, settings, together):
    publication(database, SEALER, settings, START)

    def rotate(opened):
        with opened.write() as tx:
            return rotate_now(tx, SEALER, settings, START + DAY).id

    made = together(4, rotate)
    (key,) = publication(database, SEALER, settings, START + DAY).keys
    assert key.id in made
    assert len(held(database)) == 5


def test_a_key_past_its_end_that_a_round_still_needs_is_kept_and_told(run_server, hand_made, caplog):
    running = run_server()
    api, process = running.api, hand_made.process_of()
    task_id = api.open_task("long", process, goal=1)
    body = api.seal(hand_made.update_of(process, hand_made.initial))
    api.http.post(f"{api.url}/api/v1/encryption-keys/rotate")
    context = running.app.state.context
    past = datetime.now(UTC)
    with context.database.write() as tx:
        tx.execute(
            text("UPDATE encryption_key SET expires = :past WHERE published_until <= :past"), {"past": str(past)[:26]}
        )
    years = past + timedelta(days=700)
    assert delete_old_keys(context.database, years) == 0
    assert "kept for rounds that are still open" in caplog.text
    api.contribute("long", body=body)
    assert api.wait_for("long", task_id, "COMPLETED")["rejections"] == {}
    assert delete_old_keys(context.database, years) == 2


def test_an_emergency_withdraws_every_key_at_once_and_old_uploads_still_open(run_server, hand_made):
    running = run_server()
    api, process = running.api, hand_made.process_of()
    operator = OperatorApi(api.url)
    task_id = api.open_task("emergency", process, goal=1)
    body = api.seal(hand_made.update_of(process, hand_made.initial))
    (old,) = operator.encryption_keys()
    new = operator.rotate_encryption_keys()
    published = parse_public_keys(api.http.get(f"{api.url}/.well-known/odp/v1/public-keys").content)
    assert [key.id for key in published] == [new["id"]]
    assert {key["id"]: key["published"] for key in operator.encryption_keys()} == {new["id"]: True, old["id"]: False}
    api.contribute("emergency", body=body)
    assert api.wait_for("emergency", task_id, "COMPLETED")["rejections"] == {}
    acts = [act for act in operator.audit(10) if act["action"] == "encryption_key.rotate"]
    assert [act["subject"] for act in acts] == [new["id"]]
    # Nothing of a private half is in any answer.
    context = running.app.state.context
    with context.database.read() as tx:
        secrets = private_keys(tx, context.sealer).values()
    answer = api.http.get(f"{api.url}/api/v1/encryption-keys").text
    assert not any(secret.hex() in answer for secret in secrets)
    assert all(
        set(key) == {"id", "published", "created", "published_until", "expires"} for key in operator.encryption_keys()
    )


def test_keys_are_rotated_by_operators_only(run_server):
    running = run_server(require_api_keys=True)
    with pytest.raises(OperationFailed) as raised:
        OperatorApi(running.api.url).rotate_encryption_keys()
    assert raised.value.reason is Reason.API_KEY_MISSING


def test_keys_that_an_external_service_holds_are_not_rotated_here(run_server):
    url = "http://127.0.0.1:1"
    running = run_server(key_service_a=url, key_service_b=url, key_service_public_url=url)
    operator = OperatorApi(running.api.url)
    assert operator.encryption_keys() == []
    with pytest.raises(OperationFailed) as raised:
        operator.rotate_encryption_keys()
    assert raised.value.reason is Reason.KEYS_HELD_ELSEWHERE
    answer = running.api.http.get(f"{running.api.url}/.well-known/odp/v1/public-keys")
    assert answer.status_code == 503
    assert answer.json()["code"] == "key_service_failed"
