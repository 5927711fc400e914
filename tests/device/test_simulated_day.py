"""Two days of a device (tools/simulate_day.py), and every time in them worked out again from spec/device.md 6."""

import importlib
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedcompute.device.jobs.events import EventKind
from fedcompute.device.state.tasks import Removal

TOOL = Path(__file__).resolve().parents[2] / "tools/simulate_day.py"
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        # Where a script finds its neighbours.
        patch.syspath_prepend(TOOL.parent)
        yield importlib.import_module(TOOL.stem)
    for name in (TOOL.stem, "scripted_server"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def day(tool, tmp_path_factory):
    lived = tool.simulate(tmp_path_factory.mktemp("day"))
    yield lived
    lived.database.close()


def clamp(value, low, high):
    return max(low, min(high, value))


@dataclass
class Expected:
    """What the spec says of one task."""

    recurrent: bool
    interval: int
    earliest: int
    failures: int = 0
    start: int = 0
    end: int = 0
    forced: bool = False
    late: bool = False  # something kept it from firing on time


class Book:
    """Follows the trace line by line, with formulas of its own, and says where the device went another way."""

    def __init__(self, tool):
        self.tool = tool
        self.tasks: dict[str, Expected] = {}
        self.delays, self.windows = random.Random(11), random.Random(12)
        self.consent = True
        self.running = None
        self.since = self.until = 0  # the last run
        self.answers = {}
        self.rounds = {}
        self.contributed = {}
        self.fates = {}
        self.background = {}

    # What others do

    def act(self, step):
        act, now = step.source, step.time
        if act.what == "schedules":
            self.schedule(act, now, step)
        elif act.what == "cancels":
            assert (self.tasks.pop(act.job, None) is None) == step.text.endswith("gone")
            self.fates[act.job] = "cancelled"
        elif act.what == "runs now":
            self.tasks[act.job].forced = True
        elif "consent" in act.what:
            self.consent = act.what.startswith("gives")

    def schedule(self, act, now, step):
        if not self.consent:
            assert "may not" in step.text
            return
        recurrent, interval = act.request.recurrent, act.request.minimum_interval
        bounded = clamp(interval, MINUTE, 6 * DAY)
        task = self.tasks.get(act.job)
        if task is None:
            first = min(bounded, 5 * MINUTE) if recurrent else 5 * MINUTE
            self.tasks[act.job] = task = Expected(recurrent, interval, now + first)
        elif (task.recurrent, task.interval) != (recurrent, interval):
            self.tasks[act.job] = task = Expected(recurrent, interval, now + (bounded if recurrent else 5 * MINUTE))
        else:
            low, high = (MINUTE, 6 * DAY) if recurrent else (0, 2 * DAY)
            task.earliest = now + clamp(task.earliest - now, low, high)
            task.failures = 0
        assert step.stored.earliest_run == task.earliest, step
        assert step.stored.reschedule_count == 0

    def answer(self, step):
        self.answers[step.job] = step.source
        # Of a device's attempts at one check-in, all are in the same round.
        self.rounds[step.job] = (step.time - self.tool.START) // (3 * HOUR)

    # What the device does

    def event(self, step):
        event = step.source
        if event.task is None:
            self.background_event(event)
            return
        task = self.tasks[event.job]
        match event.kind:
            case EventKind.WAITING:
                assert event.time >= task.earliest
                task.late = True
            case EventKind.STARTED:
                assert self.running is None, f"{event.job} runs beside {self.running}"
                self.fire(task, event)
                self.running, self.since = event.job, event.time
                self.answers.pop(event.job, None)
            case EventKind.NOT_RUN:
                assert (self.running is not None) == (event.reason == "busy")
                assert self.running != event.job
                self.fire(task, event)
                task.end = event.time
                self.wait(task, event, self.delays.randint(720_000, 1_080_000))
            case EventKind.ENDED:
                assert self.running == event.job
                self.running, self.until = None, event.time
                self.end(task, event)
            case EventKind.RECOVERED:
                assert self.running == event.job
                self.running, task.late = None, True
                assert event.earliest_run == task.earliest
            case EventKind.DELETED:
                self.delete(task, event)

    def fire(self, task, event):
        if not task.forced:
            assert event.time >= task.earliest
            into_a_run = event.reason == "busy" and self.since <= task.earliest <= event.time
            assert event.time == task.earliest or task.late or into_a_run, f"{event.job} fired late: {event}"
        task.forced = task.late = False
        task.start = event.time

    def wait(self, task, event, delay):
        task.earliest = event.time + delay
        assert event.earliest_run == task.earliest, event
        assert (event.task.last_run_start, event.task.last_run_end) == (task.start, task.end)
        assert event.task.reschedule_count == task.failures
        assert event.task.scheduling_reason == (2 if event.success else 3)

    def end(self, task, event):
        success, counted, server = self.outcome(event)
        assert (event.success, event.counted) == (success, counted), event
        task.end = event.time
        if success:
            self.contributed[event.job] = self.rounds[event.job]
            task.failures = 0
            if not task.recurrent:
                self.fates[event.job] = Removal.SUCCEEDED
                return
            self.wait(task, event, max(clamp(task.interval, MINUTE, 6 * DAY), server))
            return
        task.failures += counted
        if task.failures > (100 if task.recurrent else 6):
            self.fates[event.job] = Removal.FAILED
            return
        self.wait(task, event, server or self.delays.randint(720_000, 1_080_000))

    def outcome(self, event):
        """Success, whether the failure counts, and the server's delay, from what the server said in the run."""
        answer = self.answers.get(event.job)
        if answer is None:
            return False, True, 0  # the wire was cut
        if answer.window is not None:
            low, high = (int(bound * 1000) / 1000 for bound in answer.window)
            if low <= 0 or high <= 0:
                return False, False, 0
            drawn = self.windows.uniform(low, max(low, high))
            return False, False, min(round(drawn * 1000), 2 * DAY)
        if answer.what in ("error 500", "asks for a proof", "loses the upload"):
            return False, True, 0
        if event.job.startswith("junk"):
            return False, True, 0 if answer.what == "takes no failure report" else DAY
        last = self.contributed.get(event.job)
        if "separation" in answer.what and last is not None and self.rounds[event.job] - last < 1:
            return False, False, 0
        return True, False, 0

    def delete(self, task, event):
        if not self.consent:
            assert event.detail == Removal.CONSENT
            assert event.time >= task.earliest
            self.fates[event.job] = Removal.CONSENT
        assert self.fates[event.job] == event.detail
        del self.tasks[event.job]

    def background_event(self, event):
        due, late = self.background.get(event.job, (self.tool.START, False))
        match event.kind:
            case EventKind.WAITING:
                self.background[event.job] = due, True
            case EventKind.STARTED:
                assert self.running is None
                if event.job == "reset_data":
                    due = self.tool.START + 23 * HOUR + DAY
                # One that was due within a run waited for its end.
                assert event.time == due or late or self.since <= due <= event.time == self.until, event
                period = {"download": 6 * HOUR}.get(event.job, DAY)
                self.background[event.job] = event.time + period, False
            case EventKind.ENDED:
                assert event.success
                if event.job == "reset_data":
                    assert event.earliest_run is None
                    self.fates |= dict.fromkeys(self.tasks, "wiped")
                    self.tasks.clear()
                else:
                    assert event.earliest_run == self.background[event.job][0]


@pytest.fixture(scope="module")
def book(tool, day):
    found = Book(tool)
    for step in day.steps:
        if isinstance(step.source, tool.Act):
            found.act(step)
        elif isinstance(step.source, tool.Answer):
            found.answer(step)
        else:
            found.event(step)
    return found


def test_every_time_is_the_one_that_the_spec_gives_and_nothing_runs_beside_another(day, book):
    assert book.running is None
    assert sum(step.text == "started" for step in day.steps) > 300


def test_every_task_is_accounted_for(day, book):
    assert book.tasks == {}
    assert len(book.fates) == 50
    assert set(book.fates.values()) == {Removal.SUCCEEDED, Removal.FAILED, Removal.CONSENT, "cancelled", "wiped"}
    assert {job for job, fate in book.fates.items() if fate == "wiped"} == {"postponed-20", "postponed-21", "rare-49"}
    assert book.fates["junk-23"] == "cancelled"


def test_every_contribution_is_in_the_devices_book_and_at_the_server_exactly_once(day):
    assignments = [assignment for _, assignment, _, _ in day.server.uploads]
    assert len(set(assignments)) == len(assignments) > 150
    before_the_wipe = Counter(job for time, _, job, _ in day.server.uploads)
    assert dict(day.history) == before_the_wipe
    # One report each, three attempts where the server answers 500.
    assert {count for name, count in day.server.reports.items()} == {1, 3}
    assert all(day.server.assignments[name][0] == "junk-29" for name, n in day.server.reports.items() if n == 3)


def test_updates_are_sealed_with_keys_that_the_server_published_lately(tool, day):
    rotations = [tool.START, tool.START + 8 * HOUR, tool.START + 16 * HOUR, tool.START + 90 * DAY]
    for time, _, _, key in day.server.uploads:
        # The server gives a key for four hours.
        assert rotations[key] <= time < rotations[key + 1] + 4 * HOUR
    assert {key for _, _, _, key in day.server.uploads} == {0, 1, 2}


def test_after_the_wipe_nothing_tells_of_the_user(day):
    with day.database.read() as tx:
        names = [row[0] for row in tx.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        full = {name for name in names if tx.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]}
    assert full - {"sqlite_sequence"} == {"app", "encryption_key", "setting", "background_job"}


def test_the_days_have_all_that_can_happen(day):
    events = [step.source for step in day.steps if step.who == "device"]
    assert {event.kind for event in events} == set(EventKind)
    assert {event.reason for event in events} == {
        "", "busy", "conditions", "no_task_available", "not_eligible", "plan_computation_failed",
        "server_answer_invalid", "server_unreachable",
    }  # fmt: skip
    told = {step.source.detail for step in day.steps if step.who == "device" and step.source.kind is EventKind.WAITING}
    assert told == {"no network", "not idle: load 0.90 per processor", "metered network"}
    assert {step.text for step in day.steps if step.who == "server"} >= {
        "assigns", "no task", "error 500", "asks for a proof", "loses the upload", "wants no report",
        "takes no failure report", "assigns with minimum separation",
    }  # fmt: skip


def test_the_table_shows_every_step_in_order(tool, day):
    lines = list(tool.table(day.steps))
    assert len(lines) == len(day.steps) + 1
    moments = [line[:14] for line in lines[1:]]
    assert moments == sorted(moments)
    assert lines[1] == "0 00:00:00.000 app     patient-08            schedules once, due at 0 00:05:00.000"
