"""What a device remembers."""

from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import Contribution, TaskHistory, delete_expired

JOB, POPULATION, TASK = 7, "population", "1"


def test_the_newest_contribution_counts_and_totals_add_up():
    history = TaskHistory()
    assert history.newest(JOB, POPULATION, TASK) is None
    for round_index, now in ((1, 10.0), (4, 20.0)):
        history.record(Contribution(JOB, POPULATION, TASK, round_index, now))
    newest = history.newest(JOB, POPULATION, TASK)
    assert (newest.round, newest.time, newest.total) == (4, 20.0, 2)


def test_tasks_populations_and_jobs_are_kept_apart():
    history = TaskHistory()
    history.record(Contribution(JOB, POPULATION, TASK, 1, 1.0))
    assert history.newest(JOB, POPULATION, "2") is None
    assert history.newest(JOB, "other", TASK) is None
    assert history.newest(8, POPULATION, TASK) is None


def test_nobody_but_its_owner_reads_a_file_with_tokens(tmp_path):
    history = TaskHistory(DeviceDatabase(tmp_path / "device.db"))
    history.save_token("https://learn.example", "owner", "token", 100.0)
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}
    history.database.close()


def test_a_file_outlives_the_process(tmp_path):
    first = TaskHistory(DeviceDatabase(tmp_path / "device.db"))
    first.record(Contribution(JOB, POPULATION, TASK, 3, 1.0, resumption_token=b"t"))
    first.database.close()
    second = TaskHistory(DeviceDatabase(tmp_path / "device.db"))
    assert second.newest(JOB, POPULATION, TASK).round == 3
    assert second.resumption_token(JOB, POPULATION, TASK, "") == b"t"


def test_contributions_are_forgotten_after_a_week():
    history = TaskHistory()
    history.record(Contribution(JOB, POPULATION, TASK, 1, 0.0))
    for now, kept in ((604_800.0, True), (604_801.0, False)):
        with history.database.write() as tx:
            delete_expired(tx, now)
        assert (history.newest(JOB, POPULATION, TASK) is not None) == kept


def test_the_token_of_a_collection_is_read_where_it_was_saved():
    history = TaskHistory()
    for token in (b"1", b"2", None):
        history.record(Contribution(JOB, POPULATION, TASK, 1, 1.0, "app://a/b", token))
    assert history.resumption_token(JOB, POPULATION, TASK, "app://a/b") == b"2"
    assert history.resumption_token(JOB, POPULATION, TASK, "") is None
