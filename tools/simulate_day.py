"""Two days in the life of a device, on a clock that jumps from one event to the next, as a table.

python tools/simulate_day.py              # the whole trace
python tools/simulate_day.py --lines 60   # its beginning

Fifty tasks of five apps train against a scripted server: runs, HTTP, encryption and training are real, only the time
is not. The network fails, the server turns devices away, keys rotate, the device reboots and loses power, its user
revokes consent. tests/device/test_simulated_day.py works out every time in the trace again.
"""

import argparse
import asyncio
import random
import socket
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scripted_server import START, Answer, Server, artifacts, serve

from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Retries, Transport
from fedcompute.device.client.keys import EncryptionKeys, default_url
from fedcompute.device.client.runtime import Device, DeviceSettings, RunOutcome
from fedcompute.device.developer.examples import training_example
from fedcompute.device.developer.worker import (
    IsolatedWorker,
    TrainingExampleInput,
    TrainingExampleOutput,
    TrainingExampleRecord,
)
from fedcompute.device.jobs.background import background_jobs
from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.jobs.events import Event, describe
from fedcompute.device.jobs.flags import flags
from fedcompute.device.jobs.scheduler import JobScheduler
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanResult, PlanRunner
from fedcompute.device.state import apps, tasks
from fedcompute.device.state.apps import App
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import TaskHistory
from fedcompute.device.state.settings import set_consent
from fedcompute.device.state.tasks import ScheduleRequest, Task
from fedcompute.protos import plan_pb2

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
APPS = ("keyboard", "camera", "health", "maps", "music")


@dataclass(frozen=True)
class Act:
    """What somebody does to the device at a time: an app, its user, or the world."""

    time: int
    who: str
    what: str
    job: str = ""
    request: ScheduleRequest | None = None
    conditions: Conditions | None = None


@dataclass(frozen=True)
class Step:
    """One line of the trace. `source`: the act, the scheduler's event or the server's answer behind it; `stored`: the
    task that an act left behind.
    """

    time: int
    who: str
    job: str
    text: str
    source: Act | Event | Answer
    stored: Task | None = None


def owner_of(job: str) -> Owner:
    """The service that a population belongs to: ten populations each."""
    name = APPS[int(job.rpartition("-")[2]) // 10]
    return Owner(f"org.example.{name}", f"org.example.{name}.Service", "AB" * 32)


def tasks_of_the_day() -> list[Act]:
    """Fifty tasks, scheduled over the first two hours."""
    kinds = [
        *(["faithful"] * 6 + ["patient"] * 6 + ["hopeless"] * 2 + ["stranger"] * 2 + ["unlucky"] * 4),
        *(["postponed"] * 2 + ["junk"] * 8),
        *(["hourly"] * 5 + ["eager"] * 2 + ["separate"] * 4 + ["crowded"] * 4 + ["moody"] * 4 + ["rare"] * 1),
    ]
    intervals = {"hourly": HOUR, "eager": 30 * MINUTE, "separate": 2 * HOUR, "crowded": 3 * HOUR, "moody": 4 * HOUR}
    order = random.Random(1).sample(range(len(kinds)), len(kinds))
    found = []
    for place, number in enumerate(order):
        job = f"{kinds[number]}-{number:02}"
        interval = intervals.get(kinds[number], 9 * 24 * HOUR if kinds[number] == "rare" else 0)
        request = ScheduleRequest(owner_of(job), job, "", interval > 0, interval)
        found.append(Act(START + place * 137 * SECOND, "app", "schedules", job, request))
    return found


def acts_of_the_day() -> list[Act]:
    """All that happens to the device, in order."""
    acts = tasks_of_the_day()
    requests = {act.job: act.request for act in acts}

    def at(hours: float, who: str, what: str, job: str = "", **more: Any) -> None:
        acts.append(Act(START + round(hours * HOUR), who, what, job, **more))

    def again(hours: float, job: str, **change: Any) -> None:
        at(hours, "app", "schedules", job, request=replace(requests[job], **change))

    for hours in (2.31, 2.87, 6.02):  # as it is: a recurrent task, one that is due, one with failures
        again(hours, "hourly-30")
    again(2.5, "hopeless-12")
    again(3.01, "rare-49")
    again(3.3, "hourly-31", minimum_interval=45 * MINUTE)
    again(3.4, "hourly-32", recurrent=False, minimum_interval=0)
    again(9.2, "junk-22")
    at(3.6, "app", "cancels", "eager-35")
    again(3.9, "eager-35")
    at(4.2, "app", "cancels", "junk-23")
    at(4.3, "app", "cancels", "junk-23")
    at(5.0, "world", "reboots")
    at(6.0, "world", "loses the network", conditions=Conditions(network=False))
    at(6.8, "user", "runs now", "hourly-33")
    at(7.5, "world", "is as usual", conditions=Conditions())
    at(8.0, "server", "rotates its keys")
    at(8.2, "user", "is busy", conditions=Conditions(idle=False, load=0.9))
    at(8.9, "world", "is as usual", conditions=Conditions())
    at(9.5, "world", "cuts the wire")
    at(10.1, "world", "mends the wire")
    at(11.4, "world", "cuts the power of the next training")
    at(13.0, "world", "drains the battery", conditions=Conditions(battery_percent=25))
    at(13.6, "world", "charges", conditions=Conditions(battery_percent=60, charging=True))
    at(14.0, "world", "heats up", conditions=Conditions(thermal_status=3))
    at(14.4, "world", "is as usual", conditions=Conditions())
    at(15.0, "world", "is metered", conditions=Conditions(unmetered=False))
    at(15.5, "user", "runs now", "crowded-42")
    at(15.9, "world", "is as usual", conditions=Conditions())
    at(16.0, "server", "rotates its keys")
    at(17.2, "world", "reboots")
    at(20.0, "user", "revokes measurement consent")
    again(20.1, "hourly-30")  # refused
    at(20.5, "user", "gives measurement consent")
    for job in ("hourly-30", "hourly-33", "faithful-00"):
        again(20.6, job)
    at(22.0, "world", "reboots")
    at(23.0, "user", "revokes measurement consent")
    return sorted(acts, key=lambda act: act.time)


class Worker(IsolatedWorker):
    """Two examples, or two that are none."""

    def on_training_examples(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        good = training_example({"x": np.ones(2, np.float32), "y": np.ones(1, np.float32)})
        data = b"junk" if request.population_name.startswith("junk") else good
        return TrainingExampleOutput([TrainingExampleRecord(data, b"1"), TrainingExampleRecord(data, b"2")])


@dataclass
class Day:
    """The device, its world, and the trace of both."""

    folder: Path
    now: int = START
    steps: list[Step] = field(default_factory=list)
    conditions: Conditions = field(default_factory=Conditions)
    history: list[tuple[str, int]] = field(default_factory=list)  # population and count, before the wipe
    running: list[str] = field(default_factory=list)
    worked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.server = Server(
            lambda: self.now, lambda job, answer: self.note("server", job, answer.what, answer), *artifacts()
        )
        self._delays, self._windows, self._pace = random.Random(11), random.Random(12), random.Random(13)
        self._cut = self._power_cut = False
        self._work: asyncio.Task[bool] | None = None
        self._runner = PlanRunner()

    def note(self, who: str, job: str, text: str, source: Act | Event | Answer, stored: Task | None = None) -> None:
        self.steps.append(Step(self.now, who, job, text, source, stored))

    async def live(self, acts: Sequence[Act], end: int) -> None:
        """Lives until `end`; the device's file stays for whoever looks at it."""
        async with Transport(retries=Retries(delay=0.0)) as transport:
            self._transport = transport
            self._boot()
            with self.database.write() as tx:
                for app in APPS:
                    apps.install(tx, App(owner_of(f"x-{APPS.index(app)}0"), self.folder), START)
            ahead = list(acts)
            while self.now < end:
                while ahead and ahead[0].time <= self.now:
                    self._apply(ahead.pop(0))
                await self._drain()
                due = self._scheduler.next_time()
                moments = [due if due is not None else end, ahead[0].time if ahead else end]
                self.now = max(self.now, min(moments))
        self._runner.close()

    async def _drain(self) -> None:
        try:
            busy = True
            while busy:
                self._work = asyncio.ensure_future(self._scheduler.run_due())
                busy = await self._work
        except asyncio.CancelledError:
            self.running.clear()
            self._boot()

    def _boot(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
        self.database = DeviceDatabase(self.folder / "device.db")
        jobs = background_jobs(
            self.database, lambda: self.now, fetch_keys=self._fetch_keys, download=self._count("download")
        )
        self._scheduler = JobScheduler(
            self.database, self._run, jobs, lambda: self.conditions, lambda: self.now, self._delays, self._on_event
        )
        self._scheduler.start()

    def _on_event(self, event: Event) -> None:
        self.note("device", event.job, describe(event), event)

    def _count(self, name: str) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            self.worked[name] += 1

        return work

    def _keys(self, server: str) -> EncryptionKeys:
        return EncryptionKeys(
            self._transport, default_url(server), database=self.database, clock=lambda: self.now / 1000,
            chance=random.Random(1),
        )  # fmt: skip

    async def _fetch_keys(self) -> None:
        self.worked["fetch_keys"] += 1
        await self._keys(self.server.url).fetch()

    async def _run(self, task: Task) -> RunOutcome:
        self.running.append(task.population)
        assert len(self.running) == 1, f"{self.running} run at once"
        server = f"http://localhost:{_closed_port()}" if self._cut else task.server
        device = Device(
            DeviceSettings(server, task.population, task.owner),
            in_process(Worker()),
            transport=self._transport,
            train=self._train,
            history=TaskHistory(self.database),
            keys=self._keys(server),
            clock=lambda: self.now / 1000,
            chance=self._windows,
        )
        outcome = await device.run()
        self.now += self._pace.randint(5 * SECOND, 90 * SECOND)
        self.running.clear()
        return outcome

    async def _train(self, plan: plan_pb2.ClientOnlyPlan, checkpoint: bytes, examples: Sequence[bytes]) -> PlanResult:
        if self._power_cut and self._work is not None:
            self._power_cut = False
            self._work.cancel()
            await asyncio.Event().wait()
        return await self._runner.train(plan, checkpoint, examples)

    def _apply(self, act: Act) -> None:
        text, stored = act.what, None
        if act.conditions is not None:
            self.conditions = act.conditions
        with self.database.write() as tx:
            match act.what:
                case "schedules" if act.request is not None:
                    why = tasks.schedule(tx, replace(act.request, server=self.server.url), self.now, flags(tx))
                    stored = tasks.find(tx, act.request.job_id)
                    mode = f"every {_span(act.request.minimum_interval)}" if act.request.recurrent else "once"
                    text = f"schedules {mode}" if why is None else f"may not schedule: {why}"
                    if stored is not None and why is None:
                        text += f", due at {_clock(stored.earliest_run)}"
                case "cancels":
                    text += "" if tasks.cancel(tx, owner_of(act.job), act.job) else " what is gone"
                case "runs now":
                    tasks.force(tx, owner_of(act.job).job_id(act.job))
                case "revokes measurement consent":
                    set_consent(tx, "measurement", False, self.now)
                    counts = tx.execute("SELECT population, COUNT(*) FROM task_history GROUP BY population")
                    self.history = [(str(job), int(count)) for job, count in counts]
                case "gives measurement consent":
                    set_consent(tx, "measurement", True, self.now)
        self.note(act.who, act.job, text, act, stored)
        match act.what:
            case "reboots":
                self._boot()
            case "rotates its keys":
                self.server.rotate()
            case "cuts the wire" | "mends the wire":
                self._cut = act.what == "cuts the wire"
            case "cuts the power of the next training":
                self._power_cut = True


def simulate(folder: Path) -> Day:
    """Lives two days in a folder; returns them with their trace."""
    day = Day(folder)
    with serve(day.server):
        asyncio.run(day.live(acts_of_the_day(), START + 48 * HOUR))
    return day


def table(steps: Sequence[Step]) -> Iterator[str]:
    """The trace as lines for people."""
    yield f"{'day time':<15}{'who':<8}{'task or job':<22}what"
    for step in steps:
        yield f"{_clock(step.time):<15}{step.who:<8}{step.job:<22}{step.text}".rstrip()


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _span(milliseconds: int) -> str:
    return f"{milliseconds / HOUR:.4g} h" if milliseconds >= HOUR else f"{milliseconds / MINUTE:.4g} min"


def _clock(moment: int) -> str:
    days, rest = divmod(moment - START, 24 * HOUR)
    hours, rest = divmod(rest, HOUR)
    return f"{days} {hours:02}:{rest // MINUTE:02}:{rest % MINUTE / SECOND:06.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=int, help="how many lines to print, by default all")
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory(prefix="fedcompute-day-") as folder:
        day = simulate(Path(folder))
        day.database.close()
    for line in list(table(day.steps))[:lines]:
        print(line)


if __name__ == "__main__":
    main()
