"""A device with one app, whose services run in isolation."""

import asyncio
from dataclasses import replace

import pytest

from fedcompute.device.developer.user_data import UserData
from fedcompute.device.developer.worker import TrainingExampleInput, WebTriggerInput
from fedcompute.device.isolation.worker_call import WorkerFailed
from fedcompute.device.jobs.flags import put_flag
from fedcompute.device.owner import Owner
from fedcompute.device.personalization import Personalization, schedule_task
from fedcompute.device.state import key_values, tasks
from fedcompute.device.state.apps import App, install
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.device_log import read_entries
from fedcompute.device.state.settings import set_consent

NOW = 1_700_000_000_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)
SERVER = "https://learn.example"
CALLER = "org.example.caller"


class Bench:
    """A device's file with one app, and the operations on it."""

    def __init__(self, folder, write_service):
        self.folder, self._write_service = folder, write_service
        self.database = DeviceDatabase(folder / "device.db")
        self.operations = self.made()
        self.app = App(OWNER, folder / "app", SERVER)

    def made(self, **changes):
        given = {"clock": lambda: NOW, "user_data": lambda: UserData(carrier="carrier", battery_percentage=77)}
        return Personalization(self.database, **{**given, **changes})

    def install(self, hooks="", **changes):
        self.app = replace(self.app, code=self._write_service(self.folder / "app", hooks), **changes)
        with self.database.write() as tx:
            install(tx, self.app, NOW)

    def flag(self, name, value):
        with self.database.write() as tx:
            put_flag(tx, name, str(value))

    def revoke(self, *names):
        with self.database.write() as tx:
            for name in names:
                set_consent(tx, name, False, NOW)

    def remote(self, **values):
        with self.database.write() as tx:
            for key, value in values.items():
                key_values.put_value(tx, "remote_data", self.app.owner, key, value)

    def values(self, table):
        with self.database.read() as tx:
            keys = key_values.key_set(tx, table, self.app.owner)
            return {key: key_values.get_value(tx, table, self.app.owner, key) for key in keys}

    def schedule(self, population="digits"):
        schedule_task(self.database, self.app, population, False, 0, NOW)

    def task(self, population="digits"):
        with self.database.read() as tx:
            return tasks.find(tx, self.app.owner.job_id(population))

    def entries(self):
        with self.database.read() as tx:
            return read_entries(tx)

    def requests(self):
        with self.database.read() as tx:
            return [row[0] for row in tx.execute("SELECT app_package FROM request_log ORDER BY id")]

    def events(self):
        with self.database.read() as tx:
            return tx.execute("SELECT request_id, row_index, type FROM event_log ORDER BY id").fetchall()

    def execute(self, maximum=None, caller=CALLER, **params):
        return asyncio.run(self.operations.execute(OWNER.package, OWNER.class_name, caller, params, maximum))

    def render(self, token, width=320, height=240):
        return asyncio.run(self.operations.render(token, width, height))

    def open(self, token, url):
        return asyncio.run(self.operations.open_event_url(token, url))

    def web_trigger(self, caller="org.example.browser"):
        request = WebTriggerInput("https://shop.example/", caller, b"data")
        return asyncio.run(self.operations.web_trigger(OWNER.package, OWNER.class_name, request))

    def download(self, contents, sync_token=3600):
        return asyncio.run(self.operations.complete_download(self.app, contents, sync_token))

    def examples(self, population="digits", owner=OWNER, **request):
        request = TrainingExampleInput(population, "3", **request)
        return asyncio.run(self.operations.training_examples(owner, request)).training_example_records

    def refused(self, function, *arguments, **options):
        """What a call fails with."""
        with pytest.raises(WorkerFailed) as failure:
            function(*arguments, **options)
        return failure.value


@pytest.fixture
def bench(tmp_path, write_service):
    made = Bench(tmp_path, write_service)
    yield made
    made.database.close()
