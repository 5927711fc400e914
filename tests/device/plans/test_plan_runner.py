"""Client plans on local examples: the reference's plans, the arithmetic, and every way to refuse."""

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from fedcompute.device.developer.examples import training_example
from fedcompute.device.plans.plan_rules import validate
from fedcompute.device.plans.plan_runner import PlanRunner
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


def test_seeded_random_numbers_are_the_same_in_every_run(runner):
    def drawn(examples):
        import tensorflow as tf

        return examples.reduce(tf.constant(0.0), lambda state, _: state + tf.random.uniform([], seed=7))

    plan = own_plan(drawn)
    assert len({runner.run(plan, b"", [b"a", b"b"]).update for _ in range(3)}) == 1


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
        (lambda plan: plan.phase.example_query_spec.SetInParent(), Reason.PLAN_ARGUMENT_INVALID),
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
            Reason.OPS_NOT_SUPPORTED,
        ),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused_before_it_runs(runner, reference_plan, dense_data, change, reason):
    plan = broken(reference_plan("client_only_plan.pb"), change)
    with pytest.raises(DeviceRunFailed) as caught:
        runner.run(plan, b"", dense_data[2])
    assert caught.value.reason is reason
    with pytest.raises(DeviceRunFailed) as prepared:
        runner.prepare(plan)
    assert prepared.value.detail == caught.value.detail


def test_a_plan_with_unknown_operations_is_refused_by_all_their_names(runner, reference_plan):
    def rename(plan):
        plan.tflite_graph = plan.tflite_graph.replace(b"L2Loss", b"L3Loss").replace(b"ReluGrad", b"LureGrad")

    with pytest.raises(DeviceRunFailed, match="FlexL3Loss, FlexLureGrad") as caught:
        runner.prepare(broken(reference_plan("client_only_plan.pb"), rename))
    assert "docs/plan-operations.md" in caught.value.remedy


def test_validation_does_not_change_the_plan(reference_plan):
    plan = reference_plan("client_only_plan.pb")
    plan.phase.tensorflow_spec.output_tensor_specs.add(name="loss:0")
    before = plan.SerializeToString(deterministic=True)
    with pytest.raises(DeviceRunFailed):
        validate(plan)
    assert plan.SerializeToString(deterministic=True) == before


def test_a_prepared_plan_runs_without_being_translated_again(reference_plan, dense_data, dense_weights, monkeypatch):
    from fedcompute.device.plans import prepared_plan

    plan, checkpoint = reference_plan("client_only_plan.pb"), client_checkpoint(dense_weights)
    with closing(PlanRunner()) as runner:
        runner.prepare(plan)
        monkeypatch.setattr(prepared_plan, "translate", None)
        assert runner.run(plan, checkpoint, dense_data[2]).example_count == 20


def test_a_checkpoint_or_update_over_its_limit_is_refused_by_its_size(
    runner, reference_plan, dense_data, dense_weights
):
    plan, checkpoint = reference_plan("client_only_plan.pb"), client_checkpoint(dense_weights)
    size = len(runner.run(plan, checkpoint, dense_data[2]).update)

    with pytest.raises(DeviceRunFailed, match=rf"update of {size} bytes, {size - 1} are") as caught:
        runner.run(plan, checkpoint, dense_data[2], update_bytes_limit=size - 1)
    assert caught.value.reason is Reason.UPLOAD_TOO_LARGE
    limit = len(checkpoint) - 1
    with pytest.raises(DeviceRunFailed, match=rf"checkpoint of {limit + 1} bytes, {limit} are") as caught:
        runner.run(plan, checkpoint, dense_data[2], checkpoint_bytes_limit=limit)
    assert caught.value.reason is Reason.CHECKPOINT_TOO_LARGE
    fits = {"checkpoint_bytes_limit": len(checkpoint), "update_bytes_limit": size}
    assert len(runner.run(plan, checkpoint, dense_data[2], **fits).update) == size


def own_plan(values):
    """A plan that saves what `values(examples)` gives, examples being a data set of strings; it reads no checkpoint."""
    import tensorflow as tf

    from fedcompute.builder.example_source import external_examples
    from fedcompute.builder.plan import build_plan, client_only_plan, example_selector
    from fedcompute.builder.tflite import convert
    from fedcompute.protos import learning_pb2

    inputs = ["data_token", "input_filepath", "output_filepath"]
    with tf.Graph().as_default() as graph:
        token, _, path = (tf.compat.v1.placeholder(tf.string, [], name) for name in inputs)
        value = values(external_examples(token, b""))
        tf.raw_ops.SaveSlices(filename=path, tensor_names=["update"], shapes_and_slices=[""], data=[value], name="save")
    flatbuffer = convert(graph.as_graph_def(), inputs, "save")
    return client_only_plan(build_plan(learning_pb2.LearningProcess(), flatbuffer, example_selector("")))


CHAINS = {
    "single examples": lambda data: data,
    "batches": lambda data: data.batch(3),
    "whole batches": lambda data: data.batch(3, drop_remainder=True),
    "taken, then in batches": lambda data: data.take(4).batch(3),
    "in batches, then taken": lambda data: data.batch(3).take(2),
    "taken beyond the end": lambda data: data.take(-1).batch(3).take(100),
    "mapped": lambda data: data.map(lambda one: one + "!"),
    "mapped before and behind batches": lambda data: (
        data.map(lambda one: one + "!").batch(3).map(lambda all_: all_[::-1])
    ),
    "mapped twice": lambda data: data.batch(3).map(lambda all_: all_ + "!").map(lambda all_: all_[::-1]),
    "batches of batches": lambda data: data.batch(2, drop_remainder=True).batch(2),
    "skipped": lambda data: data.skip(2).batch(2),
    "repeated": lambda data: data.batch(3).repeat(2),
}


@pytest.mark.filterwarnings("ignore:.*AutoGraph")
@pytest.mark.parametrize("chain", CHAINS)
def test_data_sets_give_the_elements_that_tensorflow_gives(runner, chain):
    import tensorflow as tf

    def told(examples):
        said = CHAINS[chain](examples).reduce(
            tf.constant(""),
            lambda state, part: state + "/" + tf.strings.reduce_join(tf.reshape(part, [-1]), separator=","),
        )
        return tf.reshape(said, [1])

    plan = own_plan(told)
    for count in (0, 1, 6, 7):
        examples = [f"{index}".encode() for index in range(1, count + 1)]
        expected = told(tf.data.Dataset.from_tensor_slices(tf.constant(examples, tf.string, [count]))).numpy()
        update = read_checkpoint(runner.run(plan, b"", examples).update)
        assert update["update"].tolist() == expected.tolist()


def test_batches_of_no_size_are_an_error_as_in_tensorflow(runner):
    def count(examples):
        import tensorflow as tf

        return examples.batch(-2).reduce(tf.constant(0.0), lambda state, _: state + 1.0)

    with pytest.raises(DeviceRunFailed) as caught:
        runner.run(own_plan(count), b"", [b"example"])
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED


def endless_loop(examples):
    import tensorflow as tf

    start = examples.reduce(tf.constant(1.0), lambda state, _: state + 1.0)
    return tf.while_loop(lambda x: x > 0, lambda x: (x + 1.0,), (start,))[0]


def endless_data(examples):
    import tensorflow as tf

    return examples.repeat().reduce(tf.constant(1.0), lambda state, _: state + 1.0)


@pytest.fixture(scope="module", params=[endless_loop, endless_data], ids=["loop", "data"])
def endless_plan(request):
    return own_plan(request.param)


@contextmanager
def closing(runner):
    try:
        yield runner
    finally:
        runner.cancel()
        runner.close()


def test_a_cancelled_run_ends_within_a_second_and_the_next_one_runs(
    runner, endless_plan, reference_plan, dense_data, dense_weights
):
    runner.prepare(endless_plan)
    for _ in range(2):
        ended = []

        def endless(ended=ended):
            with pytest.raises(DeviceRunFailed) as caught:
                runner.run(endless_plan, b"", [b"example"])
            ended.append(caught.value.reason)

        thread = threading.Thread(target=endless, daemon=True)
        thread.start()
        time.sleep(0.5)
        start = time.perf_counter()
        runner.cancel()
        thread.join(10)
        assert time.perf_counter() - start < 1
        assert ended == [Reason.RUN_CANCELLED]
    runner.cancel()
    checkpoint = client_checkpoint(dense_weights)
    assert runner.run(reference_plan("client_only_plan.pb"), checkpoint, dense_data[2]).example_count == 20


def test_cancelling_the_await_ends_the_run_that_computes_or_waits_and_no_other(
    runner, endless_plan, reference_plan, dense_data, dense_weights
):
    async def scenario():
        first, second = (asyncio.create_task(runner.train(endless_plan, b"", [b"example"])) for _ in range(2))
        plan, checkpoint = reference_plan("client_only_plan.pb"), client_checkpoint(dense_weights)
        third = asyncio.create_task(runner.train(plan, checkpoint, dense_data[2]))
        await asyncio.sleep(0.5)
        start = time.perf_counter()
        second.cancel()
        first.cancel()
        result = await third
        seconds = time.perf_counter() - start
        ends = await asyncio.gather(first, second, return_exceptions=True)
        return result, seconds, [type(end) for end in ends]

    runner.prepare(reference_plan("client_only_plan.pb"))
    runner.prepare(endless_plan)
    result, seconds, ends = asyncio.run(scenario())
    assert result.example_count == 20
    assert seconds < 1
    assert ends == [asyncio.CancelledError] * 2


def test_a_run_over_its_time_limit_fails_and_says_so(endless_plan):
    with closing(PlanRunner(time_limit=0.2)) as hurried:
        with pytest.raises(DeviceRunFailed, match=r"may compute for 0\.2 s") as caught:
            hurried.run(endless_plan, b"", [b"example"])
        assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED


def quoted_number(examples):
    import tensorflow as tf

    return examples.reduce(tf.constant(0.0), lambda state, one: state + tf.strings.to_number(one))


def quoted_index(examples):
    import tensorflow as tf

    length = examples.reduce(tf.constant(0), lambda state, one: state + tf.strings.length(one))
    return tf.gather(tf.constant([0.0, 1.0]), length)


@pytest.mark.parametrize(
    ("values", "secret"), [(quoted_number, b"my secret"), (quoted_index, b"x" * 4711)], ids=["text", "index"]
)
def test_a_failure_does_not_quote_an_example(runner, values, secret):
    with pytest.raises(DeviceRunFailed) as caught:
        runner.run(own_plan(values), b"", [secret])
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED
    assert "InvalidArgumentError in " in caught.value.detail
    assert "secret" not in caught.value.detail
    assert "4711" not in caught.value.detail


def test_importing_the_runtime_loads_neither_tensorflow_nor_numpy():
    loaded = "bool({'tensorflow', 'numpy'} & sys.modules.keys())"
    code = f"import fedcompute.device.plans.plan_runner, sys; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
