"""How a task moves from run to run: the tables of spec/device.md 6.3 and 6.6, and what is refused."""

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedcompute.device.jobs.flags import Flags
from fedcompute.device.owner import Owner
from fedcompute.device.state import tasks
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.settings import set_consent
from fedcompute.device.state.tasks import Removal, Rescheduled, ScheduleRequest, SchedulingReason

NOW = 1_700_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
DEFAULTS = Flags()
ONE_TIME = ScheduleRequest(OWNER, "digits", "https://learn.example")
HOURLY = replace(ONE_TIME, recurrent=True, minimum_interval=HOUR)


@pytest.fixture
def tx():
    database = DeviceDatabase()
    with database.write() as transaction:
        yield transaction
    database.close()


def scheduled(tx, request, now=NOW, flags=DEFAULTS):
    assert tasks.schedule(tx, request, now, flags) is None
    return tasks.find(tx, request.job_id)


def after_run(tx, request, start, end, **ended):
    """Runs a task that is scheduled, due or not; returns what the end of its run made of it."""
    tasks.force(tx, request.job_id)
    started = tasks.start_run(tx, request.job_id, start, DEFAULTS)
    return tasks.end_run(tx, started, end, DEFAULTS, random.Random(1), **{"success": True, "counted": False} | ended)


def test_a_new_task_is_stored_as_requested_and_registers_its_population(tx):
    task = scheduled(tx, HOURLY)
    assert task == tasks.Task(
        job_id=OWNER.job_id("digits"), owner=OWNER, population="digits", server="https://learn.example",
        recurrent=True, minimum_interval=HOUR, created=NOW, last_scheduled=NOW, earliest_run=NOW + 5 * MINUTE,
        scheduling_reason=SchedulingReason.NEW_TASK,
    )  # fmt: skip
    assert tx.execute("SELECT * FROM registration").fetchall() == [(OWNER.digest, "digits", task.job_id)]


def test_a_cancelled_task_is_gone_and_its_registration_stays(tx):
    task = scheduled(tx, ONE_TIME)
    assert tasks.cancel(tx, OWNER, "digits")
    assert not tasks.cancel(tx, OWNER, "digits")
    assert tasks.find(tx, task.job_id) is None
    assert tx.execute("SELECT COUNT(*) FROM registration").fetchone() == (1,)


def test_a_task_scheduled_again_keeps_its_time_and_gets_a_new_server_and_life(tx):
    first = scheduled(tx, ONE_TIME)
    again = scheduled(tx, replace(ONE_TIME, server="https://other.example"), NOW + MINUTE)
    assert again == replace(first, server="https://other.example", last_scheduled=NOW + MINUTE)


def test_scheduling_again_does_not_postpone_a_due_one_time_task_and_gives_a_recurrent_one_a_minute(tx):
    scheduled(tx, ONE_TIME)
    assert scheduled(tx, ONE_TIME, NOW + HOUR).earliest_run == NOW + HOUR
    tasks.cancel(tx, OWNER, "digits")
    scheduled(tx, HOURLY)
    assert scheduled(tx, HOURLY, NOW + HOUR).earliest_run == NOW + HOUR + MINUTE


def test_scheduling_again_forgets_failures_and_shortens_no_wait(tx):
    scheduled(tx, ONE_TIME)
    failed = after_run(tx, ONE_TIME, NOW + HOUR, NOW + HOUR + 5, success=False, counted=True, retry_window=7200.0).task
    assert (failed.reschedule_count, failed.scheduling_reason) == (1, SchedulingReason.FAILURE)
    again = scheduled(tx, ONE_TIME, NOW + 2 * HOUR)
    assert again.reschedule_count == 0
    # Its time and reason stand: nothing had to be scheduled anew.
    assert (again.earliest_run, again.scheduling_reason) == (NOW + 3 * HOUR + 5, SchedulingReason.FAILURE)


@pytest.mark.parametrize(
    ("changed", "delay"), [(replace(HOURLY, minimum_interval=2 * HOUR), 2 * HOUR), (ONE_TIME, 5 * MINUTE)]
)
def test_another_interval_or_mode_starts_a_task_anew(tx, changed, delay):
    scheduled(tx, HOURLY)
    after_run(tx, HOURLY, NOW + HOUR, NOW + HOUR + 5)
    anew = scheduled(tx, changed, NOW + 2 * HOUR)
    assert (anew.earliest_run, anew.scheduling_reason) == (NOW + 2 * HOUR + delay, SchedulingReason.NEW_TASK)
    assert (anew.last_run_start, anew.last_run_end, anew.created) == (0, 0, NOW)


def test_scheduling_again_leaves_a_run_in_progress_alone(tx):
    scheduled(tx, HOURLY)
    started = tasks.start_run(tx, HOURLY.job_id, NOW + HOUR, DEFAULTS)
    again = scheduled(tx, HOURLY, NOW + HOUR + 614_999)
    assert again == replace(started, last_scheduled=NOW + HOUR + 614_999)
    assert tasks.running(tx, started) == again


def test_a_run_of_which_nothing_was_heard_for_ten_minutes_is_scheduled_again(tx):
    scheduled(tx, HOURLY)
    started = tasks.start_run(tx, HOURLY.job_id, NOW + HOUR, DEFAULTS)
    late = NOW + HOUR + 615_000
    assert scheduled(tx, HOURLY, late).earliest_run == late + MINUTE
    assert tasks.running(tx, started) is None


def test_a_run_that_was_cut_off_is_scheduled_again_even_where_its_time_stands(tx):
    scheduled(tx, HOURLY)
    after_run(tx, HOURLY, NOW, NOW)
    tasks.force(tx, HOURLY.job_id)
    tasks.start_run(tx, HOURLY.job_id, NOW + MINUTE, DEFAULTS)
    again = scheduled(tx, HOURLY, NOW + MINUTE + 615_000)
    assert (again.pending, again.earliest_run) == (True, NOW + HOUR)


def test_the_end_of_a_run_that_was_taken_for_lost_does_not_end_the_next_one(tx):
    scheduled(tx, HOURLY)
    lost = tasks.start_run(tx, HOURLY.job_id, NOW + HOUR, DEFAULTS)
    tasks.recover_orphans(tx)
    started = tasks.start_run(tx, HOURLY.job_id, NOW + 2 * HOUR, DEFAULTS)
    assert tasks.end_run(tx, lost, NOW + 2 * HOUR, DEFAULTS, random.Random(1), success=True, counted=False) is None
    assert tasks.running(tx, started) == started


@pytest.mark.parametrize("meanwhile", ["cancelled", "changed", "cancelled and scheduled"])
def test_the_end_of_a_run_that_is_nobodys_changes_nothing(tx, meanwhile):
    scheduled(tx, HOURLY)
    started = tasks.start_run(tx, HOURLY.job_id, NOW + HOUR, DEFAULTS)
    if "cancelled" in meanwhile:
        tasks.cancel(tx, OWNER, "digits")
    if meanwhile != "cancelled":
        scheduled(tx, ONE_TIME, NOW + 2 * HOUR)
    before = tasks.list_tasks(tx)
    ended = tasks.end_run(tx, started, NOW + 3 * HOUR, DEFAULTS, random.Random(1), success=True, counted=False)
    assert (ended, tasks.list_tasks(tx)) == (None, before)


@pytest.mark.parametrize("switch", ["federated_compute_kill_switch", "global_kill_switch"])
def test_with_a_kill_switch_on_nothing_is_scheduled(tx, switch):
    assert tasks.schedule(tx, ONE_TIME, NOW, Flags({switch: True})) == f"{switch} is on"
    assert tasks.list_tasks(tx) == ()
    assert tx.execute("SELECT COUNT(*) FROM registration").fetchone() == (0,)


def test_without_consent_nothing_is_scheduled(tx):
    set_consent(tx, "measurement", False, NOW)
    assert tasks.schedule(tx, ONE_TIME, NOW, DEFAULTS) == "measurement consent is revoked"
    set_consent(tx, "measurement", True, NOW)
    set_consent(tx, "protected_audience", False, NOW)
    assert tasks.schedule(tx, ONE_TIME, NOW, DEFAULTS) is None


def test_a_package_has_fifty_tasks_and_may_renew_each(tx):
    for number in range(50):
        other = replace(OWNER, class_name=f"org.example.app.Service{number % 7}")
        scheduled(tx, replace(ONE_TIME, owner=other, population=f"p{number}"))
    why = tasks.schedule(tx, replace(ONE_TIME, population="one more"), NOW, DEFAULTS)
    assert why == "50 tasks of package org.example.app, the limit is 50"
    assert len(tasks.list_tasks(tx)) == 50
    first = replace(OWNER, class_name="org.example.app.Service0")
    assert tasks.schedule(tx, replace(ONE_TIME, owner=first, population="p0"), NOW, DEFAULTS) is None
    assert tasks.schedule(tx, replace(ONE_TIME, owner=Owner("org.other", "org.other.S")), NOW, DEFAULTS) is None


def test_a_job_id_that_another_task_has_is_refused(tx):
    # "Aa" and "BB" have the same hash.
    scheduled(tx, replace(ONE_TIME, population="Aa"))
    why = tasks.schedule(tx, replace(ONE_TIME, population="BB"), NOW, DEFAULTS)
    assert why == f"job id {OWNER.job_id('Aa')} is taken by another task; choose another name"
    assert [task.population for task in tasks.list_tasks(tx)] == ["Aa"]


def test_a_task_is_not_cancelled_by_another_name_with_its_job_id(tx):
    scheduled(tx, replace(ONE_TIME, population="Aa"))
    assert not tasks.cancel(tx, OWNER, "BB")
    assert [task.population for task in tasks.list_tasks(tx)] == ["Aa"]
    assert tasks.cancel(tx, OWNER, "Aa")


def test_the_populations_that_are_remembered_without_a_task_are_limited(tx, monkeypatch):
    monkeypatch.setattr(tasks, "REGISTRATIONS_LIMIT", 3)
    scheduled(tx, replace(ONE_TIME, population="kept"))
    for number in range(6):
        scheduled(tx, replace(ONE_TIME, population=f"p{number}"))
        tasks.cancel(tx, OWNER, f"p{number}")
    scheduled(tx, replace(ONE_TIME, population="last"))
    names = [name for (name,) in tx.execute("SELECT population FROM registration ORDER BY rowid")]
    assert names == ["kept", "p4", "p5", "last"]


@pytest.mark.parametrize("name", ["", " ", "a/b", "a?b", "a#b", "a%b", "a\n", " a", "a" * 256])
def test_what_cannot_stand_in_a_url_is_no_population(name):
    assert not tasks.is_population(name)


@pytest.mark.parametrize("name", ["digits", "my population", "ziffern-ä", "a" * 255])
def test_other_names_are_populations(name):
    assert tasks.is_population(name)


def test_due_are_the_forced_then_the_longest_due(tx):
    for population, now in (("late", NOW + 2), ("early", NOW), ("later", NOW + HOUR), ("forced", NOW + HOUR)):
        scheduled(tx, replace(ONE_TIME, population=population), now)
    assert tasks.force(tx, OWNER.job_id("forced"))
    assert not tasks.force(tx, 7)
    moment = NOW + 5 * MINUTE
    assert [task.population for task in tasks.due(tx, moment)] == ["forced", "early"]
    assert [task.population for task in tasks.due(tx, moment + 2)] == ["forced", "early", "late"]
    started = tasks.start_run(tx, OWNER.job_id("forced"), moment, DEFAULTS)
    assert (started.forced, started.pending, started.last_run_start) == (False, False, moment)
    assert [task.population for task in tasks.due(tx, moment)] == ["early"]


def test_a_run_starts_once_and_not_before_it_is_due(tx):
    due = scheduled(tx, ONE_TIME).earliest_run
    assert tasks.start_run(tx, ONE_TIME.job_id, due - 1, DEFAULTS) is None
    assert tasks.start_run(tx, ONE_TIME.job_id, due, DEFAULTS) is not None
    assert tasks.start_run(tx, ONE_TIME.job_id, due, DEFAULTS) is None
    assert tasks.start_run(tx, 7, due, DEFAULTS) is None


@pytest.mark.parametrize(
    ("ttl", "age", "gone"), [(604_800, 7 * DAY, False), (604_800, 7 * DAY + 1, True), (0, 10**12, False)]
)
def test_a_task_not_scheduled_for_seven_days_is_removed_when_it_fires(tx, ttl, age, gone):
    scheduled(tx, HOURLY)
    found = tasks.start_run(tx, HOURLY.job_id, NOW + age, Flags({"task_ttl_secs": ttl}))
    assert (found == Removal.EXPIRED) == gone == (tasks.find(tx, HOURLY.job_id) is None)


def test_a_task_without_consent_is_removed_when_it_fires_and_when_its_run_ends(tx):
    scheduled(tx, HOURLY)
    scheduled(tx, replace(HOURLY, population="other"))
    started = tasks.start_run(tx, HOURLY.job_id, NOW + HOUR, DEFAULTS)
    set_consent(tx, "measurement", False, NOW + HOUR)
    assert tasks.start_run(tx, OWNER.job_id("other"), NOW + HOUR, DEFAULTS) == Removal.CONSENT
    ended = tasks.end_run(tx, started, NOW + HOUR, DEFAULTS, random.Random(1), success=True, counted=False)
    assert ended == Removal.CONSENT
    assert tasks.list_tasks(tx) == ()


def test_a_one_time_task_ends_with_its_success(tx):
    scheduled(tx, ONE_TIME)
    assert after_run(tx, ONE_TIME, NOW, NOW + 5) == Removal.SUCCEEDED
    assert tasks.list_tasks(tx) == ()


@pytest.mark.parametrize(
    ("request_", "ended", "delay"),
    [
        (HOURLY, {"success": True}, HOUR),
        (HOURLY, {"success": True, "retry_window": 7200.0}, 2 * HOUR),
        (HOURLY, {"success": False, "retry_window": 60.5}, 60_500),
        (ONE_TIME, {"success": False, "retry_window": 1e9}, 2 * DAY),
        (ONE_TIME, {"success": False, "counted": True, "retry_window": 86_400.0}, DAY),
        (ONE_TIME, {"success": False, "counted": True}, random.Random(1).randint(720_000, 1_080_000)),
    ],
)
def test_after_a_run_a_task_waits_as_long_as_the_spec_says(tx, request_, ended, delay):
    scheduled(tx, request_)
    found = after_run(tx, request_, NOW + HOUR, NOW + HOUR + 5, **ended)
    assert isinstance(found, Rescheduled)
    assert found.task == tasks.find(tx, request_.job_id)
    assert found.task.earliest_run == NOW + HOUR + 5 + delay
    assert (found.task.last_run_start, found.task.last_run_end) == (NOW + HOUR, NOW + HOUR + 5)
    assert (found.task.pending, found.task.scheduling_reason) == (True, 2 if ended["success"] else 3)


@pytest.mark.parametrize(("request_", "limit"), [(ONE_TIME, 6), (HOURLY, 100)])
def test_one_counted_failure_above_the_limit_removes_a_task(tx, request_, limit):
    scheduled(tx, request_)
    for number in range(1, limit + 1):
        after_run(tx, request_, NOW, NOW, success=False)
        assert after_run(tx, request_, NOW, NOW, success=False, counted=True).task.reschedule_count == number
    assert after_run(tx, request_, NOW, NOW, success=False).task.reschedule_count == limit
    assert after_run(tx, request_, NOW, NOW, success=False, counted=True) == Removal.FAILED
    assert tasks.list_tasks(tx) == ()


def test_a_success_forgets_the_failures_before(tx):
    scheduled(tx, HOURLY)
    after_run(tx, HOURLY, NOW, NOW, success=False, counted=True)
    assert after_run(tx, HOURLY, NOW, NOW).task.reschedule_count == 0


def test_orphans_are_due_again_as_they_were(tx):
    scheduled(tx, HOURLY)
    waiting = scheduled(tx, replace(HOURLY, population="other"))
    started = tasks.start_run(tx, HOURLY.job_id, NOW + HOUR, DEFAULTS)
    assert tasks.recover_orphans(tx) == (replace(started, pending=True),)
    assert tasks.recover_orphans(tx) == ()
    assert tasks.find(tx, HOURLY.job_id).earliest_run == NOW + 5 * MINUTE
    assert tasks.find(tx, waiting.job_id) == waiting


def test_the_limit_of_failures_is_a_flag_and_only_what_counts_is_measured_by_it(tx):
    scheduled(tx, ONE_TIME)
    after_run(tx, ONE_TIME, NOW, NOW, success=False, counted=True)
    rules = Flags({"reschedule_limit": 0})
    for counted, kept in ((False, True), (True, False)):
        tasks.force(tx, ONE_TIME.job_id)
        started = tasks.start_run(tx, ONE_TIME.job_id, NOW, rules)
        ended = tasks.end_run(tx, started, NOW, rules, random.Random(1), success=False, counted=counted)
        assert (ended != Removal.FAILED) == kept


class Life(RuleBasedStateMachine):
    """Anything may happen to a task at any time, and these always hold."""

    def __init__(self):
        super().__init__()
        self.database = DeviceDatabase()
        self.now = NOW
        self.chance = random.Random(1)
        self.run = None

    def teardown(self):
        self.database.close()

    @rule(delay=st.integers(1, 3 * DAY))
    def time_passes(self, delay):
        self.now += delay

    @rule(recurrent=st.booleans(), interval=st.sampled_from([1, HOUR, 9 * DAY]))
    def schedule(self, recurrent, interval):
        request = replace(ONE_TIME, recurrent=recurrent, minimum_interval=interval)
        with self.database.write() as tx:
            assert tasks.schedule(tx, request, self.now, DEFAULTS) is None
            task = tasks.find(tx, request.job_id)
        assert (task.last_scheduled, task.reschedule_count) == (self.now, 0)
        assert not task.pending or task.earliest_run <= self.now + 6 * DAY

    @rule()
    def cancel(self):
        with self.database.write() as tx:
            tasks.cancel(tx, OWNER, "digits")

    @precondition(lambda self: self.run is None)
    @rule()
    def fire(self):
        with self.database.write() as tx:
            due = tasks.due(tx, self.now)
            started = tasks.start_run(tx, ONE_TIME.job_id, self.now, DEFAULTS) if due else None
        assert not due or started is not None
        self.run = started if isinstance(started, tasks.Task) else None

    @precondition(lambda self: self.run is not None)
    @rule(success=st.booleans(), counted=st.booleans(), window=st.none() | st.floats(0, 1e6))
    def end(self, success, counted, window):
        with self.database.write() as tx:
            owned = tasks.running(tx, self.run)
            before = tasks.list_tasks(tx)
            ended = tasks.end_run(
                tx, self.run, self.now, DEFAULTS, self.chance,
                success=success, counted=counted, retry_window=window,
            )  # fmt: skip
            after = tasks.list_tasks(tx)
        self.run = None
        if owned is None:
            assert (ended, after) == (None, before)
        elif isinstance(ended, Rescheduled):
            assert after == (ended.task,)
            assert self.now < ended.task.earliest_run <= self.now + 6 * DAY
        else:
            assert after == ()

    @rule()
    def restart(self):
        self.run = None
        with self.database.write() as tx:
            tasks.recover_orphans(tx)

    @invariant()
    def a_task_is_pending_or_running(self):
        with self.database.read() as tx:
            found = tasks.list_tasks(tx)
        assert len(found) <= 1
        assert all(task.pending or self.run is not None for task in found)
        assert all(task.reschedule_count <= (100 if task.recurrent else 6) for task in found)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
