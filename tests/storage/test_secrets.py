from datetime import timedelta

import pytest

from fedcompute.storage.secrets import (
    EncryptionKeyRow,
    delete_expired_keys,
    ensure_secret,
    insert_key,
    private_keys,
    published_keys,
)


@pytest.fixture
def pair(now):
    def make(name, *, age=0):
        created = now - timedelta(days=age)
        return EncryptionKeyRow(
            name, b"public", b"\x00private", created, created + timedelta(days=30), created + timedelta(days=7)
        )

    return make


def test_a_key_is_published_for_a_while_and_decrypts_for_longer(database, pair, now):
    with database.write() as tx:
        for key in (pair("new"), pair("old", age=7), pair("gone", age=30), pair("newer", age=-1)):
            assert insert_key(tx, key)
        assert published_keys(tx, now) == [pair("newer", age=-1), pair("new")]
        assert set(private_keys(tx, now)) == {"new", "newer", "old"}
        assert private_keys(tx, now, ids=["old", "gone", "unknown"]) == {"old": b"\x00private"}
        assert delete_expired_keys(tx, now) == 1


def test_a_key_id_is_taken_once(database, pair):
    with database.write() as tx:
        assert insert_key(tx, pair("a"))
        assert not insert_key(tx, pair("a", age=3))


def test_a_private_key_does_not_show_in_print(pair):
    assert "private\\" not in repr(pair("a"))
    assert "\\x00private" not in repr(pair("a"))


def test_a_secret_is_made_once_by_whoever_comes_first(database, race, now):
    def work(opened, index):
        with opened.write() as tx:
            return ensure_secret(tx, "url-signing", bytes([index]) * 32, now)

    assert len(set(race(4, work))) == 1
    with database.write() as tx:
        assert ensure_secret(tx, "other", b"x", now) == b"x"
