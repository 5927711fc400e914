"""When an upload is worth a look of the engine."""

import threading
import time

import numpy as np
import pytest

from fedcompute.server.rounds import engine as rounds_engine
from fedcompute.server.uploads import Uploads


def test_the_first_upload_of_a_round_that_nobody_has_looked_at_is_worth_a_look():
    uploads = Uploads()
    assert uploads.add("a", "one")
    assert uploads.add("b", "two")


def test_a_round_is_worth_a_look_when_it_has_what_it_waits_for_and_not_before():
    uploads = Uploads()
    assert not uploads.wait_for("one", 3, ())
    assert not uploads.wait_for("two", 1, ())
    assert [uploads.add(session, "one") for session in "abcd"] == [False, False, True, True]
    assert uploads.add("e", "two")


def test_where_other_servers_take_uploads_too_each_is_worth_a_look():
    uploads = Uploads(alone=False)
    assert not uploads.wait_for("one", 3, ())
    assert uploads.add("a", "one")


def test_what_came_while_the_engine_looked_counts_and_what_it_saw_does_not():
    uploads = Uploads()
    uploads.add("seen", "one")
    seen = uploads.all()
    uploads.add("a", "one")
    uploads.add("elsewhere", "two")
    assert not uploads.wait_for("one", 2, seen)
    assert uploads.add("b", "one")
    # One that stays, since its round takes it no more, does not keep the engine busy.
    assert uploads.wait_for("one", 2, seen)
    assert not uploads.wait_for("one", 2, uploads.all())


def test_rounds_and_sessions_that_are_over_are_forgotten():
    uploads = Uploads()
    uploads.wait_for("one", 5, ())
    uploads.add("a", "one")
    uploads.retain({"one"})
    assert not uploads.add("b", "one")
    uploads.retain(set())
    assert uploads.add("c", "one")
    uploads.discard(["a", "b", "unknown"])
    assert uploads.all() == {"c"}
    assert uploads.among(["c", "a"]) == ["c"]


def test_devices_that_upload_at_the_same_time_are_each_counted_once():
    uploads = Uploads()
    uploads.wait_for("one", 400, ())
    reached = []

    def add(first):
        reached.extend(uploads.add(str(first + number), "one") for number in range(100))

    threads = [threading.Thread(target=add, args=(start,)) for start in range(0, 400, 100)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert reached.count(True) == 1
    assert len(uploads.all()) == 400


@pytest.mark.parametrize(("goal", "batch"), [(1, 50), (11, 50), (12, 3)])
def test_a_round_ends_without_the_look_that_comes_once_a_second(run_server, hand_made, monkeypatch, goal, batch):
    monkeypatch.setattr(rounds_engine, "_TICK", 60.0)
    api, process = run_server(collector_batch_size=batch).api, hand_made.process_of()
    update = hand_made.update_of(process, [np.full(leaf.shape, 0.01) for leaf in hand_made.initial])
    task_id = api.open_task("prompt", process, goal=goal, room=goal)
    for _ in range(goal):
        api.contribute("prompt", update)
    started = time.monotonic()
    api.wait_for("prompt", task_id, "COMPLETED", iteration=1)
    assert time.monotonic() - started < 30
