"""Every combination of algorithm, optimizers and aggregation: built, served, trained by devices over HTTP, evaluated,
and compared with the formulas of spec/artifacts.md 8 and 9 in NumPy."""

import asyncio
import itertools
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor

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
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.privacy.noise import SilentNoise
from fedcompute.protos import plan_pb2, task_builder_pb2
from fedcompute.server.rounds.update import update
from fedcompute.tensors.checkpoint import read_checkpoint
from fedcompute.tensors.tree import subtree

CLIENT_RATE, SERVER_RATE, BATCH, DEVICES, CLIP, NOISE = 0.2, 0.5, 2, 4, 0.3, 0.3
WEIGHTS = "server/global_model_weights/trainable"
ADAM = (0.9, 0.999, 1e-7)
ALGORITHMS = ("FED_AVG", "FED_SGD")
OPTIMIZERS = ("SGD", "ADAM")
DP_TYPES = ("none", "FIXED_GAUSSIAN", "ADAPTIVE_GAUSSIAN", "TREE_AGGREGATION", "ADAPTIVE_TREE", "BANDED_MF")
# A device's optimizer has no part in FED_SGD: there each meets every server optimizer and every type, not every pair.
COMBINATIONS = [
    (algorithm, client, server, dp)
    for algorithm, client, server, dp in itertools.product(ALGORITHMS, OPTIMIZERS, OPTIMIZERS, DP_TYPES)
    if algorithm == "FED_AVG" or (client == server) == (DP_TYPES.index(dp) % 2 == 0)
]


class QuietExecutor:
    """Runs jobs on a thread; an update gets a noise source without noise, which no setting could give it."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)

    def submit(self, job, argument) -> Future:
        extra = {"noise": SilentNoise()} if job is update else {}
        return self.pool.submit(job, argument, **extra)

    def warm_up(self):
        pass

    def close(self):
        self.pool.shutdown()


def config(population, algorithm, client, server, dp):
    kind = "FIXED_GAUSSIAN" if dp == "none" else dp
    return f"""
        mode: TRAINING_AND_EVAL
        population_name: "{population}"
        policies {{
          min_separation_policy {{ minimum_separation: 1 }}
          model_release_policy {{ num_max_training_rounds: 1 dp_delta: 0.01 }}
          dataset_policy {{ batch_size: {BATCH} }}
        }}
        federated_learning {{
          learning_process {{
            type: {algorithm}
            client_optimizer: {client} client_learning_rate: {CLIENT_RATE}
            server_optimizer: {server} server_learning_rate: {SERVER_RATE}
            runtime_config {{ report_goal: {DEVICES} }}
            metrics {{ name: "sparse_categorical_accuracy" }}
          }}
          evaluation {{ source_training_task_id: 1 report_goal: {DEVICES} evaluation_traffic: 0.5 }}
        }}
        differential_privacy {{
          type: {kind} noise_multiplier: {NOISE} clip_norm: {CLIP} init_clip_norm: {CLIP} estimated_population: 50
        }}
    """


def worker(population, x, y):
    """A device's worker that holds these examples."""
    pairs = zip(x, y, strict=True)
    return ShardWorker(population, [training_example({"x": row, "y": int(label)}) for row, label in pairs])


@pytest.fixture(scope="module")
def shards():
    generator = np.random.default_rng(3)
    made = []
    for index, count in enumerate((5, 3, 4, 2)):
        # The last device's data is out of proportion, so that tree types zero its update.
        scale = 400.0 if index == DEVICES - 1 else 1.0
        x = (generator.normal(size=(count, 4)) * scale).astype(np.float32)
        made.append((x, generator.integers(0, 3, count)))
    return made


@pytest.fixture(scope="module")
def settings(serving, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), QuietExecutor()) as running:
        yield running


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print(f"\n{'algorithm':9} {'client':6} {'server':6} {'aggregation':18} {'largest difference':>18}")
    for row in rows:
        print("{:9} {:6} {:6} {:18} {:18.1e}".format(*row))


def softmax_pass(weights, x, y):
    """Logits, probabilities and the gradients of the mean cross-entropy of one batch, float64."""
    kernel, bias = weights
    logits = x @ kernel + bias
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    slope = (probabilities - np.eye(3)[y]) / len(y)
    return logits, [x.T @ slope, slope.sum(axis=0)]


def measure(weights, x, y):
    logits = x @ weights[0] + weights[1]
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((logits.argmax(axis=1) == y).sum()), float((log_sum - logits[np.arange(len(y)), y]).sum())


def adam_step(state, weights, gradients, rate):
    beta_1, beta_2, epsilon = ADAM
    step = state.get("step", 0) + 1
    first = [a + (g - a) * (1 - beta_1) for a, g in zip(state.get("a", [0.0] * len(weights)), gradients, strict=True)]
    second = [
        s + (g * g - s) * (1 - beta_2) for s, g in zip(state.get("s", [0.0] * len(weights)), gradients, strict=True)
    ]
    corrected = rate * math.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    moved = [w - corrected * a / (np.sqrt(s) + epsilon) for w, a, s in zip(weights, first, second, strict=True)]
    return {"step": step, "a": first, "s": second}, moved


def sgd_step(state, weights, gradients, rate):
    return state, [w - rate * g for w, g in zip(weights, gradients, strict=True)]


def steepness(server, gradient):
    """How much the first step of the server's optimizer magnifies a rounding error of its gradient.

    Adam's is rate * g / (|g| + c): steep where the noise of a tree happens to leave almost no gradient.
    """
    if server == "SGD":
        return SERVER_RATE
    c = ADAM[2] / math.sqrt(1 - ADAM[1])
    return SERVER_RATE * c / (np.abs(gradient) + c) ** 2


STEPS = {"SGD": sgd_step, "ADAM": adam_step}


def local_work(algorithm, optimizer, weights, x, y):
    """Delta and number of examples of one device, float64; then correct predictions and summed loss as measured."""
    x = x.astype(np.float64)
    correct = loss = 0.0
    batches = [(x[start : start + BATCH], y[start : start + BATCH]) for start in range(0, len(y), BATCH)]
    if algorithm == "FED_AVG":
        current, state = list(weights), {}
        for batch, labels in batches:
            seen = measure(current, batch, labels)
            correct, loss = correct + seen[0], loss + seen[1]
            state, current = STEPS[optimizer](state, current, softmax_pass(current, batch, labels)[1], CLIENT_RATE)
        return [before - after for before, after in zip(weights, current, strict=True)], len(y), correct, loss
    sums = [np.zeros_like(weight) for weight in weights]
    for batch, labels in batches:
        seen = measure(weights, batch, labels)
        correct, loss = correct + seen[0], loss + seen[1]
        gradients = softmax_pass(weights, batch, labels)[1]
        sums = [total + len(labels) * g for total, g in zip(sums, gradients, strict=True)]
    return [total / len(y) for total in sums], len(y), correct, loss


def norm(delta):
    return math.sqrt(sum(float((leaf * leaf).sum()) for leaf in delta))


def clipped(delta):
    return [leaf * min(1.0, CLIP / norm(delta)) for leaf in delta]


def expected_round(algorithm, client, dp, works):
    """Mean delta, aggregator state leaves that must have changed, and aggregator metrics."""
    deltas, counts = [work[0] for work in works], [work[1] for work in works]
    if dp == "none":
        shares = [count / sum(counts) for count in counts] if algorithm == "FED_SGD" else [1 / DEVICES] * DEVICES
        return [sum(s * d[i] for s, d in zip(shares, deltas, strict=True)) for i in (0, 1)], {}, {}
    state, zeroing, clips = {}, {}, {}
    if "TREE" in dp:
        large = [max(np.abs(leaf).max() for leaf in delta) > 100 * CLIP for delta in deltas]
        deltas = [[leaf * 0 for leaf in delta] if zero else delta for delta, zero in zip(deltas, large, strict=True)]
        zeroing = {"aggregator/zeroing_norm": 100 * CLIP, "aggregator/zeroed_count": sum(large)}
        # A step of Adam is as large as its rate, whatever the data.
        assert sum(large) == (0 if (algorithm, client) == ("FED_AVG", "ADAM") else 1)
    bits = sum(0.5 if norm(delta) <= CLIP else -0.5 for delta in deltas)
    safe = [clipped(delta) if norm(delta) > 0 else delta for delta in deltas]
    total = [sum(delta[i] for delta in safe) for i in (0, 1)]
    estimate = CLIP * math.exp(-0.2 * min(1.0, max(0.0, bits / DEVICES + 0.5)) + 0.1)
    if dp == "ADAPTIVE_GAUSSIAN":
        path = "aggregator/query_state/numerator_state"
        state = {f"{path}/sum_state/l2_norm_clip": estimate}
        clips = {"aggregator/dp_query_metrics/clip": estimate}
    if dp == "ADAPTIVE_TREE":
        path = "aggregator/inner_agg/query_state/numerator_state"
        state = {
            f"{path}/inner_query_state/quantile_estimator_state/current_estimate": estimate,
            f"{path}/indicator_state": 1,
        }
        prefix = "aggregator/zeroing/dp_query_metrics"
        clips = {f"{prefix}/current_clip": CLIP, f"{prefix}/estimate_clip": estimate}
    return [leaf / DEVICES for leaf in total], state, {**clips, **zeroing}


def run_devices(settings, population, shards, done):
    async def take_part():
        runner = PlanRunner()

        async def live(index, x, y):
            device = Device(
                DeviceSettings(settings.base_url, population, Owner("org.example", f"org.example.Device{index}")),
                in_process(worker(population, x, y)),
                transport=transport,
                train=runner.train,
            )
            contributions = 0
            # One to each task: where there is a place left over, an evaluation takes a device again.
            while contributions < 2:
                outcome = await device.run_once()
                assert not outcome.counted, outcome
                contributions += outcome.success
                await asyncio.sleep(outcome.retry_window or 0.02)

        async def watch():
            while not await asyncio.to_thread(done):
                await asyncio.sleep(0.05)

        async with Transport() as transport, asyncio.timeout(60):
            await asyncio.gather(watch(), *(live(index, x, y) for index, (x, y) in enumerate(shards)))
        runner.close()

    asyncio.run(take_part())


@pytest.mark.parametrize(
    ("algorithm", "client", "server", "dp"), COMBINATIONS, ids=["-".join(one) for one in COMBINATIONS]
)
def test_a_round_of_every_combination_follows_the_formulas(
    algorithm, client, server, dp, saved_model, shards, settings, table
):
    population = f"{algorithm}-{client}-{server}-{dp}"
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True, skip_dp_aggregator=dp == "none")
    parsed = read_config(config(population, algorithm, client, server, dp).encode())
    group = build_task_group(saved_model, parsed.config, flags)
    initial = read_checkpoint(group.training.checkpoint)
    api = OperatorApi(settings.base_url)
    created = register_group(settings.base_url, group)
    training, evaluation = created.training_task.task_id, created.eval_task.task_id
    run_devices(
        settings,
        population,
        shards,
        lambda: all(api.task(population, one)["task"]["status"] == "COMPLETED" for one in (training, evaluation)),
    )

    weights = [leaf.astype(np.float64) for leaf in subtree(initial, WEIGHTS).values()]
    works = [local_work(algorithm, client, weights, x, y) for x, y in shards]
    mean, state, extra = expected_round(algorithm, client, dp, works)
    _, moved = STEPS[server]({}, weights, mean, SERVER_RATE)

    checkpoint = read_checkpoint(api.checkpoint(population, training)[0])
    released = list(subtree(checkpoint, WEIGHTS).values())
    differences = [
        np.abs(one - other) / np.maximum(1.0, np.abs(other)) for one, other in zip(released, moved, strict=True)
    ]
    table.append((algorithm, client, server, dp, max(float(leaf.max()) for leaf in differences)))
    for difference, gradient in zip(differences, mean, strict=True):
        assert (difference < 2e-6 + steepness(server, gradient) * 1e-7).all()
    # The noise of a tree begins on the server and stays there.
    assert not any(name.startswith("server/fedcompute") for name in (*initial, *checkpoint))
    assert not any(leaf.any() for name, leaf in checkpoint.items() if "previous_tree_noise" in name)
    for name, value in state.items():
        assert checkpoint[f"server/{name}"] == pytest.approx(value, rel=1e-5)

    examples = sum(len(y) for _, y in shards)
    train = "server/client_work/train"
    expected = {
        f"{train}/sparse_categorical_accuracy": sum(work[2] for work in works) / examples,
        f"{train}/loss": sum(work[3] for work in works) / examples,
        **{f"server/{name}": value for name, value in extra.items()},
        "server/finalizer/update_non_finite": 0.0,
    }
    found = api.metrics(population, training)[1]
    assert set(found) == set(expected)
    assert {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()} == found
    # The file's order is that of the specification: devices' metrics, aggregator, finalizer.
    blob = settings.data_dir / "blobs" / "model" / population / str(training) / "1/s/0/metrics"
    assert list(json.loads(blob.read_text())) == list(expected)

    seen = [measure(released, x.astype(np.float64), y) for x, y in shards]
    measured = api.metrics(population, evaluation)[1]
    assert measured["server/eval/sparse_categorical_accuracy"] == pytest.approx(sum(s[0] for s in seen) / examples)
    assert measured["server/eval/loss"] == pytest.approx(sum(s[1] for s in seen) / examples, rel=1e-4)
    process = plan_pb2.Plan.FromString(group.evaluation.plan).learning_process
    assert [leaf.spec.name for leaf in process.updates][-1] == "update/0/loss/1"
