from datetime import timedelta

import pytest
from sqlalchemy import insert, select, update

from fedcompute.crypto.sealing import place, sealer_of
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.storage import schema
from fedcompute.storage.iterations import move_iteration
from fedcompute.storage.schema import IterationStatus
from fedcompute.storage.secrets import (
    EncryptionKeyRow,
    all_keys,
    check_sealed,
    delete_expired_keys,
    ensure_secret,
    insert_key,
    kept_past_expiry,
    private_keys,
    published_keys,
    reseal,
    seal_plain,
    sealed_with,
    withdraw_keys,
)

SEALER, OTHER = sealer_of(b"a" * 32), sealer_of(b"b" * 32)


@pytest.fixture
def pair(now):
    def make(name, *, age=0):
        created = now - timedelta(days=age)
        return EncryptionKeyRow(
            name, b"public", b"\x00private", created, created + timedelta(days=30), created + timedelta(days=7)
        )

    return make


@pytest.fixture
def filled(database, pair, now):
    """A database with a secret of every kind, sealed by SEALER."""
    with database.write() as tx:
        insert_key(tx, SEALER, pair("a"))
        ensure_secret(tx, SEALER, "url_signing", b"signing", now)
        value, secret_id = SEALER.seal(place("enrolment", "phone"), b"enrolled")
        row = {"id": "phone", "label": "phone", "secret": value, "sealed_with": secret_id, "created": now}
        tx.execute(insert(schema.enrolment).values(**row))
    return database


def stored(tx):
    """Every byte string that is stored as a secret."""
    keys, named, enrolments = schema.encryption_key, schema.server_secret, schema.enrolment
    return [
        bytes(value)
        for column in (keys.c.private_key, named.c.value, enrolments.c.secret)
        for value in tx.execute(select(column)).scalars()
    ]


def test_a_key_is_published_for_a_while_and_decrypts_for_longer(database, pair, now):
    with database.write() as tx:
        for key in (pair("new"), pair("old", age=7), pair("gone", age=30), pair("newer", age=-1)):
            assert insert_key(tx, SEALER, key)
        assert published_keys(tx, SEALER, now) == [pair("newer", age=-1), pair("new")]
        assert [key.id for key in all_keys(tx, SEALER)] == ["newer", "new", "old", "gone"]
        assert private_keys(tx, SEALER, ids=["old", "unknown"]) == {"old": b"\x00private"}
        assert delete_expired_keys(tx, now) == 1
        assert set(private_keys(tx, SEALER)) == {"new", "newer", "old"}


def test_a_key_id_is_taken_once(database, pair):
    with database.write() as tx:
        assert insert_key(tx, SEALER, pair("a"))
        assert not insert_key(tx, SEALER, pair("a", age=3))


def test_withdrawn_keys_are_told_to_nobody_and_still_decrypt(database, pair, now):
    with database.write() as tx:
        for name in ("a", "b", "c"):
            insert_key(tx, SEALER, pair(name))
        assert withdraw_keys(tx, now, keep="b") == 2
        assert [key.id for key in published_keys(tx, SEALER, now)] == ["b"]
        assert set(private_keys(tx, SEALER)) == {"a", "b", "c"}


def test_a_private_key_does_not_show_in_print(pair):
    assert "private\\" not in repr(pair("a"))
    assert "\\x00private" not in repr(pair("a"))


def test_a_secret_is_made_once_by_whoever_comes_first(database, race, now):
    def work(opened, index):
        with opened.write() as tx:
            return ensure_secret(tx, SEALER, "url-signing", bytes([index]) * 32, now)

    assert len(set(race(4, work))) == 1
    with database.write() as tx:
        assert ensure_secret(tx, SEALER, "other", b"x", now) == b"x"


def test_nothing_secret_is_stored_as_it_is(filled):
    with filled.read() as tx:
        for secret in (b"private", b"signing", b"enrolled"):
            assert not any(secret in value for value in stored(tx))
        assert sealed_with(tx) == {SEALER.id}
        check_sealed(tx, SEALER)


def test_another_operator_secret_opens_nothing_and_the_error_names_both(filled, now):
    with filled.write() as tx:
        for attempt in (
            lambda: check_sealed(tx, OTHER),
            lambda: private_keys(tx, OTHER),
            lambda: published_keys(tx, OTHER, now),
            lambda: ensure_secret(tx, OTHER, "url_signing", b"x", now),
        ):
            with pytest.raises(ArtifactInvalid) as raised:
                attempt()
            assert raised.value.reason is Reason.SECRET_UNREADABLE
            assert SEALER.id in raised.value.detail
            assert OTHER.id in raised.value.detail


def test_values_of_an_older_release_are_sealed_where_they_lie(filled, now):
    with filled.write() as tx:
        tx.execute(update(schema.encryption_key).values(private_key=b"\x00private", sealed_with=None))
        tx.execute(update(schema.server_secret).values(value=b"signing", sealed_with=None))
        with pytest.raises(ArtifactInvalid):
            private_keys(tx, SEALER)
        assert seal_plain(tx, SEALER) == 2
        assert seal_plain(tx, SEALER) == 0
        assert private_keys(tx, SEALER) == {"a": b"\x00private"}
        assert ensure_secret(tx, SEALER, "url_signing", b"x", now) == b"signing"
        assert not any(value in (b"signing", b"\x00private") for value in stored(tx))


def test_a_new_operator_secret_takes_over_every_value(filled, now):
    with filled.write() as tx:
        assert reseal(tx, SEALER, OTHER) == 3
        assert reseal(tx, SEALER, OTHER) == 0
        check_sealed(tx, OTHER)
        assert ensure_secret(tx, OTHER, "url_signing", b"x", now) == b"signing"
        row = tx.execute(select(schema.enrolment)).one()
        assert OTHER.open(place("enrolment", "phone"), bytes(row.secret), row.sealed_with) == b"enrolled"


def test_a_take_over_that_meets_a_value_of_a_third_secret_changes_nothing(filled, pair):
    third = sealer_of(b"c" * 32)
    with filled.write() as tx:
        insert_key(tx, third, pair("z"))
    with pytest.raises(ArtifactInvalid), filled.write() as tx:
        reseal(tx, SEALER, OTHER)
    with filled.read() as tx:
        assert sealed_with(tx) == {SEALER.id, third.id}
        assert len(stored(tx)) == 4


@pytest.mark.parametrize(
    "change", [{"public_key": b"theirs"}, {"id": "b"}, {"private_key": b"theirs", "sealed_with": None}]
)
def test_a_key_that_was_changed_in_the_database_is_published_to_nobody(filled, change, now):
    with filled.write() as tx:
        tx.execute(update(schema.encryption_key).values(**change))
        with pytest.raises(ArtifactInvalid) as raised:
            published_keys(tx, SEALER, now)
    assert raised.value.reason is Reason.SECRET_UNREADABLE


def test_a_sealed_value_moved_to_another_name_does_not_open(filled, now):
    with filled.write() as tx:
        tx.execute(update(schema.server_secret).values(name="noise_state"))
        with pytest.raises(ArtifactInvalid):
            ensure_secret(tx, SEALER, "noise_state", b"x", now)


def test_a_key_outlives_its_end_while_a_round_may_hold_uploads_under_it(database, collecting, pair, now):
    iteration = collecting()
    later = now + timedelta(days=400)
    with database.write() as tx:
        insert_key(tx, SEALER, pair("before"))
        insert_key(tx, SEALER, pair("long-gone", age=31))
        assert kept_past_expiry(tx, now) == []
        assert delete_expired_keys(tx, now) == 1
        assert kept_past_expiry(tx, later) == ["before"]
        assert delete_expired_keys(tx, later) == 0
        assert set(private_keys(tx, SEALER)) == {"before"}
        assert move_iteration(tx, iteration, IterationStatus.COLLECTING, IterationStatus.CANCELED, later)
        assert delete_expired_keys(tx, later) == 1


def test_uploads_that_a_later_attempt_took_over_keep_their_key(database, collecting, check_in, pair, now):
    iteration = collecting()
    later = now + timedelta(days=400)
    assert check_in(iteration.population)
    with database.write() as tx:
        insert_key(tx, SEALER, pair("old"))
        # The next attempt began long after the key's end, the device's assignment did not.
        tx.execute(update(schema.iteration).values(created_time=later))
        assert delete_expired_keys(tx, later) == 0
        tx.execute(update(schema.assignment).values(created_time=later))
        assert delete_expired_keys(tx, later) == 1
