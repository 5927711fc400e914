"""A device at work: its tasks when they are due, its background jobs, until it is told to stop (spec/device.md 6)."""

import asyncio
import functools
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fedcompute.device.client.authorization import Prove
from fedcompute.device.client.downloads import Discarded, fetch_download
from fedcompute.device.client.http import Retries, Transport
from fedcompute.device.client.keys import EncryptionKeys, default_url
from fedcompute.device.client.runtime import Device, DeviceSettings, RunOutcome
from fedcompute.device.developer.worker import TrainingExampleInput, TrainingExampleOutput
from fedcompute.device.directory import DeviceDirectory
from fedcompute.device.isolation.process import START_SECONDS
from fedcompute.device.isolation.trainer import IsolatedTrainer
from fedcompute.device.jobs.background import background_jobs
from fedcompute.device.jobs.conditions import Conditions
from fedcompute.device.jobs.events import Event, EventKind
from fedcompute.device.jobs.flags import Flags, flags
from fedcompute.device.jobs.scheduler import JobScheduler
from fedcompute.device.jobs.sensors import Places, read_conditions
from fedcompute.device.personalization import Personalization
from fedcompute.device.situation import user_data
from fedcompute.device.state.apps import App, list_apps
from fedcompute.device.state.device_log import LogEntry, write_entry
from fedcompute.device.state.history import TaskHistory
from fedcompute.device.state.tasks import Task, list_tasks
from fedcompute.errors import FedComputeError, OperationFailed, Reason

# What commands write into the device's file is noticed within this time.
_LOOK_SECONDS = 1.0
# Between two attempts to go on where the device's file cannot be read or written.
_STORAGE_SECONDS = 10.0
# The limit of an operation itself comes first, and its service's words are kept then; a process starts before that.
_EXAMPLES_GRACE_SECONDS = START_SECONDS + 5.0

_LOG = logging.getLogger(__name__)


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def printable(text: str) -> str:
    """The text without what a terminal would obey; a server has a say in some of it."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


@dataclass(frozen=True)
class DaemonSettings:
    """How a device runs. `strict`: nothing of a developer or a plan runs where the kernel enforces less than all of its
    isolation. `prove`: answers servers' challenges. `linger`: seconds for which an idle training process is kept.
    `on_event`: is told what the scheduler does; `on_phase`: the population of a run and each phase that it enters.
    """

    strict: bool = True
    prove: Prove | None = None
    linger: float = 60.0
    on_event: Callable[[Event], None] = lambda event: None
    on_phase: Callable[[str, str], None] = lambda population, phase: None


class DeviceDaemon:
    """What runs tasks and background jobs of one directory; made by `open_daemon`."""

    def __init__(self, device: DeviceDirectory, settings: DaemonSettings, transport: Transport, rules: Flags) -> None:
        self._database = device.database
        self._settings = settings
        self._transport = transport
        self._history = TaskHistory(device.database)
        self._places = Places(temporary=device.scratch)
        self._trainer = IsolatedTrainer(
            device.scratch,
            memory=rules.integer("training_memory_bytes"),
            time_limit=float(rules.integer("training_time_limit_secs")),
            linger=settings.linger,
            strict=settings.strict,
        )
        self.personalization = Personalization(
            device.database,
            clock=now_ms,
            user_data=lambda: user_data(self._conditions()),
            strict=settings.strict,
        )
        jobs = background_jobs(device.database, now_ms, fetch_keys=self._fetch_keys, download=self.download)
        self.scheduler = JobScheduler(
            device.database,
            self._run,
            jobs,
            self._conditions,
            now_ms,
            random.Random(),
            on_event=self._tell,
        )

    async def serve(self) -> None:
        """Runs what is due, for ever. Cancel it to stop; a run in progress is then taken up at the next start.

        While the device's file cannot be read or written it waits, says so once, and goes on as after a start.
        """
        told = False
        while True:
            try:
                self.scheduler.start()
                while True:
                    await self._turn()
                    told = False
            except OperationFailed as error:
                if error.reason is not Reason.STORAGE_FAILED:
                    raise
                if not told:
                    _LOG.warning("%s; trying again every %.0f s", error.detail, _STORAGE_SECONDS)
                told = True
            await asyncio.sleep(_STORAGE_SECONDS)

    async def _turn(self) -> None:
        """One job, or, with none that may run, a pause until there may be one."""
        seen = self._database.changes()
        if await self.scheduler.run_due():
            return
        due = self.scheduler.next_time()
        while (due is None or now_ms() < due) and self._database.changes() == seen:
            wait = _LOOK_SECONDS if due is None else min(_LOOK_SECONDS, max(due - now_ms(), 0) / 1000)
            await asyncio.sleep(wait)

    async def run_forced(self) -> None:
        """Runs the tasks that `tasks.force` has marked, and nothing else."""
        self.scheduler.start()
        await self.scheduler.run_forced()

    async def download(self) -> None:
        """Fetches what installed apps' vendors publish, and hands it to their services.

        An app that fails does not keep the others from theirs; the failure stands in the device's log.
        """
        with self._database.read() as tx:
            apps, rules = list_apps(tx), flags(tx)
        for app in apps:
            url = _download_url(app, rules)
            if url is None:
                continue
            try:
                outcome, detail = await self._download(app, url)
            except FedComputeError as error:
                outcome, detail = error.reason.value, error.detail
            with self._database.write() as tx:
                write_entry(tx, LogEntry(now_ms(), app.owner.digest, "download", outcome, detail))

    async def close(self) -> None:
        """Ends the training process."""
        await self._trainer.close()

    async def _run(self, task: Task) -> RunOutcome:
        with self._database.read() as tx:
            rules = flags(tx)
        settings = DeviceSettings(
            server=task.server,
            population=task.population,
            owner=task.owner,
            key_url=rules.text("fcp_encryption_key_download_url") or None,
            encryption=rules.boolean("fcp_enable_encryption"),
            eligibility=rules.boolean("enable_eligibility_task"),
            example_timeout=rules.integer("example_store_service_timeout_sec") + _EXAMPLES_GRACE_SECONDS,
            failed_training_delay=float(rules.integer("tf_error_reschedule_seconds")),
            checkpoint_bytes_limit=rules.integer("checkpoint_file_size_limit"),
        )

        async def examples(request: TrainingExampleInput) -> TrainingExampleOutput:
            return await self.personalization.training_examples(task.owner, request)

        device = Device(
            settings,
            examples,
            transport=self._transport,
            train=functools.partial(self._trainer.train, task.owner.digest),
            history=self._history,
            on_state=functools.partial(self._settings.on_phase, task.population),
            prove=self._settings.prove,
        )
        return await device.run()

    async def _fetch_keys(self) -> None:
        """Fetches the keys of every key service that tasks use; one that fails does not keep the others from it."""
        with self._database.read() as tx:
            rules, tasks = flags(tx), list_tasks(tx)
        configured = rules.text("fcp_encryption_key_download_url")
        urls = {configured} if configured else {default_url(task.server) for task in tasks}
        failed: FedComputeError | None = None
        for url in sorted(urls):
            try:
                await EncryptionKeys(self._transport, url, database=self._database).fetch()
            except FedComputeError as error:
                failed = error
        if failed is not None:
            raise failed

    async def _download(self, app: App, url: str) -> tuple[str, str]:
        """Outcome and details, for the log."""
        found = await fetch_download(self._transport, url, app.sync_token)
        if isinstance(found, Discarded):
            return "discarded", found.why
        rows = await self.personalization.complete_download(app, found.contents, found.sync_token)
        return "ok", f"{len(found.contents)} values came, remote data has {rows} now"

    def _conditions(self) -> Conditions:
        with self._database.read() as tx:
            return read_conditions(flags(tx), self._places)

    def _tell(self, event: Event) -> None:
        if event.kind in (EventKind.ENDED, EventKind.DELETED, EventKind.NOT_RUN):
            owner = None if event.task is None else event.task.owner.digest
            outcome = "ok" if event.success else event.reason or event.kind.value.replace(" ", "_")
            with self._database.write() as tx:
                write_entry(tx, LogEntry(event.time, owner, event.job, outcome, _details(event)))
        self._settings.on_event(event)


@asynccontextmanager
async def open_daemon(device: DeviceDirectory, settings: DaemonSettings) -> AsyncIterator[DeviceDaemon]:
    """A daemon that has the directory for itself, to the end of the block.

    Raises OperationFailed: DATA_IN_USE if another process runs the device, as `DeviceDirectory.alone`.
    """
    with device.database.read() as tx:
        rules = flags(tx)
    retries = Retries(
        rules.integer("http_request_retry_limit"), rules.integer("http_request_retry_delay_millis") / 1000
    )
    with device.alone():
        async with Transport(retries=retries, connections=8) as transport:
            daemon = DeviceDaemon(device, settings, transport, rules)
            try:
                yield daemon
            finally:
                await daemon.close()


def _details(event: Event) -> str:
    """What an entry of the device's log says beside job and outcome."""
    parts = [event.detail] if event.detail else []
    parts += ["counted"] if event.counted else []
    parts += [f"next in {event.delay.milliseconds / 1000:.0f} s"] if event.delay is not None else []
    return printable("; ".join(parts))


def _download_url(app: App, rules: Flags) -> str | None:
    if rules.text("override_download_url_package") == app.owner.package:
        return rules.text("override_download_url") or app.download
    return app.download
