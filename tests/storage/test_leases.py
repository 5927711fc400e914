from datetime import timedelta

from fedcompute.storage.leases import acquire_lease, forget_expired_leases, release_leases, renew_leases

TEN = timedelta(seconds=10)


def test_a_lease_has_one_holder_until_it_expires(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "round", "a", now, TEN)
        assert not acquire_lease(tx, "round", "b", now + timedelta(seconds=9), TEN)
        assert acquire_lease(tx, "other", "b", now, TEN)
        assert acquire_lease(tx, "round", "b", now + TEN, TEN)
        assert renew_leases(tx, "a", now + TEN, TEN) == set()


def test_renewed_leases_live_on_and_expired_ones_cannot_be_renewed(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "round", "a", now, TEN)
        assert acquire_lease(tx, "batch", "a", now + timedelta(seconds=1), TEN)
        assert acquire_lease(tx, "other", "b", now, TEN)
        assert renew_leases(tx, "a", now + timedelta(seconds=9), TEN) == {"round", "batch"}
        assert not acquire_lease(tx, "round", "b", now + timedelta(seconds=18), TEN)
        assert renew_leases(tx, "a", now + timedelta(seconds=19), TEN) == set()
        assert renew_leases(tx, "nobody", now, TEN) == set()


def test_released_leases_are_free_and_only_their_holder_releases_them(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "round", "a", now, TEN)
        assert acquire_lease(tx, "batch", "a", now, TEN)
        assert release_leases(tx, "b", ["round"]) == 0
        assert release_leases(tx, "a", ["round"]) == 1
        assert acquire_lease(tx, "round", "b", now, TEN)
        assert not acquire_lease(tx, "batch", "b", now, TEN)
        assert release_leases(tx, "a") == 1
        assert acquire_lease(tx, "batch", "b", now, TEN)


def test_expired_leases_are_forgotten_and_live_ones_stay(database, now):
    with database.write() as tx:
        assert acquire_lease(tx, "old", "a", now, TEN)
        assert acquire_lease(tx, "new", "a", now + timedelta(seconds=5), TEN)
        assert forget_expired_leases(tx, now + TEN) == 1
        assert renew_leases(tx, "a", now + TEN, TEN) == {"new"}
