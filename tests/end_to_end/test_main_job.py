"""Builder, server and devices together, over HTTP, against the formulas computed by hand."""

import asyncio
import collections
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format

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
from fedcompute.learning.process import read_state
from fedcompute.models.functional_model import functional_model_from_keras
from fedcompute.models.saved_model import save_functional_model
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.protos import plan_pb2, task_builder_pb2
from fedcompute.tensors.checkpoint import read_checkpoint
from fedcompute.tensors.tree import subtree

RATE, SERVER_RATE, BATCH = 0.2, 0.5, 2
WEIGHTS = "server/global_model_weights/trainable"


def config(population, rounds=1, dp="", evaluation=False):
    mode = "TRAINING_AND_EVAL" if evaluation else "TRAINING_ONLY"
    block = "evaluation { source_training_task_id: 1 report_goal: 2 evaluation_traffic: 0.5 }" if evaluation else ""
    return f"""
        mode: {mode}
        population_name: "{population}"
        policies {{
          min_separation_policy {{ minimum_separation: 1 }}
          data_availability_policy {{ min_example_count: 1 }}
          model_release_policy {{ num_max_training_rounds: {rounds} dp_delta: 0.01 }}
          dataset_policy {{ batch_size: {BATCH} }}
        }}
        federated_learning {{
          learning_process {{
            client_learning_rate: {RATE} server_learning_rate: {SERVER_RATE}
            runtime_config {{ report_goal: 3 }}
            metrics {{ name: "sparse_categorical_accuracy" }}
          }}
          {block}
        }}
        differential_privacy {{ noise_multiplier: 2 clip_norm: 0.05 estimated_population: 50 {dp} }}
    """


def worker(population, x, y):
    """A device's worker that holds these examples."""
    pairs = zip(x, y, strict=True)
    return ShardWorker(population, [training_example({"x": row, "y": int(label)}) for row, label in pairs])


@pytest.fixture(scope="module")
def keras_model():
    tf.keras.utils.set_random_seed(1)
    return tf.keras.Sequential(
        [tf.keras.Input((4,)), tf.keras.layers.Dense(5, activation="relu"), tf.keras.layers.Dense(3)]
    )


@pytest.fixture(scope="module")
def saved_model(keras_model, tmp_path_factory):
    spec = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None, 1], tf.int64))

    def loss(label, output):
        picked = tf.one_hot(tf.reshape(label, [-1]), 3)
        return -tf.reduce_mean(tf.reduce_sum(picked * tf.nn.log_softmax(output), axis=-1))

    directory = tmp_path_factory.mktemp("model") / "saved_model"
    save_functional_model(
        functional_model_from_keras(keras_model=keras_model, loss_fn=loss, input_spec=spec), directory
    )
    return directory


@pytest.fixture(scope="module")
def shards():
    generator = np.random.default_rng(0)
    return [
        (generator.normal(size=(count, 4)).astype(np.float32), generator.integers(0, 3, count)) for count in (5, 3, 4)
    ]


def local_update(weights, x, y):
    """Initial minus trained weights, correct predictions and summed loss of one pass of SGD, in float64 NumPy."""
    kernel_1, bias_1, kernel_2, bias_2 = (weight.astype(np.float64) for weight in weights)
    correct = loss = 0.0
    for start in range(0, len(y), BATCH):
        batch, labels = x[start : start + BATCH].astype(np.float64), y[start : start + BATCH]
        hidden = batch @ kernel_1 + bias_1
        active = np.maximum(hidden, 0)
        logits = active @ kernel_2 + bias_2
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        correct += float((logits.argmax(axis=1) == labels).sum())
        loss += float(-np.log(probabilities[np.arange(len(labels)), labels]).sum())
        slope = (probabilities - np.eye(3)[labels]) / len(labels)
        back = (slope @ kernel_2.T) * (hidden > 0)
        kernel_2, bias_2 = kernel_2 - RATE * active.T @ slope, bias_2 - RATE * slope.sum(axis=0)
        kernel_1, bias_1 = kernel_1 - RATE * batch.T @ back, bias_1 - RATE * back.sum(axis=0)
    trained = (kernel_1, bias_1, kernel_2, bias_2)
    return [before - after for before, after in zip(weights, trained, strict=True)], correct, loss


def run_devices(settings, population, shards, done):
    """Lets one device per shard take part, again and again, until `done()`."""

    async def take_part():
        runner = PlanRunner()
        outcomes = collections.Counter()

        async def live(index, x, y):
            device = Device(
                DeviceSettings(settings.base_url, population, Owner("org.example", f"org.example.Device{index}")),
                in_process(worker(population, x, y)),
                transport=transport,
                train=runner.train,
            )
            while not over.is_set():
                outcome = await device.run_once()
                outcomes[outcome.reason or "contributed"] += 1
                await asyncio.sleep(outcome.retry_window or 0.02)

        async def watch():
            while not await asyncio.to_thread(done):
                await asyncio.sleep(0.05)
            over.set()

        over = asyncio.Event()
        async with Transport() as transport, asyncio.timeout(120):
            await asyncio.gather(watch(), *(live(index, x, y) for index, (x, y) in enumerate(shards)))
        runner.close()
        return outcomes

    return asyncio.run(take_part())


def weights_of(checkpoint):
    return list(subtree(checkpoint, WEIGHTS).values())


def build(saved_model, text, **flags):
    return build_task_group(saved_model, read_config(text.encode()).config, task_builder_pb2.ExperimentFlags(**flags))


def test_three_devices_over_http_move_the_weights_as_the_formulas_say(saved_model, shards, serving, tmp_path):
    group = build(saved_model, config("plain", rounds=2), skip_dp_check=True, skip_dp_aggregator=True)
    initial = weights_of(read_checkpoint(group.training.checkpoint))
    with serving(tmp_path) as settings:
        api = OperatorApi(settings.base_url)
        task_id = register_group(settings.base_url, group).training_task.task_id
        run_devices(settings, "plain", shards, lambda: api.task("plain", task_id)["task"]["status"] == "COMPLETED")
        view = api.task("plain", task_id)
    blobs = tmp_path / "blobs" / "model" / "plain" / str(task_id)
    weights = initial
    for number in (1, 2):
        updates = [local_update(weights, x, y) for x, y in shards]
        weights = [
            weight - SERVER_RATE * sum(update[0][index] for update in updates) / 3
            for index, weight in enumerate(weights)
        ]
        with (blobs / f"{number}/s/0/checkpoint").open("rb") as file:
            stored = file.read()
        from fedcompute.crypto.envelope import GZIP_MAGIC, gunzip

        checkpoint = read_checkpoint(gunzip(stored, 1 << 20) if stored[:2] == GZIP_MAGIC else stored)
        for released, expected in zip(weights_of(checkpoint), weights, strict=True):
            np.testing.assert_allclose(released, expected, atol=1e-6)
        metrics = json.loads((blobs / f"{number}/s/0/metrics").read_text())
        examples = sum(len(y) for _, y in shards)
        assert metrics["server/client_work/train/sparse_categorical_accuracy"] == pytest.approx(
            sum(update[1] for update in updates) / examples, abs=1e-6
        )
        assert metrics["server/client_work/train/loss"] == pytest.approx(
            sum(update[2] for update in updates) / examples, abs=1e-5
        )
        assert metrics["server/finalizer/update_non_finite"] == 0.0
    assert [one["assignments"]["UPLOAD_COMPLETED"] for one in view["iterations"]] == [3, 3]
    assert view["ledger"] == []


def test_training_under_dp_with_evaluation_spends_what_the_ledger_says(saved_model, shards, serving, tmp_path):
    group = build(saved_model, config("private", rounds=3, evaluation=True), skip_dp_check=True)
    with serving(tmp_path) as settings:
        api = OperatorApi(settings.base_url)
        created = register_group(settings.base_url, group)
        training, evaluation = created.training_task.task_id, created.eval_task.task_id

        def done():
            evaluated = [one for one in api.task("private", evaluation)["iterations"] if one["completed"]]
            return api.task("private", training)["task"]["status"] == "COMPLETED" and len(evaluated) >= 1

        outcomes = run_devices(settings, "private", shards * 2, done)
        view, measured = api.task("private", training), api.task("private", evaluation)
    assert outcomes["contributed"] >= 11
    assert [entry["event"]["noise_multiplier"] for entry in view["ledger"]] == [pytest.approx(2.0)] * 3
    assert measured["ledger"] == []
    names = {metric["name"] for metric in measured["metrics"]}
    assert names == {"server/eval/sparse_categorical_accuracy", "server/eval/loss"}
    assert all(one["evaluated_iteration_id"] in (1, 2, 3) for one in measured["iterations"])


def test_a_restarted_server_goes_on_where_it_stopped(saved_model, shards, serving, tmp_path):
    group = build(saved_model, config("again", rounds=4), skip_dp_check=True)
    with serving(tmp_path) as settings:
        api = OperatorApi(settings.base_url)
        task_id = register_group(settings.base_url, group).training_task.task_id
        run_devices(settings, "again", shards, lambda: len(api.task("again", task_id)["ledger"]) >= 2)
    with serving(tmp_path) as settings:
        api = OperatorApi(settings.base_url)
        run_devices(settings, "again", shards, lambda: api.task("again", task_id)["task"]["status"] == "COMPLETED")
        assert len(api.task("again", task_id)["ledger"]) == 4


FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "reference-keras"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference's artifacts are not beside this clone")


@needs_fixtures
@pytest.mark.parametrize("kind", ["", "eval_"])
def test_our_plan_of_the_reference_model_has_the_reference_plan_s_inputs_and_its_checkpoint_is_our_state(kind):
    text = (FIXTURES / "input" / "keras_task_config.pbtxt").read_text()
    parsed = read_config(text.encode()).config
    parsed.differential_privacy.noise_multiplier = 1.0
    flags = task_builder_pb2.ExperimentFlags(skip_dp_check=True)
    group = build_task_group(FIXTURES / "input" / "keras_model", parsed, flags)
    ours = group.evaluation if kind else group.training
    client_plan = plan_pb2.ClientOnlyPlan.FromString(ours.client_plan)
    reference = plan_pb2.ClientOnlyPlan.FromString((FIXTURES / "output" / f"{kind}client_only_plan.pb").read_bytes())
    assert text_format.MessageToString(client_plan.phase) == text_format.MessageToString(reference.phase)
    from tensorflow.lite.python import schema_py_generated as schema

    def inputs(flatbuffer):
        graph = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(flatbuffer, 0)).subgraphs[0]
        return [
            (
                graph.tensors[i].name,
                graph.tensors[i].type,
                list([] if graph.tensors[i].shape is None else graph.tensors[i].shape),
            )
            for i in graph.inputs
        ], len([] if graph.outputs is None else graph.outputs)

    assert inputs(client_plan.tflite_graph) == inputs(reference.tflite_graph)
    process = plan_pb2.Plan.FromString(ours.plan).learning_process
    theirs = read_checkpoint((FIXTURES / "output" / f"{kind}initial_state.server.ckp").read_bytes())
    assert read_state(process, theirs).keys() == theirs.keys() == read_checkpoint(ours.checkpoint).keys()
