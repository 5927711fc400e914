"""What a device remembers."""

from fedcompute.device.history import TaskHistory

JOB, POPULATION, TASK = 7, "population", "1"


def test_the_newest_contribution_counts_and_totals_add_up():
    history = TaskHistory()
    assert history.newest(JOB, POPULATION, TASK) is None
    for round_index, now in ((1, 10.0), (4, 20.0)):
        history.add(JOB, POPULATION, TASK, round_index=round_index, now=now)
    newest = history.newest(JOB, POPULATION, TASK)
    assert (newest.round, newest.time, newest.total) == (4, 20.0, 2)


def test_tasks_populations_and_jobs_are_kept_apart():
    history = TaskHistory()
    history.add(JOB, POPULATION, TASK, round_index=1, now=1.0)
    assert history.newest(JOB, POPULATION, "2") is None
    assert history.newest(JOB, "other", TASK) is None
    assert history.newest(8, POPULATION, TASK) is None


def test_nobody_but_its_owner_reads_a_file_with_tokens(tmp_path):
    history = TaskHistory(tmp_path / "history.db")
    history.save_token("https://learn.example", "owner", "token", 100.0)
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}
    history.close()


def test_a_file_outlives_the_process(tmp_path):
    first = TaskHistory(tmp_path / "history.db")
    first.add(JOB, POPULATION, TASK, round_index=3, now=1.0)
    first.save_resumption_token(JOB, POPULATION, TASK, "", b"t")
    first.close()
    second = TaskHistory(tmp_path / "history.db")
    assert second.newest(JOB, POPULATION, TASK).round == 3
    assert second.resumption_token(JOB, POPULATION, TASK, "") == b"t"


def test_contributions_are_forgotten_after_a_week():
    history = TaskHistory()
    history.add(JOB, POPULATION, TASK, round_index=1, now=0.0)
    history.delete_old(604_800.0)
    assert history.newest(JOB, POPULATION, TASK) is not None
    history.delete_old(604_801.0)
    assert history.newest(JOB, POPULATION, TASK) is None


def test_the_token_of_a_collection_is_read_where_it_was_saved():
    history = TaskHistory()
    history.save_resumption_token(JOB, POPULATION, TASK, "app://a/b", b"1")
    history.save_resumption_token(JOB, POPULATION, TASK, "app://a/b", b"2")
    assert history.resumption_token(JOB, POPULATION, TASK, "app://a/b") == b"2"
    assert history.resumption_token(JOB, POPULATION, TASK, "") is None
