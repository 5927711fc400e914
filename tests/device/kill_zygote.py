"""A program whose children work on a device's file and kill themselves at a chosen commit.

Everything is imported once, and each child is a fork. Reads one JSON object a line, {scenario, file, kill}, and answers
each when its child has ended with {signal, commits}; `kill` is [number of a commit, "before" or "after"] or null.
An undisturbed child writes what the file holds after each commit into `{file}.states`.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
from pathlib import Path

from fedcompute.device.client.runtime import RunOutcome
from fedcompute.device.jobs import scheduler as scheduler_module
from fedcompute.device.jobs.background import background_jobs
from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.jobs.flags import Flags
from fedcompute.device.jobs.scheduler import JobScheduler
from fedcompute.device.owner import Owner
from fedcompute.device.state import tasks
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import Contribution
from fedcompute.device.state.tasks import ScheduleRequest

HOUR, DAY = 3_600_000, 86_400_000
CREATED = 1_700_000_000_000
NOW = CREATED + 600_000  # when the children work: what was scheduled at CREATED is due
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
ONE_TIME = ScheduleRequest(OWNER, "digits", "https://learn.example")
RECURRENT = ScheduleRequest(OWNER, "digits", "https://learn.example", True, HOUR)
JOB = OWNER.job_id("digits")


def contents(file):
    """All that a device's file holds, as text."""
    connection = sqlite3.connect(file)
    try:
        return "\n".join(connection.iterdump())
    finally:
        connection.close()


class Device:
    """A scheduler on a file, whose runs do what the scenario says and are noted in `{file}.runs`, as by a server."""

    def __init__(self, database, scenario, now=NOW):
        self.database = database
        self.scenario = scenario
        self.now = now
        self.events = []

    def work(self):
        """Does all there is to do at one moment."""

        async def nothing():
            pass

        jobs = background_jobs(self.database, lambda: self.now, fetch_keys=nothing, download=nothing)
        scheduler = JobScheduler(
            self.database, self.run, jobs, Conditions, lambda: self.now, random.Random(1), self.events.append
        )

        async def drain():
            while await scheduler.run_due():
                pass

        scheduler.start()
        asyncio.run(drain())

    async def run(self, task):
        with Path(f"{self.database.path}.runs").open("a") as runs:
            runs.write("run\n")
        if self.scenario == "cancel during a run":
            self.cancel()
            await asyncio.sleep(60)
        if "failure" in self.scenario:
            return RunOutcome(False, "check_in", "server_answer_invalid", counted=True)
        contribution = Contribution(JOB, "digits", "3", 4, self.now / 1000, resumption_token=b"t")
        return RunOutcome(True, "done", contribution=contribution)

    def schedule(self, request=ONE_TIME):
        with self.database.write() as tx:
            assert tasks.schedule(tx, request, self.now, Flags()) is None

    def cancel(self):
        with self.database.write() as tx:
            tasks.cancel(tx, OWNER, "digits")


def perform(device):
    """What a child does."""
    if device.scenario == "schedule":
        device.schedule()
    else:
        device.work()


class Counted(DeviceDatabase):
    """Counts its commits, and kills its process before or after one of them."""

    commits = 0
    kill = None
    states = None

    @contextlib.contextmanager
    def write(self):
        with super().write() as tx:
            yield tx
            self._reached(self.commits + 1, "before")
        self.commits += 1
        self._reached(self.commits, "after")
        if self.states is not None:
            self.states.append(contents(self.path))

    def _reached(self, number, moment):
        if self.kill == [number, moment]:
            os.kill(os.getpid(), signal.SIGKILL)


def child(order, answer):
    scheduler_module._WATCH_SECONDS = 0.01
    database = Counted(Path(order["file"]))
    database.kill = order["kill"]
    if order["kill"] is None:
        database.states = [contents(database.path)]
    perform(Device(database, order["scenario"]))
    if database.states is not None:
        Path(f"{database.path}.states").write_text(json.dumps(database.states))
    os.write(answer, str(database.commits).encode())


def main():
    for line in sys.stdin:
        order = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(order, write)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        told = os.read(read, 20)
        os.close(read)
        _, status = os.waitpid(pid, 0)
        ended = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "commits": int(told or 0)}
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
