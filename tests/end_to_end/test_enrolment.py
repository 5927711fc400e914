"""Enrolled devices against a server that takes no others: the prompt, the device runtime and the server together."""

import asyncio
import collections

import numpy as np
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from fedcompute.builder.build import build_task_group
from fedcompute.builder.config import read_config
from fedcompute.builder.task_management import register_group
from fedcompute.cli import app
from fedcompute.device.client.authorization import read_enrolments
from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Transport
from fedcompute.device.client.runtime import Device, DeviceSettings
from fedcompute.device.developer.examples import training_example
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.history import TaskHistory
from fedcompute.fleet.devices import Observer, ShardWorker, run_devices
from fedcompute.fleet.settings import FleetSettings
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.protos import task_builder_pb2
from fedcompute.server.settings import RetryWindow
from fedcompute.storage import schema
from fedcompute.storage.database import Database

POPULATION = "enrolled"
CONFIG = f"""
    mode: TRAINING_ONLY
    population_name: "{POPULATION}"
    policies {{
      min_separation_policy {{ minimum_separation: 1 }}
      model_release_policy {{ num_max_training_rounds: 2 dp_delta: 0.01 }}
      dataset_policy {{ batch_size: 2 }}
    }}
    federated_learning {{
      learning_process {{
        client_learning_rate: 0.1 runtime_config {{ report_goal: 3 }} metrics {{ name: "sparse_categorical_accuracy" }}
      }}
    }}
    differential_privacy {{ noise_multiplier: 2 clip_norm: 0.5 estimated_population: 50 }}
"""


@pytest.fixture(scope="module")
def group(saved_model):
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True)
    return build_task_group(saved_model, read_config(CONFIG.encode()).config, flags)


def fedcompute(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def device_of(settings, index, transport, train, enrolment, history=None):
    generator = np.random.default_rng(index)
    examples = [
        training_example({"x": generator.normal(size=4).astype(np.float32), "y": int(generator.integers(3))})
        for _ in range(3)
    ]
    return Device(
        DeviceSettings(settings.base_url, POPULATION, Owner("org.example", f"org.example.Device{index}")),
        in_process(ShardWorker(POPULATION, examples)),
        transport=transport,
        train=train,
        history=history,
        prove=None if enrolment is None else enrolment.prove,
    )


def test_enrolled_devices_train_to_the_end_and_nobody_else_gets_in(group, serving, tmp_path):
    data, file = tmp_path / "data", tmp_path / "fleet.enrolments"
    outcomes = collections.defaultdict(collections.Counter)
    with serving(data, authentication="enrolment", retry_unauthorized=RetryWindow(0.02, 0.05)) as settings:
        api = OperatorApi(settings.base_url)
        task_id = register_group(settings.base_url, group).training_task.task_id
        fedcompute("enrolment", "create", "--label", "fleet", "--count", 5, "--out", file, "--data-dir", data)
        enrolments = read_enrolments(file)
        assert len(enrolments) == 5
        fedcompute("enrolment", "revoke", enrolments[3].id, "--data-dir", data)

        def done():
            return api.task(POPULATION, task_id)["task"]["status"] == "COMPLETED"

        async def live(index, device):
            while not await asyncio.to_thread(done):
                outcome = await device.run_once()
                outcomes[index][outcome.reason or "contributed"] += 1
                await asyncio.sleep(outcome.retry_window or 0.05)

        async def run():
            runner = PlanRunner()
            # The fourth is revoked, the fifth guesses its secret, the sixth has none.
            given = [*enrolments[:4], type(enrolments[4])(enrolments[4].id, bytes(32)), None]
            async with Transport() as transport, asyncio.timeout(120):
                devices = [device_of(settings, i, transport, runner.train, one) for i, one in enumerate(given)]
                await asyncio.gather(*(live(index, device) for index, device in enumerate(devices)))
            runner.close()

        asyncio.run(run())
        assert all(one["assignments"]["UPLOAD_COMPLETED"] == 3 for one in api.task(POPULATION, task_id)["iterations"])
    assert all(outcomes[index]["contributed"] == 2 for index in range(3))
    for index in (3, 4):
        assert set(outcomes[index]) <= {"unauthorized", "no_active_task_exists"}
        assert outcomes[index]["unauthorized"]
    assert set(outcomes[5]) == {"server_answer_invalid"}


def test_each_device_of_a_fleet_has_an_enrolment_of_its_own(serving, tmp_path):
    data, file = tmp_path / "data", tmp_path / "fleet.enrolments"
    fedcompute("enrolment", "create", "--label", "fleet", "--count", 3, "--out", file, "--data-dir", data)
    ended = {}

    async def run(settings):
        observer = Observer(lambda *_: None, lambda number, outcome: ended.setdefault(number, outcome.reason))
        fleet = FleetSettings(settings.base_url, "nobody", devices=3, processes=1, enrolments=str(file))
        # As it travels to a worker process.
        running = asyncio.create_task(run_devices(FleetSettings.from_json(fleet.to_json()), range(3), observer))
        async with asyncio.timeout(60):
            while len(ended) < 3:
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.wait({running})

    with serving(data, authentication="enrolment") as settings:
        asyncio.run(run(settings))
    assert ended == dict.fromkeys(range(3), "no_active_task_exists")
    database = Database.open(settings.database)
    with database.read() as tx:
        granted = {row.participant for row in tx.execute(select(schema.authorization_token))}
    database.close()
    assert granted == {one.id for one in read_enrolments(file)}


def test_a_device_that_restarts_shows_the_token_it_has(group, serving, tmp_path):
    """What it asks for is of no account: there is no task, and a token needs none."""
    data, file = tmp_path / "data", tmp_path / "one.enrolment"
    fedcompute("enrolment", "create", "--label", "one", "--out", file, "--data-dir", data)
    (enrolment,) = read_enrolments(file)
    proofs = []

    def prove(challenge, token):
        proofs.append(token)
        return enrolment.prove(challenge, token)

    async def visit(settings):
        history = TaskHistory(DeviceDatabase(tmp_path / "device.db"))
        async with Transport() as transport:
            device = device_of(settings, 0, transport, None, type("Given", (), {"prove": staticmethod(prove)}), history)
            outcome = await device.run_once()
        history.database.close()
        return outcome.reason

    with serving(data, authentication="enrolment") as settings:
        for _ in range(2):
            assert asyncio.run(visit(settings)) == "no_active_task_exists"
    assert len(proofs) == 1
