from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, event

from fedcompute.storage.request_intervals import (
    Requests,
    busiest,
    count_latencies,
    count_requests,
    requests_between,
)
from fedcompute.storage.request_minutes import BUCKETS, CHECK_IN, REPORT, RequestMinute, add_request_minutes

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ALWAYS = Requests(NOON - timedelta(days=30), NOON + timedelta(days=1))
FIVE = timedelta(minutes=5)


def at(minutes, endpoint, population, result, count, place=0):
    buckets = [0] * (len(BUCKETS) + 1)
    buckets[place] = count
    moment = NOON + timedelta(minutes=minutes)
    return RequestMinute(moment, endpoint, population, result, count, 0.1, 0.1, tuple(buckets))


@pytest.fixture
def requests(database):
    """Seven minutes: check-ins of two populations, and one report."""
    with database.write() as tx:
        add_request_minutes(
            tx,
            [
                at(0, CHECK_IN, "a", "CREATED", 1),
                at(4, CHECK_IN, "a", "CREATED", 2, place=3),
                at(4, CHECK_IN, "a", "NO_TASK_AVAILABLE", 4, place=11),
                at(5, CHECK_IN, "b", "CREATED", 8),
                at(6, REPORT, "b", "COMPLETED", 16),
            ],
        )


def test_the_first_and_the_last_minute_are_those_of_the_requests_that_are_meant(database, requests):
    with database.read() as tx:
        assert requests_between(tx, ALWAYS) == (NOON, NOON + timedelta(minutes=6))
        of_a = Requests(ALWAYS.since, ALWAYS.until, CHECK_IN, "a", "NO_TASK_AVAILABLE")
        assert requests_between(tx, of_a) == (NOON + timedelta(minutes=4),) * 2
        assert requests_between(tx, Requests(NOON + timedelta(minutes=7), ALWAYS.until)) is None
        assert requests_between(tx, Requests(ALWAYS.since, NOON - timedelta(minutes=1))) is None


def test_requests_add_up_within_their_interval(database, requests):
    with database.read() as tx:
        assert count_requests(tx, ALWAYS, 5, ["endpoint"]) == {
            (CHECK_IN,): {NOON: 7, NOON + FIVE: 8},
            (REPORT,): {NOON + FIVE: 16},
        }
        minutes = count_requests(tx, Requests(NOON, NOON + FIVE, CHECK_IN, "a"), 1, ["result"])
        assert minutes == {
            ("CREATED",): {NOON: 1, NOON + timedelta(minutes=4): 2},
            ("NO_TASK_AVAILABLE",): {NOON + timedelta(minutes=4): 4},
        }


def test_intervals_of_a_day_begin_at_midnight(database, requests):
    with database.read() as tx:
        assert count_requests(tx, ALWAYS, 1440, ["endpoint"])[REPORT,] == {NOON - timedelta(hours=12): 16}


def test_what_is_not_kept_is_added_up_together(database, requests):
    check_ins = Requests(ALWAYS.since, ALWAYS.until, CHECK_IN)
    with database.read() as tx:
        labels = busiest(tx, check_ins, ["population", "result"], 2)
        assert labels == [("b", "CREATED"), ("a", "NO_TASK_AVAILABLE")]
        assert count_requests(tx, check_ins, 60, ["population", "result"], labels) == {
            ("b", "CREATED"): {NOON: 8},
            ("a", "NO_TASK_AVAILABLE"): {NOON: 4},
            (): {NOON: 3},
        }


def test_latencies_add_up_bucket_by_bucket(database, requests):
    with database.read() as tx:
        assert count_latencies(tx, Requests(ALWAYS.since, ALWAYS.until, CHECK_IN), 5) == {
            NOON: [1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4],
            NOON + FIVE: [8] + [0] * 11,
        }


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_question_goes_through_an_index(database, requests):
    asked = []

    def note(connection, cursor, statement, parameters, *_):
        if "FROM request_minute" in statement:
            asked.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with database.read() as tx:
            for which in (ALWAYS, Requests(ALWAYS.since, ALWAYS.until, CHECK_IN, "a", "CREATED")):
                requests_between(tx, which)
                busiest(tx, which, ["population"], 2)
                count_requests(tx, which, 5, ["population"], [("a",)])
                count_latencies(tx, which, 5)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(asked) == 10
    with database.read() as tx:
        for statement, parameters in asked:
            plan = tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            assert "SEARCH request_minute USING" in str(plan), (statement, plan)
