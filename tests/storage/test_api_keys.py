from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from fedcompute.errors import Reason, RequestRejected
from fedcompute.storage.api_keys import (
    Role,
    count_live_api_keys,
    create_api_key,
    list_api_keys,
    revoke_api_key,
    verify_api_key,
)

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


@pytest.fixture
def make(database):
    def run(role=Role.VIEWER, label="label", **options):
        with database.write() as tx:
            return create_api_key(tx, role, label, NOW, **options)

    return run


def verified(database, key, now=NOW):
    with database.read() as tx:
        return verify_api_key(tx, key, now)


def test_a_key_is_known_by_its_text_and_by_nothing_that_is_stored(database, make):
    stored, key = make(Role.OPERATOR, "alice")
    assert verified(database, key) == stored
    with database.read() as tx:
        row = tx.execute(text("SELECT * FROM api_key")).one()
    secret = key[-43:]
    assert not any(secret in str(value) for value in row)
    for guess in (f"fc_{stored.id}_{row.key_hash[:43]}", row.key_hash, f"fc_{stored.id}_{'A' * 43}", f"{key} ", ""):
        with pytest.raises(RequestRejected) as refused:
            verified(database, guess)
        assert refused.value.reason is Reason.API_KEY_INVALID


def test_the_secret_has_256_bits_and_no_two_keys_share_it(make):
    keys = [make()[1] for _ in range(20)]
    assert len({key.split("_", 2)[2] for key in keys}) == len({key.split("_")[1] for key in keys}) == 20
    assert all(len(key.split("_", 2)[2]) == 43 for key in keys)


def test_a_key_ends_when_it_expires_or_is_revoked(database, make):
    expiring, key = make(expires=NOW + timedelta(hours=1))
    lasting, other = make()
    assert verified(database, key, NOW + timedelta(minutes=59)) == expiring
    with pytest.raises(RequestRejected, match="has expired"):
        verified(database, key, NOW + timedelta(hours=1))
    with database.write() as tx:
        assert count_live_api_keys(tx, NOW) == 2
        assert revoke_api_key(tx, lasting.id, NOW)
        assert not revoke_api_key(tx, lasting.id, NOW)
        assert not revoke_api_key(tx, "000000000000", NOW)
        assert count_live_api_keys(tx, NOW) == 1
        assert count_live_api_keys(tx, NOW + timedelta(hours=1)) == 0
        assert [one.is_live(NOW) for one in list_api_keys(tx)].count(True) == 1
    with pytest.raises(RequestRejected, match="was revoked"):
        verified(database, other)
    with pytest.raises(RequestRejected, match="not one of this server"):
        verified(database, other[:-1] + ("A" if other[-1] != "A" else "B"))


@pytest.mark.parametrize("label", ["", "x" * 41, "two\nlines", "nul\0", "esc\x1b[31m"])
def test_a_label_is_a_few_printable_characters(database, label):
    with database.write() as tx, pytest.raises(RequestRejected):
        create_api_key(tx, Role.VIEWER, label, NOW)


def test_a_key_that_has_expired_is_not_made(database):
    with database.write() as tx, pytest.raises(RequestRejected):
        create_api_key(tx, Role.VIEWER, "late", NOW, expires=NOW)


def test_each_role_may_do_what_the_one_before_it_may():
    order = [Role.VIEWER, Role.BUILDER, Role.OPERATOR]
    for index, role in enumerate(order):
        assert [role.covers(needed) for needed in order] == [position <= index for position in range(3)]
