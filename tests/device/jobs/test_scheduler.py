"""What runs when, and what does not."""

import asyncio
import random
from dataclasses import replace

import pytest

from fedcompute.device.client.runtime import RunOutcome
from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.jobs.events import EventKind, describe
from fedcompute.device.jobs.flags import Flags, put_flag
from fedcompute.device.owner import Owner
from fedcompute.device.state import tasks
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import Contribution, TaskHistory
from fedcompute.device.state.settings import set_consent
from fedcompute.device.state.tasks import Removal, ScheduleRequest
from fedcompute.errors import DeviceRunFailed, Reason

NOW = 1_700_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
SUCCESS = RunOutcome(success=True, phase="done")


def failure(reason="server_answer_invalid", counted=True, window=None):
    return RunOutcome(success=False, phase="check_in", reason=reason, counted=counted, retry_window=window)


def test_a_task_runs_when_it_is_due_and_no_sooner(bench):
    bench.schedule()
    assert bench.scheduler.next_time() == NOW + 5 * MINUTE
    assert not bench.at(NOW + 5 * MINUTE - 1)
    assert bench.at(NOW + 5 * MINUTE)
    assert not bench.at(NOW + 5 * MINUTE)
    assert bench.ran == ["digits"]
    assert bench.scheduler.next_time() is None
    assert bench.told() == [
        ("started", "digits", ""),
        ("ended", "digits", ""),
        ("deleted", "digits", Removal.SUCCEEDED),
    ]


def test_the_end_of_a_run_tells_its_result_and_what_the_next_time_follows_from(bench):
    bench.schedule(recurrent=True, minimum_interval=HOUR)
    bench.outcomes["digits"] = failure("no_task_available", counted=False, window=90.5)
    bench.at(NOW + HOUR)
    ended = bench.events[-1]
    assert (ended.kind, ended.success, ended.counted, ended.reason) == (
        EventKind.ENDED, False, False, "no_task_available",
    )  # fmt: skip
    assert ended.earliest_run == NOW + HOUR + 90_500 == bench.task().earliest_run
    assert describe(ended) == "ended failure no_task_available next in 90.500 s, server 90.500 s"
    bench.outcomes["digits"] = failure()
    bench.at(ended.earliest_run)
    drawn = random.Random(1).randint(720_000, 1_080_000)
    assert describe(bench.events[-1]) == (
        f"ended failure (counted) server_answer_invalid next in {drawn / 1000:.3f} s, transient"
    )
    assert bench.events[-1].task.reschedule_count == 1


def test_a_contribution_is_remembered_with_the_end_of_its_run(bench):
    bench.schedule()
    job_id = OWNER.job_id("digits")
    contribution = Contribution(job_id, "digits", "3", 4, 100.0, resumption_token=b"t")
    bench.outcomes["digits"] = replace(SUCCESS, contribution=contribution)
    bench.at(NOW + HOUR)
    history = TaskHistory(bench.database)
    assert history.newest(job_id, "digits", "3").round == 4
    assert history.resumption_token(job_id, "digits", "3", "") == b"t"


@pytest.mark.parametrize(
    ("conditions", "why"),
    [
        (Conditions(idle=False), "not idle"),
        (Conditions(battery_percent=3), "battery 3 %, below 15 %, not charging"),
        (Conditions(network=False), "no network"),
        (Conditions(unmetered=False), "metered network"),
    ],
)
def test_a_due_task_waits_for_its_constraints_and_says_so_once(bench, conditions, why):
    bench.schedule()
    bench.conditions = conditions
    for now in (NOW + HOUR, NOW + HOUR + MINUTE):
        assert not bench.at(now)
        assert bench.scheduler.next_time() == now + MINUTE
    assert bench.told() == [("waiting", "digits", why)]
    bench.conditions = Conditions(charging=True, battery_percent=30)
    assert bench.at(NOW + 2 * HOUR)
    assert bench.ran == ["digits"]


def test_a_wait_is_told_again_when_its_reason_changes_or_it_was_over(bench):
    bench.schedule(recurrent=True, minimum_interval=HOUR)
    for number, conditions in enumerate(
        [Conditions(idle=False), Conditions(network=False), Conditions(), Conditions(network=False)]
    ):
        bench.conditions = conditions
        bench.at(NOW + (1 + 2 * number) * HOUR)
    assert [one[2] for one in bench.told(EventKind.WAITING)] == ["not idle", "no network", "no network"]


def test_a_wait_is_not_told_again_because_a_number_in_its_reason_changed(bench):
    bench.schedule()
    for minute, load in enumerate((0.86, 1.0, 12.5)):
        bench.conditions = Conditions(idle=False, load=load)
        bench.at(NOW + HOUR + minute * MINUTE)
    assert bench.told() == [("waiting", "digits", "not idle: load 0.86 per processor")]


def test_a_forced_task_ignores_constraints_and_keeps_the_checks_at_its_start(bench):
    bench.schedule(recurrent=True, minimum_interval=HOUR)
    bench.conditions = Conditions(idle=False, network=False, battery_percent=29)
    bench.force()
    assert bench.scheduler.next_time() == NOW
    assert bench.at(NOW)
    assert (bench.ran, bench.told()) == ([], [("not run", "digits", "conditions")])
    assert not bench.at(NOW + MINUTE)
    bench.conditions = Conditions(idle=False, network=False, battery_percent=30)
    bench.force()
    assert bench.at(NOW + 2 * MINUTE)
    assert bench.ran == ["digits"]


def test_what_is_forced_while_a_task_runs_waits_for_its_end(bench):
    bench.schedule("first")
    bench.schedule("second", recurrent=True, minimum_interval=HOUR)

    async def force_another(task):
        bench.force("second")
        assert not await bench.scheduler.run_due()
        return SUCCESS

    bench.outcomes["first"] = force_another
    bench.force("first")
    assert bench.at(NOW)
    assert bench.at(NOW)
    assert bench.ran == ["first", "second"]
    assert bench.told(EventKind.NOT_RUN) == []


def test_forced_tasks_can_be_run_and_everything_else_be_left_alone(bench, jobs):
    for population in ("one", "two", "due"):
        bench.schedule(population)
    for population in ("one", "two"):
        bench.force(population)
    bench.now += HOUR
    due = bench.task("due")
    bench.flag("global_kill_switch", "true")
    asyncio.run(bench.scheduler.run_forced())
    assert bench.ran == []
    bench.flag("global_kill_switch", "false")
    asyncio.run(bench.scheduler.run_forced())
    assert sorted(bench.ran) == ["one", "two"]
    assert (jobs.done, bench.task("due")) == ([], due)


def test_a_task_that_was_put_off_since_it_was_looked_at_does_not_run(bench):
    bench.schedule(recurrent=True, minimum_interval=HOUR)
    asked = []

    def conditions():
        # Another process changes the task between the look at what is due and its start.
        asked.append(1)
        if len(asked) == 2:
            bench.schedule(recurrent=True, minimum_interval=2 * HOUR)
        return Conditions()

    bench.scheduler._conditions = conditions
    bench.at(NOW + HOUR)
    assert (bench.ran, bench.told()) == ([], [])
    assert bench.task().earliest_run == NOW + 3 * HOUR


def test_a_failed_check_ends_the_run_uncounted_with_a_transient_delay(bench):
    bench.schedule()
    bench.conditions = Conditions(thermal_status=2, free_bytes=7)
    now = NOW + HOUR
    assert bench.at(now)
    assert bench.events[-1].detail == "thermal status 2, not below 2, 7 bytes free, below 50000000"
    task = bench.task()
    assert (task.reschedule_count, task.pending, task.scheduling_reason) == (0, True, 3)
    assert (task.last_run_start, task.last_run_end) == (now, now)
    assert now + 720_000 <= task.earliest_run <= now + 1_080_000
    assert bench.ran == []


def test_within_a_second_of_a_check_a_run_starts_unchecked(bench):
    bench.schedule("one")
    bench.schedule("two")
    bench.schedule("three")
    bench.conditions = Conditions(battery_percent=29)
    assert bench.at(NOW + HOUR)
    bench.force("two")
    assert bench.at(NOW + HOUR + 999)
    assert [one[0] for one in bench.told()] == ["not run", "started", "not run", "ended", "deleted"]
    bench.force("three")
    assert bench.at(NOW + HOUR + 1000)
    assert bench.told()[-1] == ("not run", "three", "conditions")


def test_what_fires_while_a_task_runs_fails_uncounted_and_the_run_goes_on(bench):
    for population in ("first", "second", "soon", "later"):
        bench.schedule(population)
        bench.now += 10
    start = NOW + 5 * MINUTE + 10

    async def long(task):
        assert bench.told()[-1] == ("not run", "second", "busy")
        bench.now += 10  # "soon" fires meanwhile
        assert await bench.scheduler.run_due()
        assert not await bench.scheduler.run_due()
        bench.now += 5
        return SUCCESS

    bench.outcomes["first"] = long
    assert bench.at(start)
    assert bench.ran == ["first"]
    assert bench.told() == [
        ("started", "first", ""),
        ("not run", "second", "busy"),
        ("not run", "soon", "busy"),
        ("ended", "first", ""),
        ("deleted", "first", Removal.SUCCEEDED),
    ]
    for population, now in (("second", start), ("soon", start + 10)):
        task = bench.task(population)
        assert task.reschedule_count == 0
        assert now + 720_000 <= task.earliest_run <= now + 1_080_000
    assert bench.task("later").last_run_start == 0


def test_what_fires_just_before_a_run_ends_fires_into_that_run(bench):
    bench.schedule("first")
    bench.now += 10
    bench.schedule("second")

    async def long(task):
        bench.now += MINUTE
        return SUCCESS

    bench.outcomes["first"] = long
    bench.at(NOW + 5 * MINUTE)
    assert ("not run", "second", "busy") in bench.told()


def test_what_waits_for_its_constraints_does_not_fire_into_a_run(bench):
    bench.schedule("first")
    bench.schedule("second")
    bench.conditions = Conditions(idle=False)
    bench.force("first")
    bench.at(NOW + HOUR)
    assert bench.ran == ["first"]
    assert bench.task("second").last_run_start == 0


def test_a_task_that_outlived_its_time_is_removed_when_it_fires(bench):
    bench.schedule(recurrent=True, minimum_interval=HOUR)
    assert bench.at(NOW + 7 * DAY + 1)
    assert (bench.ran, bench.task()) == ([], None)
    assert bench.told() == [("deleted", "digits", Removal.EXPIRED)]


def test_a_run_is_stopped_after_its_time(bench):
    bench.flag("training_time_limit_secs", "1")
    bench.schedule()
    stopped = []

    async def hang(task):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(task.population)
            raise

    bench.outcomes["digits"] = hang
    assert bench.at(NOW + HOUR)
    assert stopped == ["digits"]
    ended = bench.events[-1]
    assert (ended.kind, ended.reason, ended.counted) == (EventKind.ENDED, "stopped", True)
    assert bench.task().reschedule_count == 1
    assert ended.delay.transient is not None


def test_a_run_that_had_succeeded_when_it_was_stopped_counts(bench):
    bench.flag("training_time_limit_secs", "1")
    bench.schedule()

    async def late(task):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return SUCCESS

    bench.outcomes["digits"] = late
    bench.at(NOW + HOUR)
    assert bench.told()[-1] == ("deleted", "digits", Removal.SUCCEEDED)


@pytest.mark.parametrize(
    ("how", "reason"), [("cancelled", "cancelled"), ("scheduled anew", "cancelled"), ("revoked", "consent")]
)
def test_a_run_that_is_no_longer_wanted_is_stopped(bench, how, reason):
    bench.schedule(recurrent=True, minimum_interval=HOUR)
    stopped = []

    async def run(task):
        bench.now += MINUTE
        if how == "cancelled":
            bench.cancel()
        elif how == "scheduled anew":
            bench.schedule(recurrent=True, minimum_interval=2 * HOUR)
        else:
            with bench.database.write() as tx:
                set_consent(tx, "measurement", False, bench.now)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(task.population)
            raise

    bench.outcomes["digits"] = run
    assert bench.at(NOW + HOUR)
    assert stopped == ["digits"]
    ended = next(event for event in bench.events if event.kind is EventKind.ENDED)
    assert (ended.reason, ended.counted, ended.earliest_run) == (reason, False, None)
    if how == "scheduled anew":
        assert bench.task().earliest_run == NOW + HOUR + MINUTE + 2 * HOUR
    else:
        assert bench.task() is None
    assert (bench.told()[-1] == ("deleted", "digits", Removal.CONSENT)) == (how == "revoked")


def test_without_consent_a_task_is_removed_before_it_tells_a_server_anything(bench):
    bench.schedule()
    with bench.database.write() as tx:
        set_consent(tx, "measurement", False, NOW)
    bench.at(NOW + HOUR)
    assert (bench.ran, bench.task()) == ([], None)
    assert bench.told() == [("deleted", "digits", Removal.CONSENT)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DeviceRunFailed(Reason.SERVER_UNREACHABLE, "3 attempts"), "server_unreachable"),
        (ZeroDivisionError(), "internal"),
    ],
)
def test_a_run_that_raises_is_a_counted_failure(bench, error, reason):
    bench.schedule()
    bench.outcomes["digits"] = error
    assert bench.at(NOW + HOUR)
    assert (bench.events[-1].reason, bench.task().reschedule_count) == (reason, 1)


def test_a_scheduler_that_is_cancelled_ends_its_run_and_the_next_one_takes_it_up(bench):
    bench.schedule()
    began, ended = [], []

    async def hang(task):
        began.append(task)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(task)

    async def stop():
        running = asyncio.create_task(bench.scheduler.run_due())
        while not began:
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()

    bench.outcomes["digits"] = hang
    bench.now = NOW + HOUR
    asyncio.run(stop())
    assert ended == began
    assert not bench.task().pending
    bench.restart()
    assert bench.told()[-1] == ("recovered", "digits", "")
    assert bench.task().earliest_run == NOW + 5 * MINUTE
    bench.outcomes.clear()
    assert bench.at(NOW + HOUR)
    assert bench.told()[-1] == ("deleted", "digits", Removal.SUCCEEDED)


@pytest.mark.parametrize("switch", ["federated_compute_kill_switch", "global_kill_switch"])
def test_a_kill_switch_stops_even_forced_tasks_and_keeps_them(bench, switch):
    bench.schedule()
    bench.flag(switch, "true")
    bench.force()
    assert not bench.at(NOW + HOUR)
    assert bench.scheduler.next_time() == NOW + HOUR + MINUTE
    assert bench.told() == [("waiting", "digits", f"{switch} is on")]
    bench.flag(switch, "false")
    assert bench.at(NOW + HOUR + MINUTE)
    assert bench.ran == ["digits"]


def test_what_another_process_writes_is_seen(bench, tmp_path):
    bench.database.close()
    bench.database = DeviceDatabase(tmp_path / "device.db")
    bench.restart()
    assert bench.scheduler.next_time() is None
    seen = bench.database.changes()
    other = DeviceDatabase(tmp_path / "device.db")
    with other.write() as tx:
        tasks.schedule(tx, ScheduleRequest(OWNER, "digits", "https://learn.example"), NOW, Flags())
        put_flag(tx, "training_min_battery_level", "90")
    assert bench.database.changes() != seen
    assert bench.scheduler.next_time() == NOW + 5 * MINUTE
    bench.conditions = Conditions(battery_percent=89)
    bench.at(NOW + HOUR)
    assert bench.told() == [("not run", "digits", "conditions")]
    with other.write() as tx:
        tasks.cancel(tx, OWNER, "digits")
    assert bench.scheduler.next_time() is None
    other.close()
