import threading
import time

import pytest

from fedcompute.server.rounds.pipeline import pipelined


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_come_in_order_however_long_each_takes(threads, count):
    def work(item):
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(pipelined(work, range(count), threads)) == [item * item for item in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_no_more_results_wait_than_there_are_threads(threads):
    started = []

    def work(item):
        started.append(item)
        return item

    taken = 0
    for _ in pipelined(work, range(50), threads):
        taken += 1
        assert len(started) <= taken + threads
    assert taken == 50


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_comes_at_its_place_and_leaves_no_thread_behind(threads):
    def work(item):
        return 1 // (item - 2)

    before = set(threading.enumerate())
    results = pipelined(work, range(6), threads)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert set(threading.enumerate()) <= before
