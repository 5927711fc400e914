from datetime import timedelta

import pytest
from sqlalchemy import Engine, event

from fedcompute.errors import Reason
from fedcompute.storage.assignments import mark_uploaded, report_completed, report_failed
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.training_seconds import training_seconds


@pytest.fixture
def trained(database, collecting, check_in, now):
    """A round whose devices trained 3 s and 8 s; one more failed, and one is at work."""
    key = collecting(max_aggregation_size=9)
    slow, quick, failed, _ = (check_in().assignment.key for _ in range(4))
    with database.write() as tx:
        assert report_completed(tx, slow, now + timedelta(seconds=8))
        assert report_completed(tx, quick, now + timedelta(seconds=3))
        assert mark_uploaded(tx, key, [quick.session_id], now + timedelta(seconds=60))
        assert report_failed(tx, failed, AssignmentStatus.LOCAL_FAILED, now + timedelta(seconds=5))
    return key


def test_a_device_counts_with_its_time_from_assignment_to_report(database, trained):
    with database.read() as tx:
        assert sorted(training_seconds(tx, trained.task, 1)) == [3.0, 8.0]
        assert training_seconds(tx, trained.task, 2) == []


def test_a_device_that_another_attempt_takes_over_counts_once(database, trained, now):
    collecting = IterationStatus.COLLECTING
    ends = {"old": collecting, "ended": IterationStatus.CANCELED, "into": collecting}
    with database.write() as tx:
        assert open_attempt(tx, trained, reason=Reason.ROUND_EXPIRED, now=now + timedelta(hours=1), **ends)
        assert sorted(training_seconds(tx, trained.task, 1)) == [3.0, 8.0]


def test_no_more_sessions_are_read_than_the_limit_and_none_of_other_rounds(database, database_url, trained):
    asked = []

    def note(_connection, _cursor, statement, parameters, _context, _many):
        asked.append((statement, parameters))

    with database.read() as tx:
        event.listen(Engine, "before_cursor_execute", note)
        try:
            assert len(training_seconds(tx, trained.task, 1, limit=1)) <= 1
        finally:
            event.remove(Engine, "before_cursor_execute", note)
        ((statement, parameters),) = asked
        is_sqlite = database_url.startswith("sqlite")
        if not is_sqlite:
            # Reading everything is the cheapest way to read next to nothing.
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = tx.exec_driver_sql(f"EXPLAIN {'QUERY PLAN ' if is_sqlite else ''}{statement}", parameters)
        steps = " ".join(row.detail if is_sqlite else row[0] for row in plan)
    assert "SCAN assignment" not in steps
    assert "Seq Scan" not in steps
