from datetime import timedelta

from fedcompute.storage.leases import acquire_lease, release_lease, renew_lease

TEN = timedelta(seconds=10)


def test_a_lease_has_one_holder_until_it_expires(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "round", "a", now, TEN)
        assert not acquire_lease(tx, "round", "b", now + timedelta(seconds=9), TEN)
        assert acquire_lease(tx, "other", "b", now, TEN)
        assert acquire_lease(tx, "round", "b", now + TEN, TEN)
        assert not renew_lease(tx, "round", "a", now + TEN, TEN)


def test_a_renewed_lease_lives_on_and_an_expired_one_cannot_be_renewed(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "round", "a", now, TEN)
        assert renew_lease(tx, "round", "a", now + timedelta(seconds=9), TEN)
        assert not acquire_lease(tx, "round", "b", now + timedelta(seconds=18), TEN)
        assert not renew_lease(tx, "round", "a", now + timedelta(seconds=19), TEN)
        assert not renew_lease(tx, "unknown", "a", now, TEN)


def test_a_released_lease_is_free_and_only_its_holder_releases_it(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "round", "a", now, TEN)
        assert not release_lease(tx, "round", "b")
        assert release_lease(tx, "round", "a")
        assert acquire_lease(tx, "round", "b", now, TEN)
        assert acquire_lease(tx, "round", "b", now, TEN)
