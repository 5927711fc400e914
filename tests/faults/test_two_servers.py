"""Two servers on one PostgreSQL and one blob store, of which one is killed or stands still at a write of the engine."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

WRITES = (
    "server.rounds.check_ins._decide_together commit",
    "server.rounds.assign.report_completed commit",
    "server.api.blobs._put put gradient",
    "server.rounds.collect.collect commit",
    "server.rounds.aggregate._add_up put gradient",
    "server.rounds.collect._record commit",
    "server.rounds.collect.finish_aggregating commit",
    "server.rounds.update._apply put checkpoint",
    "server.rounds.release._close commit",
)


@pytest.fixture
def pair(start, postgresql_url):
    """Two servers; the first that comes to the fault has it, and is not started again."""
    # One that stands still in a transaction keeps its locks no longer than this.
    url = f"{postgresql_url}&options=-c%20idle_in_transaction_session_timeout%3D2s"

    def run(*faults):
        return [start(faults, revive=False, database_url=url) for _ in range(2)]

    return run


def test_rounds_run_on_two_servers_and_every_device_counts_once(pair, connect, undisturbed):
    servers = pair()
    clients = [connect(*servers), connect(*reversed(servers))]
    task_id = clients[0].open_task()
    for number in (1, 2):
        with ThreadPoolExecutor(2) as devices:
            list(devices.map(lambda i, n=number: clients[i % 2].contribute(0.1 * n + 0.01 * i), range(3)))
        clients[1].wait(task_id, lambda found, n=number: sum(1 for one in found["iterations"] if one["completed"]) >= n)
    outcome = clients[0].outcome(task_id)
    # Metrics are sums of floats in the order of the devices, which is any here.
    assert (
        outcome["model"]["server/global_model_weights/trainable/0"]
        == (undisturbed[0]["model"]["server/global_model_weights/trainable/0"])
    )
    assert outcome["assignments"] == undisturbed[0]["assignments"]
    assert outcome["ledger"] == undisturbed[0]["ledger"]


@pytest.mark.parametrize(
    "point", [*(f"{write}:before" for write in WRITES), *(f"{write}:after" for write in WRITES[-2:])]
)
def test_when_one_of_two_servers_is_killed_the_other_ends_with_the_same_model(pair, connect, undisturbed, point):
    servers = pair({"point": point, "count": 1, "how": "SIGKILL"})
    assert connect(*servers).run() == undisturbed[0]
    assert sorted(alive(one) for one in servers) == [False, True]


@pytest.mark.parametrize(
    "point",
    [
        "server.rounds.aggregate._add_up put gradient:before",
        "server.rounds.collect._record commit:before",
        "server.rounds.update._apply put checkpoint:before",
        "server.rounds.update._apply put checkpoint:after",
        "server.rounds.release._close commit:before",
        "server.rounds.release._close commit:after",
    ],
)
def test_when_one_of_two_servers_stands_still_the_other_goes_on_and_the_first_disturbs_nothing_later(
    pair, connect, undisturbed, point
):
    servers = pair({"point": point, "count": 1, "how": "SIGSTOP"})
    client = connect(*servers)
    assert client.run() == undisturbed[0]
    (frozen,) = [one for one in servers if stopped(one)]
    os.kill(frozen.pid, signal.SIGCONT)
    time.sleep(1.5)
    assert alive(frozen)
    assert connect(frozen).outcome(1) == undisturbed[0]


def state_of(server):
    try:
        return Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def alive(server):
    return state_of(server) is not None


def stopped(server):
    return state_of(server) == "T"
