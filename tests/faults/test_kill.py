"""A server is killed before and after each write of its life: nothing is lost, and nothing counts twice."""

import pytest

WRITES = (
    "app._open_database commit",
    "app._context commit",
    "server.security.keys.publication commit",
    "server.api.acts.audited commit",
    "server.api.blobs._put put checkpoint",
    "server.api.blobs._put put server_phase",
    "server.api.blobs._put put client_only_plan",
    "server.rounds.schedule._prepare put client_checkpoint",
    "server.rounds.schedule._prepare put client_only_plan",
    "server.rounds.schedule.open_if_complete commit",
    "server.rounds.check_ins._decide_together commit",
    "server.rounds.assign.report_completed commit",
    "server.api.blobs._put put gradient",
    "server.rounds.collect.collect commit",
    "server.rounds.aggregate._add_up put gradient",
    "server.rounds.collect._record commit",
    "server.rounds.collect.finish_aggregating commit",
    "server.rounds.update._apply put checkpoint",
    "server.rounds.update._apply put client_checkpoint",
    "server.rounds.update._apply put metrics",
    "server.rounds.release._close commit",
    "server.rounds.collect.time_out commit",
    "server.rounds.passes._clean commit",
    "server.security.keys.delete_old_keys commit",
)
# A run may be over before its rounds are summed up: `test_summaries` waits for that.
LATER = ("server.rounds.summarize.summarize commit",)


def fault(write, moment, how="SIGKILL", count=1):
    return {"point": f"{write}:{moment}", "count": count, "how": how}


def test_every_write_of_a_server_is_one_that_it_is_killed_at_here(undisturbed):
    _, points = undisturbed
    assert {name.rpartition(":")[0] for name in points} <= {*WRITES, *LATER}
    # Written down where no server of these runs comes to, a name would test nothing.
    assert set(WRITES) <= {name.rpartition(":")[0] for name in points}


@pytest.mark.parametrize("write", WRITES)
def test_killed_before_and_after_a_write_a_server_ends_with_the_same_model_bit_for_bit(
    start, connect, undisturbed, write
):
    server = start([fault(write, "before"), fault(write, "after")])
    assert connect(server).run() == undisturbed[0]
    assert server.starts == 3


@pytest.mark.parametrize("write", ["server.rounds.update._apply put checkpoint", "server.rounds.release._close commit"])
def test_killed_in_the_round_that_ends_a_task_a_server_ends_it_once(start, connect, undisturbed, write):
    server = start([fault(write, "before", count=2), fault(write, "after")])
    assert connect(server).run() == undisturbed[0]
    assert server.starts == 3
