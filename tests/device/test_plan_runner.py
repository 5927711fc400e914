"""Client plans on local examples: the reference's plans, the arithmetic, and every way to refuse."""

import asyncio
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fedcompute.device.developer.examples import training_example
from fedcompute.device.plan_runner import PlanRunner, validate
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

BATCH_SIZE = 3
LEARNING_RATE = 0.1
CLIP_NORM = 0.1
EPSILON = 1e-7  # of Keras' cross-entropy


@pytest.fixture(scope="module")
def runner():
    runner = PlanRunner()
    yield runner
    runner.close()


def forward(weights, x):
    hidden = np.maximum(x @ weights[0] + weights[1], 0.0)
    squashed = 1.0 / (1.0 + np.exp(-(hidden @ weights[2] + weights[3])))
    exponents = np.exp(squashed)
    return hidden, squashed, exponents / exponents.sum(axis=1, keepdims=True)


def loss_of(weights, x, y):
    p = forward(weights, x)[2][:, 0]
    return float(np.mean(-(y * np.log(p + EPSILON) + (1 - y) * np.log(1 - p + EPSILON))))


def gradients(weights, x, y):
    """Of the mean binary cross-entropy on the first softmax output, by hand, in float64."""
    hidden, squashed, softmax = forward(weights, x)
    p = softmax[:, 0]
    dp = (-(y / (p + EPSILON)) + (1 - y) / (1 - p + EPSILON)) / len(y)
    upstream = np.stack([dp, np.zeros_like(dp)], axis=1)
    dsquashed = (upstream - (upstream * softmax).sum(axis=1, keepdims=True)) * softmax
    dlogits = dsquashed * squashed * (1 - squashed)
    dhidden = (dlogits @ weights[2].T) * (hidden > 0)
    return [x.T @ dhidden, dhidden.sum(axis=0), hidden.T @ dlogits, dlogits.sum(axis=0)]


def federated_averaging(initial, x, y, clip_norm):
    """One client's clipped delta and summed loss (spec/artifacts.md 8 and 9), in float64."""
    weights = [w.astype(np.float64) for w in initial]
    loss_sum = 0.0
    for start in range(0, len(x), BATCH_SIZE):
        batch_x, batch_y = x[start : start + BATCH_SIZE].astype(np.float64), y[start : start + BATCH_SIZE]
        loss_sum += loss_of(weights, batch_x, batch_y) * len(batch_y)
        weights = [w - LEARNING_RATE * g for w, g in zip(weights, gradients(weights, batch_x, batch_y), strict=True)]
    deltas = [before - after for before, after in zip(initial, weights, strict=True)]
    norm = np.sqrt(sum(np.sum(delta**2) for delta in deltas))
    return [delta * min(1.0, clip_norm / norm) for delta in deltas], loss_sum, norm


def client_checkpoint(weights, clip_norm=CLIP_NORM):
    leaves = {f"client/0/trainable/{i}": w for i, w in enumerate(weights)}
    return write_checkpoint({**leaves, "client/1": np.array(clip_norm, np.float32)})


def test_the_references_training_plan_gives_the_update_of_federated_averaging(
    runner, reference, reference_plan, dense_data
):
    state = read_checkpoint((reference / "output/initial_state.server.ckp").read_bytes())
    weights = [state[f"server/global_model_weights/trainable/{i}"] for i in range(4)]
    x, y, examples = dense_data

    result = runner.run(reference_plan("client_only_plan.pb"), client_checkpoint(weights), examples)

    update = read_checkpoint(result.update)
    expected, loss_sum, norm = federated_averaging(weights, x, y, CLIP_NORM)
    assert norm > CLIP_NORM
    assert set(update) == {"update/0/loss/0", "update/0/loss/1", *(f"update/1/{i}" for i in range(4))}
    for i, delta in enumerate(expected):
        assert update[f"update/1/{i}"].dtype == np.float32
        np.testing.assert_allclose(update[f"update/1/{i}"], delta, atol=1e-5)
    np.testing.assert_allclose(update["update/0/loss/0"], loss_sum, rtol=1e-5)
    assert update["update/0/loss/1"] == len(x)
    total = np.sqrt(sum(np.sum(update[f"update/1/{i}"].astype(np.float64) ** 2) for i in range(4)))
    assert total <= CLIP_NORM * (1 + 1e-6)
    assert (result.example_count, result.example_bytes) == (20, sum(map(len, examples)))


def test_an_update_below_the_clip_norm_stays_as_it_is(runner, reference_plan, dense_data, dense_weights):
    x, y, examples = dense_data
    checkpoint = client_checkpoint(dense_weights, clip_norm=100.0)

    update = read_checkpoint(runner.run(reference_plan("client_only_plan.pb"), checkpoint, examples).update)

    expected, _, norm = federated_averaging(dense_weights, x, y, 100.0)
    assert norm < 100.0
    for i, delta in enumerate(expected):
        np.testing.assert_allclose(update[f"update/1/{i}"], delta, atol=1e-5)


def test_the_references_evaluation_plan_gives_the_loss_and_no_delta(runner, reference_plan, dense_data, dense_weights):
    x, y, examples = dense_data
    checkpoint = write_checkpoint({f"client/0/0/{i}": w for i, w in enumerate(dense_weights)})

    update = read_checkpoint(runner.run(reference_plan("eval_client_only_plan.pb"), checkpoint, examples).update)

    assert set(update) == {"update/0/loss/0", "update/0/loss/1"}
    np.testing.assert_allclose(update["update/0/loss/0"], loss_of(dense_weights, x, y) * len(x), rtol=1e-5)
    assert update["update/0/loss/1"] == len(x)


def test_runs_of_one_plan_do_not_influence_each_other(runner, reference_plan, dense_data, dense_weights):
    plan, examples = reference_plan("client_only_plan.pb"), dense_data[2]
    checkpoint = client_checkpoint(dense_weights)

    first = runner.run(plan, checkpoint, examples)
    other = runner.run(plan, checkpoint, examples[:4])
    again = runner.run(plan, checkpoint, examples)

    assert first.update == again.update != other.update


def test_runs_started_together_take_turns(runner, reference_plan, dense_data, dense_weights):
    plan, examples = reference_plan("client_only_plan.pb"), dense_data[2]
    checkpoint = client_checkpoint(dense_weights)

    async def together():
        return await asyncio.gather(*(runner.train(plan, checkpoint, examples) for _ in range(4)))

    assert len({result.update for result in asyncio.run(together())}) == 1


def test_a_run_leaves_no_file_behind(runner, reference_plan, dense_data, dense_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner.run(reference_plan("client_only_plan.pb"), client_checkpoint(dense_weights), dense_data[2])
    with pytest.raises(DeviceRunFailed):
        runner.run(reference_plan("client_only_plan.pb"), b"no checkpoint", dense_data[2])
    assert list(tmp_path.iterdir()) == []


def test_the_cache_forgets_the_plan_used_longest_ago(reference_plan, dense_data, dense_weights):
    small = PlanRunner(cached_plans=1)
    train, checkpoint = reference_plan("client_only_plan.pb"), client_checkpoint(dense_weights)
    evaluation = reference_plan("eval_client_only_plan.pb")
    first = small.run(train, checkpoint, dense_data[2])
    small.run(evaluation, write_checkpoint({f"client/0/0/{i}": w for i, w in enumerate(dense_weights)}), dense_data[2])
    assert small.run(train, checkpoint, dense_data[2]).update == first.update
    small.close()


@pytest.mark.parametrize(
    ("checkpoint", "examples"),
    [
        (b"no checkpoint", None),
        (b"", None),
        (None, [b"\x0a\xff no example"]),
        (None, [b"\x0a\x7f secret"]),
        (None, [training_example({"x": np.zeros(784)})]),
        (None, [training_example({"x": np.zeros(783), "y": 1})]),
    ],
    ids=[
        "damaged checkpoint",
        "empty checkpoint",
        "damaged example",
        "cut example",
        "example without label",
        "wrong width",
    ],
)
def test_what_the_graph_cannot_compute_is_a_computation_failure(
    runner, reference_plan, dense_data, dense_weights, checkpoint, examples
):
    with pytest.raises(DeviceRunFailed) as caught:
        runner.run(
            reference_plan("client_only_plan.pb"),
            client_checkpoint(dense_weights) if checkpoint is None else checkpoint,
            dense_data[2] if examples is None else examples,
        )
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED
    assert tempfile.gettempdir() not in caught.value.detail
    assert "secret" not in caught.value.detail
    assert len(caught.value.detail) > 20


def test_a_run_over_its_time_limit_fails(reference_plan, dense_data, dense_weights):
    hurried = PlanRunner(time_limit=0.001)
    with pytest.raises(DeviceRunFailed) as caught:
        hurried.run(reference_plan("client_only_plan.pb"), client_checkpoint(dense_weights), dense_data[2] * 50)
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED
    hurried.close()


def test_an_empty_example_is_refused_by_its_number(runner, reference_plan, dense_data):
    with pytest.raises(DeviceRunFailed, match="example 1 of 3") as caught:
        runner.run(reference_plan("client_only_plan.pb"), b"", [dense_data[2][0], b"", dense_data[2][1]])
    assert caught.value.reason is Reason.EXAMPLES_FAILED


def broken(plan, change):
    copy = plan_pb2.ClientOnlyPlan()
    copy.CopyFrom(plan)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: plan.ClearField("phase"), Reason.PLAN_UNSUPPORTED),
        (lambda plan: plan.ClearField("tflite_graph"), Reason.PLAN_UNSUPPORTED),
        (lambda plan: plan.phase.example_query_spec.SetInParent(), Reason.PLAN_UNSUPPORTED),
        (lambda plan: plan.phase.ClearField("federated_compute"), Reason.PLAN_ARGUMENT_INVALID),
        (
            lambda plan: plan.phase.tensorflow_spec.output_tensor_specs.add(name="loss:0"),
            Reason.PLAN_ARGUMENT_INVALID,
        ),
        (lambda plan: plan.phase.tensorflow_spec.input_tensor_specs.pop(), Reason.PLAN_ARGUMENT_INVALID),
        (
            lambda plan: plan.phase.tensorflow_spec.input_tensor_specs.add(name="data_token:0"),
            Reason.PLAN_ARGUMENT_INVALID,
        ),
        (
            lambda plan: plan.phase.tensorflow_spec.constant_inputs["k"].SetInParent(),
            Reason.PLAN_ARGUMENT_INVALID,
        ),
        (
            lambda plan: setattr(plan.phase.tensorflow_spec, "dataset_token_tensor_name", "other:0"),
            Reason.PLAN_COMPUTATION_FAILED,
        ),
        (lambda plan: setattr(plan, "tflite_graph", plan.tflite_graph[:1000]), Reason.PLAN_COMPUTATION_FAILED),
        (lambda plan: setattr(plan, "tflite_graph", b"\0" * 100), Reason.PLAN_COMPUTATION_FAILED),
        (
            lambda plan: setattr(plan, "tflite_graph", plan.tflite_graph.replace(b"L2Loss", b"L3Loss")),
            Reason.PLAN_COMPUTATION_FAILED,
        ),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused_before_it_runs(runner, reference_plan, dense_data, change, reason):
    plan = broken(reference_plan("client_only_plan.pb"), change)
    with pytest.raises(DeviceRunFailed) as caught:
        runner.run(plan, b"", dense_data[2])
    assert caught.value.reason is reason


def test_validation_does_not_change_the_plan(reference_plan):
    plan = reference_plan("client_only_plan.pb")
    before = plan.SerializeToString(deterministic=True)
    validate(plan)
    assert plan.SerializeToString(deterministic=True) == before


def test_importing_the_runtime_does_not_load_tensorflow():
    import subprocess
    import sys

    code = "import fedcompute.device.runtime, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Path(sys.executable).exists()
