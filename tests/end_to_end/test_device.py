"""A device of this machine against a real server: the program, its services and its training, each in a process of its
own.
"""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fedcompute.builder.build import build_task_group
from fedcompute.builder.config import read_config
from fedcompute.builder.task_management import register_group
from fedcompute.cli import app
from fedcompute.device.isolation.probe import probe
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.protos import task_builder_pb2

POPULATION = "flowers"
CONFIG = f"""
    mode: TRAINING_ONLY
    population_name: "{POPULATION}"
    policies {{
      data_availability_policy {{ min_example_count: 6 }}
      model_release_policy {{ num_max_training_rounds: 20 dp_delta: 0.01 }}
      dataset_policy {{ batch_size: 2 }}
    }}
    federated_learning {{
      learning_process {{
        client_learning_rate: 0.1 runtime_config {{ report_goal: 1 over_selection_rate: 5 }}
        metrics {{ name: "sparse_categorical_accuracy" }}
      }}
    }}
    differential_privacy {{ noise_multiplier: 2 clip_norm: 0.5 estimated_population: 50 }}
"""
SERVICE = """
from fedcompute.device import *

class Service(IsolatedService):
    def on_request(self, token):
        return Worker()

class Worker(IsolatedWorker):
    def on_training_example(self, request):
        print("from", request.resumption_token)
        examples = [training_example({"x": [0.1 * i, 0.2, 0.3, 0.4], "y": i % 3}) for i in range(6)]
        return TrainingExampleOutput([TrainingExampleRecord(one, b"%d" % i) for i, one in enumerate(examples)])
"""


def fedcompute(*arguments, code=0, env=None):
    result = CliRunner(env=env).invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def group(saved_model):
    missing = [one.name for one in probe() if not one.enforced]
    if missing:
        pytest.skip(f"this machine cannot isolate: {', '.join(missing)}")
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True)
    return build_task_group(saved_model, read_config(CONFIG.encode()).config, flags)


@pytest.fixture
def world(group, serving, tmp_path, request):
    """A server with a task of one device a round; its parameter: which devices it takes."""
    data = tmp_path / "data"
    with serving(data, authentication=request.param) as settings:
        task_id = register_group(settings.base_url, group).training_task.task_id
        yield SimpleNamespace(url=settings.base_url, data=data, task_id=task_id, api=OperatorApi(settings.base_url))


class Device:
    """A device's directory with one app, commands on it, and its process."""

    def __init__(self, folder, world):
        self.folder, self.world, self.process, self.lines = folder, world, None, []
        self.env = {"FEDCOMPUTE_DEVICE_DIR": str(folder / "device")}
        (folder / "app").mkdir()
        (folder / "app" / "service.py").write_text(SERVICE)
        manifest = f'[service]\nname = "org.example.Service"\n[federated-compute-settings]\nurl = "{world.url}"\n'
        (folder / "app" / "odp.toml").write_text(manifest)
        self("install", folder / "app")
        for name in ("condition_idle", "condition_unmetered"):
            self("config", "put", name, "true")
        self("config", "put", "default_scheduling_period_secs", "1")
        self.enrolment = folder / "enrolment"
        fedcompute("enrolment", "create", "--label", "one", "--out", self.enrolment, "--data-dir", world.data)

    def __call__(self, *arguments, code=0):
        return fedcompute("device", *arguments, code=code, env=self.env)

    def start(self):
        program = Path(sys.executable).parent / "fedcompute"
        command = [program, "device", "run", "--json", "--enrolment", self.enrolment]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **self.env}
        )
        self._reading = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reading.start()

    def _read(self, process):
        with process.stdout:
            self.lines += process.stdout

    def stop(self, number):
        """Seconds until the process has ended, and its exit status."""
        start = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(30)
        seconds = time.monotonic() - start
        self._reading.join(30)
        return seconds, status

    def events(self, kind):
        """Of the task, in the order in which they were told."""
        told = [json.loads(line) for line in self.lines]
        return [one for one in told if one["job"] == POPULATION and one["event"] == kind]

    def trains(self):
        return any("trainer_main" in command for command in children(self.process.pid).values())

    def rows(self, statement):
        with sqlite3.connect(self.folder / "device" / "device.db") as connection:
            return connection.execute(statement).fetchall()


@pytest.fixture
def device(tmp_path, world):
    made = Device(tmp_path, world)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop(signal.SIGTERM)


def children(parent):
    """Process id -> command line of the processes that `parent` has started."""
    found = {}
    for listing in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= dict.fromkeys(map(int, listing.read_text().split()), "")
    for process in found:
        with contextlib.suppress(OSError):
            found[process] = Path(f"/proc/{process}/cmdline").read_text()
    return found


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def released(world):
    """Rounds that have been completed."""
    return sum(one["completed"] is not None for one in world.api.task(POPULATION, world.task_id)["iterations"])


@pytest.mark.parametrize("world", ["off"], indirect=True)
def test_what_a_stopped_and_a_killed_device_had_begun_the_next_one_finishes(device, world):
    before = released(world)
    device("schedule", POPULATION)
    device.start()
    wait_until(device.trains)
    started = children(device.process.pid)
    seconds, status = device.stop(signal.SIGTERM)
    assert (seconds < 2, status) == (True, 0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert [one["running"] for one in json.loads(device("status", "--json"))["tasks"]] == [False]

    device.start()
    wait_until(device.trains)
    started = children(device.process.pid)
    _, status = device.stop(signal.SIGKILL)
    assert status == -signal.SIGKILL
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 2)

    device.start()
    wait_until(lambda: device.events("deleted"))
    assert [one["success"] for one in device.events("ended")] == [True]
    assert len(device.events("recovered")) == 2
    assert device.events("deleted")[0]["detail"] == "one-time task succeeded"
    wait_until(lambda: released(world) > before)
    assert json.loads(device("status", "--json"))["tasks"] == []
    assert list((device.folder / "device" / "scratch").iterdir()) != []
    assert device.stop(signal.SIGINT)[1] == 0
    assert list((device.folder / "device" / "scratch").iterdir()) == []


@pytest.mark.parametrize("world", ["enrolment"], indirect=True)
def test_a_recurrent_task_goes_on_over_a_change_of_the_server_s_keys_and_no_secret_is_told(device, world):
    before = released(world)
    device.start()
    wait_until(lambda: ", running" in device("status"))
    device("schedule", POPULATION, "--every", "12h")
    assert device("run-now", POPULATION) == f"{POPULATION}: contributed\n"
    fedcompute("keys", "rotate", "--server", world.url)
    assert device("run-now", POPULATION) == f"{POPULATION}: contributed\n"
    with sqlite3.connect(device.folder / "device" / "device.db") as connection:
        (old,) = connection.execute("SELECT key_id FROM encryption_key").fetchall()
        connection.execute("DELETE FROM encryption_key")
    assert device("run-now", POPULATION) == f"{POPULATION}: contributed\n"
    assert old not in device.rows("SELECT key_id FROM encryption_key")
    wait_until(lambda: released(world) >= before + 3)
    (task,) = json.loads(device("status", "--json"))["tasks"]
    assert task["earliest_run"] - task["last_run_end"] == 12 * 3_600_000
    assert device.rows("SELECT COUNT(*) FROM task_history") == [(3,)]
    assert device.stop(signal.SIGTERM)[1] == 0

    assert re.findall(r"\| (from .*)", device("logs")) == ["from None", "from b'5'", "from b'5'"]
    secrets = [device.enrolment.read_text().strip().partition(":")[2]]
    secrets += [token for (token,) in device.rows("SELECT token FROM authorization_token")]
    assert len(secrets) == 2
    told = "".join(device.lines) + device("logs") + device("status") + str(device.rows("SELECT * FROM device_log"))
    assert not any(secret in told for secret in (*secrets, "signature", "expires="))
