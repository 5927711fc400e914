"""A scheduler on a virtual clock with runs that end as the test says."""

import asyncio
import random

import pytest

from fedcompute.device.client.runtime import RunOutcome
from fedcompute.device.jobs.background import BackgroundJob
from fedcompute.device.jobs.conditions import Conditions, Constraint
from fedcompute.device.jobs.flags import Flags, put_flag
from fedcompute.device.jobs.scheduler import JobScheduler
from fedcompute.device.owner import Owner
from fedcompute.device.state import tasks
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.tasks import ScheduleRequest

NOW = 1_700_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
SUCCESS = RunOutcome(success=True, phase="done")


class Bench:
    """A device's file, a clock, and a scheduler whose runs do what `run` says."""

    def __init__(self):
        self.database = DeviceDatabase()
        self.now = NOW
        self.conditions = Conditions()
        self.events = []
        self.ran = []
        self.outcomes = {}
        self.background = {}
        self.restart()

    def restart(self):
        self.scheduler = JobScheduler(
            self.database, self.run, self.background, lambda: self.conditions, lambda: self.now,
            random.Random(1), self.events.append,
        )  # fmt: skip
        self.scheduler.start()

    async def run(self, task):
        self.ran.append(task.population)
        outcome = self.outcomes.get(task.population, SUCCESS)
        if isinstance(outcome, Exception):
            raise outcome
        return await outcome(task) if callable(outcome) else outcome

    def schedule(self, population="digits", **request):
        with self.database.write() as tx:
            request = ScheduleRequest(OWNER, population, "https://learn.example", **request)
            assert tasks.schedule(tx, request, self.now, Flags()) is None

    def cancel(self, population="digits"):
        with self.database.write() as tx:
            tasks.cancel(tx, OWNER, population)

    def force(self, population="digits"):
        with self.database.write() as tx:
            tasks.force(tx, OWNER.job_id(population))

    def flag(self, name, text):
        with self.database.write() as tx:
            put_flag(tx, name, text)

    def task(self, population="digits"):
        with self.database.read() as tx:
            return tasks.find(tx, OWNER.job_id(population))

    def at(self, now):
        """Whether something ran at a time."""
        self.now = now
        return asyncio.run(self.scheduler.run_due())

    def told(self, *kinds):
        return [(event.kind.value, event.job, event.reason or event.detail) for event in self.events
                if not kinds or event.kind in kinds]  # fmt: skip


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.database.close()


class Jobs:
    """Background jobs that note their work."""

    def __init__(self, bench):
        self.bench, self.done, self.error = bench, [], None
        for name, period, constraints, switches in (
            ("clean", DAY, frozenset({Constraint.IDLE}), ("global_kill_switch",)),
            ("fetch", 4 * HOUR, frozenset(), ("federated_compute_kill_switch",)),
            ("reset_data", None, frozenset(), ()),
        ):
            bench.background[name] = BackgroundJob(name, 1, period, constraints, self.work(name), switches)
        bench.restart()

    def work(self, name):
        async def work():
            self.done.append((name, self.bench.now))
            self.bench.now += 7
            if self.error is not None:
                raise self.error

        return work


@pytest.fixture
def jobs(bench):
    return Jobs(bench)
