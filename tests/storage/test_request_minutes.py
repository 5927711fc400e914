from datetime import UTC, datetime, timedelta

import pytest

from fedcompute.storage.request_minutes import (
    BUCKETS,
    CHECK_IN,
    REPORT,
    RequestMinute,
    add_request_minutes,
    added_buckets,
    bucket_of,
    forget_request_minutes,
    quantile,
    request_minutes,
)

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def row(minute=NOON, endpoint=CHECK_IN, population="digits", result="CREATED", times=(0.004,)):
    buckets = [0] * (len(BUCKETS) + 1)
    for seconds in times:
        buckets[bucket_of(seconds)] += 1
    return RequestMinute(minute, endpoint, population, result, len(times), sum(times), max(times), tuple(buckets))


def add(database, *rows):
    with database.write() as tx:
        add_request_minutes(tx, rows)


def stored(database, since=NOON - MINUTE, until=NOON + 10 * MINUTE, **options):
    with database.read() as tx:
        return request_minutes(tx, since, until, **options)


def test_what_two_servers_say_of_one_minute_is_added_up(database):
    add(database, row(times=(0.004, 0.5)))
    add(database, row(times=(0.002, 9.0)), row(result="NO_TASK_AVAILABLE"))
    both, other = sorted(stored(database), key=lambda one: one.result)
    assert (both.count, both.seconds_max) == (4, 9.0)
    assert both.seconds_sum == pytest.approx(9.506)
    assert both.buckets == row(times=(0.004, 0.5, 0.002, 9.0)).buckets
    assert other == row(result="NO_TASK_AVAILABLE")


def test_many_servers_that_add_at_once_lose_nothing(database, race):
    results = ["CREATED", "NO_TASK_AVAILABLE", "TURNED_AWAY"]
    rows = [row(result=result) for result in results]
    race(8, lambda own, turn: add(own, *rows[turn % 3 :], *rows[: turn % 3]))
    assert {one.result: one.count for one in stored(database)} == dict.fromkeys(results, 8)


def test_minutes_come_in_order_by_endpoint_and_population_and_no_more_than_wanted(database):
    add(
        database,
        row(NOON + MINUTE),
        row(),
        row(endpoint=REPORT, result="COMPLETED"),
        row(population="words"),
        row(NOON - 2 * MINUTE),
    )
    assert [one.minute for one in stored(database)] == [NOON, NOON, NOON, NOON + MINUTE]
    assert stored(database, endpoint=REPORT) == [row(endpoint=REPORT, result="COMPLETED")]
    assert stored(database, population="words") == [row(population="words")]
    assert stored(database, until=NOON - MINUTE) == []
    assert len(stored(database, limit=2)) == 2


def test_old_minutes_are_forgotten_and_no_others(database):
    add(database, row(), row(NOON + MINUTE))
    with database.write() as tx:
        assert forget_request_minutes(tx, NOON + MINUTE) == 1
    assert stored(database) == [row(NOON + MINUTE)]
    add(database)
    assert stored(database) == [row(NOON + MINUTE)]


def test_a_quantile_lies_in_the_bucket_of_its_request():
    assert quantile([0] * (len(BUCKETS) + 1), 0.5) is None
    times = [0.0005] * 50 + [0.03] * 49 + [60.0]
    buckets = added_buckets([row(times=times[:60]), row(times=times[60:])])
    assert sum(buckets) == 100
    assert quantile(buckets, 0.25) == pytest.approx(0.0005)
    assert 0.025 < quantile(buckets, 0.9) <= 0.05
    assert quantile(buckets, 1.0) == BUCKETS[-1]
    # What lies on a bound belongs below it.
    assert bucket_of(BUCKETS[3]) == 3
