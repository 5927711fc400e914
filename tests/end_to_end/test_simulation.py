"""Rounds in memory beside rounds of a server with devices over HTTP: the same clients, the same noise."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.builder.build import build_task_group
from fedcompute.builder.config import read_config
from fedcompute.builder.task_management import register_group
from fedcompute.device.client.example_store import in_process
from fedcompute.device.client.http import Transport
from fedcompute.device.client.runtime import Device, DeviceSettings
from fedcompute.device.developer.examples import training_example
from fedcompute.device.owner import Owner
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.fleet.devices import ShardWorker
from fedcompute.fleet.simulation.rounds import Measure, simulate
from fedcompute.fleet.simulation.setup import prepared
from fedcompute.fleet.simulation.slice_sums import LocalTraining, in_threads
from fedcompute.models.datasets import FederatedDataset
from fedcompute.models.saved_model import load_functional_model
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.privacy.noise import SeededNoise
from fedcompute.protos import task_builder_pb2
from fedcompute.server.rounds.update import update
from fedcompute.tensors.checkpoint import read_checkpoint

DEVICES, ROUNDS, SEED = 4, 3, 7
TASKS = [
    ("none", "FED_AVG", "SGD", "SGD"),
    ("FIXED_GAUSSIAN", "FED_AVG", "ADAM", "SGD"),
    ("ADAPTIVE_GAUSSIAN", "FED_SGD", "SGD", "ADAM"),
    ("ADAPTIVE_TREE", "FED_AVG", "SGD", "SGD"),
]


class SeededExecutor:
    """Runs jobs on a thread; updates draw their noise from a seed, which no setting could give them."""

    def __init__(self):
        self.pool, self.noise = ThreadPoolExecutor(1), SeededNoise(SEED)

    def submit(self, job, argument):
        return self.pool.submit(job, argument, **({"noise": self.noise} if job is update else {}))

    def warm_up(self):
        pass

    def close(self):
        self.pool.shutdown()


def config(population, dp, algorithm, client, server):
    kind = "FIXED_GAUSSIAN" if dp == "none" else dp
    text = f"""
        mode: TRAINING_ONLY
        population_name: "{population}"
        policies {{
          model_release_policy {{ num_max_training_rounds: {ROUNDS} dp_delta: 0.01 }}
          dataset_policy {{ batch_size: 2 max_training_batches_per_client: 2 }}
        }}
        federated_learning {{
          learning_process {{
            type: {algorithm} client_optimizer: {client} client_learning_rate: 0.2
            server_optimizer: {server} server_learning_rate: 0.5
            runtime_config {{ report_goal: {DEVICES} }} metrics {{ name: "sparse_categorical_accuracy" }}
          }}
        }}
        differential_privacy {{
          type: {kind} noise_multiplier: 0.3 clip_norm: 0.3 init_clip_norm: 0.3 estimated_population: 50
        }}
    """
    return read_config(text.encode()).config


@pytest.fixture(scope="module")
def clients():
    """The last client's third batch is over the limit of two; two clients have a batch that is not full."""
    generator = np.random.default_rng(3)
    return {
        str(count): (generator.normal(size=(count, 4)).astype(np.float32), generator.integers(0, 3, count))
        for count in (3, 2, 4, 5)
    }


def run_devices(settings, population, clients, done):
    async def live(index, transport, runner, x, y):
        examples = [training_example({"x": row, "y": int(label)}) for row, label in zip(x, y, strict=True)]
        device = Device(
            DeviceSettings(settings.base_url, population, Owner("org.example", f"org.example.Device{index}")),
            in_process(ShardWorker(population, examples)),
            transport=transport,
            train=runner.train,
        )
        while not await asyncio.to_thread(done):
            outcome = await device.run_once()
            assert not outcome.counted, outcome
            await asyncio.sleep(outcome.retry_window or 0.02)

    async def take_part():
        runner = PlanRunner()
        async with Transport() as transport, asyncio.timeout(60):
            await asyncio.gather(*(live(i, transport, runner, *one) for i, one in enumerate(clients.values())))
        runner.close()

    asyncio.run(take_part())


@pytest.mark.parametrize("task", TASKS, ids=["-".join(task) for task in TASKS])
def test_simulated_rounds_are_those_of_a_server_with_the_same_devices(task, clients, saved_model, serving, tmp_path):
    chosen, flags = config("p", *task), task_builder_pb2.ExperimentFlags(skip_dp_check=True)
    flags.skip_dp_aggregator = task[0] == "none"
    with serving(tmp_path / "data", SeededExecutor()) as settings:
        group = build_task_group(saved_model, chosen, flags)
        training = register_group(settings.base_url, group).training_task.task_id
        api = OperatorApi(settings.base_url)
        run_devices(settings, "p", clients, lambda: api.task("p", training)["task"]["status"] == "COMPLETED")
        checkpoint = read_checkpoint(api.checkpoint("p", training)[0])
        metrics = api.metrics("p", training)

    held_out = next(iter(clients.values()))
    dataset = FederatedDataset("clients", clients, *held_out, 3)
    found = prepared(chosen.SerializeToString(), flags.SerializeToString(), load_functional_model(saved_model), dataset)
    local = LocalTraining(found.task.process, found.task.model, found.task.client, found.clients, width=3)
    with ThreadPoolExecutor(2) as pool:
        sums = in_threads(found.task.process, local, pool)
        rounds = list(simulate(found.task, found.clients, sums, rounds=ROUNDS, seed=SEED))

    for name, value in rounds[-1].state.items():
        if name in checkpoint and value.dtype != object and "level_buffer" not in name and "noise" not in name:
            np.testing.assert_allclose(value, checkpoint[name], rtol=0, atol=1e-6, err_msg=name)
    for number, one in enumerate(rounds, start=1):
        assert (one.contributions, dict(one.rejected)) == (DEVICES, {})
        assert one.metrics == pytest.approx(metrics[number], abs=1e-6, rel=1e-6)
        assert bool(one.events) == (task[0] != "none")

    measured = Measure(found.task, found.held_out)(rounds[-1].state)
    kernel, bias = (checkpoint[f"server/global_model_weights/trainable/{index}"] for index in (0, 1))
    right = (held_out[0] @ kernel + bias).argmax(axis=1) == held_out[1]
    assert measured["server/eval/sparse_categorical_accuracy"] == pytest.approx(right.mean())
