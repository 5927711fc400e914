import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage import schema
from fedcompute.storage.assignments import assignments_of_batch, count_assignments, get_assignment, unbatched
from fedcompute.storage.batches import (
    BatchSums,
    create_batch,
    fail_batch,
    finish_batch,
    get_batch,
    list_batches,
    publish_batch,
    sum_batches,
)
from fedcompute.storage.keys import AssignmentKey, BatchKey
from fedcompute.storage.schema import AssignmentStatus, BatchStatus


def test_a_batch_holds_its_members_in_assignment_order(database, collecting, uploaded, now):
    key = collecting("p" * 64)
    sessions = uploaded(key, 3)
    with database.write() as tx:
        batch = create_batch(tx, key, [sessions[2], sessions[0]], now)
        assert (batch.status, batch.batch_size, batch.accepted_size) == (BatchStatus.FULL, 2, None)
        assert [row.key.session_id for row in assignments_of_batch(tx, batch.key)] == [sessions[0], sessions[2]]
        assert [row.key.session_id for row in unbatched(tx, key)] == [sessions[1]]
        assert list_batches(tx, key) == [batch]


def test_a_batch_with_one_member_that_cannot_join_changes_nothing(database, collecting, uploaded, check_in, now):
    key = collecting()
    sessions = uploaded(key, 2)
    assigned = check_in().assignment.key.session_id
    with database.write() as tx:
        before = tx.execute(schema.assignment_status_history.select()).all()
        assert create_batch(tx, key, [*sessions, assigned], now) is None
        assert create_batch(tx, key, [*sessions, "unknown"], now) is None
        assert tx.execute(schema.assignment_status_history.select()).all() == before
        assert len(unbatched(tx, key)) == 2
        for wrong in ([], [sessions[0], sessions[0]]):
            with pytest.raises(ValueError):
                create_batch(tx, key, wrong, now)


def test_of_two_workers_that_batch_the_same_uploads_one_succeeds(database, collecting, uploaded, race, now):
    key = collecting()
    sessions = uploaded(key, 3)

    def work(opened, _):
        with opened.write() as tx:
            return create_batch(tx, key, sessions, now)

    assert [answer is None for answer in race(2, work)].count(True) == 1
    with database.read() as tx:
        assert len(list_batches(tx, key)) == 1


def test_a_finished_batch_rejects_its_bad_members_alone(database, collecting, uploaded, published, now):
    key = collecting()
    sessions = uploaded(key, 3)
    batch = published(key, sessions)
    with database.write() as tx:
        assert finish_batch(tx, batch, 2, {sessions[1]: Reason.NORM_TOO_LARGE}, now)
        assert not finish_batch(tx, batch, 3, {}, now)
        row = get_batch(tx, batch)
        assert (row.status, row.accepted_size) == (BatchStatus.UPLOAD_COMPLETED, 2)
        rejected = get_assignment(tx, AssignmentKey(key, sessions[1]))
        assert (rejected.status, rejected.rejection, rejected.batch_id) == (
            AssignmentStatus.REMOTE_FAILED,
            "norm_too_large",
            batch.batch_id,
        )
        assert count_assignments(tx, key)[AssignmentStatus.UPLOAD_COMPLETED] == 2
        history = tx.execute(
            schema.assignment_status_history.select()
            .where(schema.assignment_status_history.c.session_id == sessions[1])
            .order_by("status_id")
        ).all()
    assert [(row.status_id, row.status, row.rejection) for row in history] == [
        (1, 0, None),
        (2, 1, None),
        (3, 2, None),
        (4, 2, None),
        (5, 104, "norm_too_large"),
    ]


@pytest.mark.parametrize(("accepted", "who"), [(3, None), (1, None), (2, "stranger"), (2, "other")])
def test_a_result_that_does_not_fit_its_batch_is_refused_whole(
    database, collecting, uploaded, published, now, accepted, who
):
    key = collecting()
    sessions = uploaded(key, 5)
    batch, other = published(key, sessions[:3]), published(key, sessions[3:])
    rejected = {{None: sessions[0], "stranger": "unknown", "other": sessions[3]}[who]: Reason.NOT_FINITE}
    with database.write() as tx:
        with pytest.raises(OperationFailed) as caught:
            finish_batch(tx, batch, accepted, rejected, now)
        assert caught.value.reason is Reason.INTERNAL
        assert get_batch(tx, batch).status is BatchStatus.PUBLISH_COMPLETED
        assert count_assignments(tx, key)[AssignmentStatus.UPLOAD_COMPLETED] == 5
        assert get_batch(tx, other).accepted_size is None


def test_a_failed_batch_fails_its_members_and_no_others(database, collecting, uploaded, published, now):
    key = collecting()
    sessions = uploaded(key, 4)
    batch = published(key, sessions[:2])
    with database.write() as tx:
        full = create_batch(tx, key, sessions[2:3], now).key
        assert fail_batch(tx, batch, Reason.INTERNAL, now)
        assert fail_batch(tx, full, Reason.INTERNAL, now)
        assert not fail_batch(tx, batch, Reason.INTERNAL, now)
        assert not finish_batch(tx, batch, 2, {}, now)
        assert not fail_batch(tx, BatchKey(key, "unknown"), Reason.INTERNAL, now)
        counts = count_assignments(tx, key)
    assert (counts[AssignmentStatus.REMOTE_FAILED], counts[AssignmentStatus.UPLOAD_COMPLETED]) == (3, 1)


def test_sums_follow_the_batches(database, collecting, uploaded, published, now):
    key = collecting(max_aggregation_size=20)
    with database.read() as tx:
        assert sum_batches(tx, key) == BatchSums(0, 0, 0, 0, 0)
    sessions = uploaded(key, 10)
    done, running, bad = published(key, sessions[:4]), published(key, sessions[4:7]), published(key, sessions[7:9])
    with database.write() as tx:
        create_batch(tx, key, sessions[9:], now)
        finish_batch(tx, done, 3, {sessions[0]: Reason.NOT_FINITE}, now)
        fail_batch(tx, bad, Reason.INTERNAL, now)
        sums = sum_batches(tx, key)
        assert sums == BatchSums(full=1, published=3, aggregated=4, accepted=3, failed=2)
        assert sums.expected == 6
        assert [row.key for row in list_batches(tx, key, statuses=[BatchStatus.PUBLISH_COMPLETED])] == [running]


def test_publishing_happens_once(database, collecting, uploaded, now):
    key = collecting()
    sessions = uploaded(key, 1)
    with database.write() as tx:
        batch = create_batch(tx, key, sessions, now).key
        assert not finish_batch(tx, batch, 1, {}, now)
        assert publish_batch(tx, batch, now)
        assert not publish_batch(tx, batch, now)


def test_every_batch_of_a_large_round_is_listed_unless_fewer_are_asked_for(database, collecting, uploaded, now):
    key = collecting()
    sessions = uploaded(key, 1)
    with database.write() as tx:
        first = create_batch(tx, key, sessions, now)
        table = schema.aggregation_batch
        row = dict(tx.execute(table.select()).mappings().one())
        tx.execute(table.insert(), [{**row, "batch_id": f"{number:05}"} for number in range(10_001)])
        found = list_batches(tx, key)
        assert {one.key.batch_id for one in found} == {first.key.batch_id, *(f"{n:05}" for n in range(10_001))}
        assert list_batches(tx, key, limit=3) == found[:3]
