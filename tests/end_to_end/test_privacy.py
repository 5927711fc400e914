"""A task with correlated noise, noised metrics and a budget: built, trained by devices over HTTP, ended by its budget,
and recomputed from its ledger by a reviewer's commands."""

import asyncio
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedcompute.builder.build import build_task_group
from fedcompute.builder.config import read_config
from fedcompute.builder.task_management import register_group
from fedcompute.cli import app
from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Transport
from fedcompute.device.client.runtime import Device, DeviceSettings
from fedcompute.device.developer.examples import training_example
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.fleet.devices import ShardWorker
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.privacy.accounting import gaussian_epsilon
from fedcompute.protos import plan_pb2, task_builder_pb2

POPULATION, DELTA, NOISE, METRIC_NOISE, SEPARATION, ROUNDS = "reviewed", 1e-3, 4.0, 8.0, 2, 6
CONFIG = f"""
    mode: TRAINING_ONLY
    population_name: "{POPULATION}"
    policies {{
      min_separation_policy {{ minimum_separation: {SEPARATION} }}
      model_release_policy {{ num_max_training_rounds: {ROUNDS} dp_delta: {DELTA} dp_target_epsilon: 10 }}
      dataset_policy {{ batch_size: 2 }}
    }}
    federated_learning {{
      learning_process {{
        client_learning_rate: 0.1
        runtime_config {{ report_goal: 2 }}
        metrics {{ name: "sparse_categorical_accuracy" }}
      }}
    }}
    differential_privacy {{
      type: BANDED_MF noise_multiplier: {NOISE} clip_norm: 0.5 estimated_population: 1000
      metrics_clip_norm: 20 metrics_noise_multiplier: {METRIC_NOISE}
    }}
"""


def closed_form(participations):
    """Epsilon of a device that took part so often: each time in one model and one metrics release."""
    return gaussian_epsilon((participations * (NOISE**-2 + METRIC_NOISE**-2)) ** -0.5, DELTA)


@pytest.fixture(scope="module")
def group(saved_model):
    return build_task_group(saved_model, read_config(CONFIG.encode()).config, task_builder_pb2.ExperimentFlags())


def take_part_until(settings, done):
    async def live(index, transport, runner):
        generator = np.random.default_rng(index)
        examples = [
            training_example({"x": generator.normal(size=4).astype(np.float32), "y": int(generator.integers(3))})
            for _ in range(3)
        ]
        device = Device(
            DeviceSettings(settings.base_url, POPULATION, Owner("org.example", f"org.example.Device{index}")),
            in_process(ShardWorker(POPULATION, examples)),
            transport=transport,
            train=runner.train,
        )
        while not await asyncio.to_thread(done):
            outcome = await device.run_once()
            await asyncio.sleep(outcome.retry_window or 0.02)

    async def run():
        runner = PlanRunner()
        async with Transport() as transport, asyncio.timeout(120):
            await asyncio.gather(*(live(index, transport, runner) for index in range(5)))
        runner.close()

    asyncio.run(run())


def typed(*arguments):
    result = CliRunner().invoke(app, ["privacy", *arguments])
    return result.exit_code, result.output


def test_a_budget_ends_a_task_in_time_and_a_reviewer_recomputes_every_epsilon(group, serving, tmp_path):
    claim = plan_pb2.Plan.FromString(group.training.plan).learning_process.privacy_claim
    assert claim.epsilon == pytest.approx(closed_form(ROUNDS // SEPARATION), rel=1e-9)
    # Room for two participations, and so for four rounds.
    epsilon = closed_form(2) * 1.001
    with serving(tmp_path) as settings:
        api = OperatorApi(settings.base_url)
        server = ("--population", POPULATION, "--server", settings.base_url)
        assert typed("budget", *server, "--epsilon", str(epsilon), "--delta", str(DELTA))[0] == 0
        task_id = register_group(settings.base_url, group).training_task.task_id
        take_part_until(settings, lambda: api.task(POPULATION, task_id)["task"]["status"] == "COMPLETED")

        found = api.task(POPULATION, task_id)
        assert [one["status"] for one in found["iterations"]] == ["COMPLETED"] * 4
        assert "budget_spent" in json.dumps(found)
        ledger = api.ledger(POPULATION)
        models = [one for one in ledger["entries"] if one["released"] == "model"]
        assert [one["mechanism"] for one in models] == ["BANDED_MF"] * 4
        spent = [one["cumulative_epsilon"] for one in ledger["entries"] if one["event"]]
        assert spent[0] == pytest.approx(closed_form(1), rel=1e-6)
        assert spent[-1] == pytest.approx(closed_form(2), rel=1e-6)
        assert {one["mechanism"] for one in ledger["entries"] if one["released"] == "metrics"} == {"METRIC_GAUSSIAN"}

        code, output = typed("verify", *server)
        assert (code, output.count("ok ")) == (0, 3), output
        page = tmp_path / "report.html"
        code, output = typed("report", *server, "--task-id", str(task_id), "--html", str(page))
        assert code == 0, output
        text = page.read_text()
        assert "BANDED" in text
        assert f"{closed_form(2):.3g}" in text

    changed = tmp_path / "changed.json"
    ledger["entries"][0]["contributions"] += 1
    changed.write_text(json.dumps(ledger))
    code, output = typed("verify", str(changed))
    assert code != 0
    assert "WRONG" in output
