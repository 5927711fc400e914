"""When background jobs run, beside tasks and alone."""

import asyncio
from dataclasses import replace

import pytest

from fedcompute.device.client.runtime import RunOutcome
from fedcompute.device.jobs import background, scheduler
from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.owner import Owner
from fedcompute.device.state.settings import set_consent
from fedcompute.errors import OperationFailed, Reason

NOW = 1_700_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
SUCCESS = RunOutcome(success=True, phase="done")


def test_background_jobs_run_when_due_and_again_a_period_after_their_start(bench, jobs):
    for now in (NOW, NOW + 10, NOW + 20, NOW + 4 * HOUR - 1, NOW + 4 * HOUR, NOW + DAY, NOW + DAY + 10):
        bench.at(now)
    assert jobs.done == [
        ("clean", NOW), ("fetch", NOW + 10), ("fetch", NOW + DAY), ("clean", NOW + DAY + 10),
    ]  # fmt: skip
    assert bench.scheduler.next_time() == NOW + DAY + 4 * HOUR
    assert bench.told()[:2] == [("started", "clean", ""), ("ended", "clean", "")]
    assert bench.events[1].earliest_run == NOW + DAY


def test_a_background_job_waits_for_its_own_constraints(bench, jobs):
    bench.conditions = Conditions(idle=False, network=False)
    assert bench.at(NOW)
    assert not bench.at(NOW + 10)
    assert jobs.done == [("fetch", NOW)]
    assert bench.scheduler.next_time() == NOW + 10 + MINUTE
    bench.conditions = Conditions()
    assert bench.scheduler.next_time() == NOW


@pytest.mark.parametrize(
    ("error", "reason"), [(OperationFailed(Reason.STORAGE_FAILED, "full"), "storage_failed"), (KeyError(1), "internal")]
)
def test_a_background_job_that_fails_is_told_and_waits_for_its_period(bench, jobs, error, reason):
    jobs.error = error
    assert bench.at(NOW)
    assert bench.events[-1].reason == reason
    assert bench.events[-1].earliest_run == NOW + DAY


def test_a_background_job_that_hangs_is_stopped(bench, jobs, monkeypatch):
    monkeypatch.setattr(scheduler, "_BACKGROUND_SECONDS", 0.01)

    async def hang():
        await asyncio.sleep(60)

    bench.background["clean"] = replace(bench.background["clean"], work=hang)
    assert bench.at(NOW)
    assert (bench.events[-1].job, bench.events[-1].reason) == ("clean", "stopped")
    assert bench.events[-1].earliest_run == NOW + DAY


def test_a_kill_switch_stops_its_jobs_and_never_the_wipe(bench, jobs):
    for switch in ("federated_compute_kill_switch", "global_kill_switch"):
        bench.flag(switch, "true")
    with bench.database.write() as tx:
        set_consent(tx, "measurement", False, NOW)
    assert not bench.at(NOW)
    assert bench.scheduler.next_time() == NOW + MINUTE
    assert bench.at(NOW + DAY)
    assert not bench.at(NOW + DAY + 10)
    assert jobs.done == [("reset_data", NOW + DAY)]


def test_background_jobs_do_not_run_beside_a_task_and_turn_none_away(bench, jobs):
    for now in (NOW, NOW + 10):
        bench.at(now)
    jobs.done.clear()
    bench.schedule()
    bench.force()

    async def fetch_meanwhile(task):
        with bench.database.write() as tx:
            background.force(tx, "fetch")
        assert not await bench.scheduler.run_due()
        return SUCCESS

    bench.outcomes["digits"] = fetch_meanwhile
    assert bench.at(NOW + MINUTE)
    assert jobs.done == []

    async def schedule_meanwhile():
        bench.schedule("other")
        bench.force("other")
        assert not await bench.scheduler.run_due()

    bench.background["fetch"] = replace(bench.background["fetch"], work=schedule_meanwhile)
    assert bench.at(NOW + MINUTE)
    assert bench.at(NOW + MINUTE)
    assert bench.ran == ["digits", "other"]


def test_after_a_restart_background_jobs_keep_their_times(bench, jobs):
    bench.at(NOW)
    bench.now = NOW + HOUR
    bench.restart()
    with bench.database.read() as tx:
        assert background.earliest_runs(tx) == [("fetch", NOW), ("clean", NOW + DAY)]
