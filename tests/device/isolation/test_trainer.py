"""Training with TensorFlow in confined processes: what it computes, and what it may cost."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedcompute.device.isolation.trainer import IsolatedTrainer
from fedcompute.device.plans.plan_runner import PlanRunner
from fedcompute.errors import DeviceRunFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

GIBIBYTE = 1 << 30

pytestmark = pytest.mark.usefixtures("confined")


def own_plan(values: Callable[[Any], Any]) -> plan_pb2.ClientOnlyPlan:
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


@pytest.fixture(scope="module")
def roots_plan():
    import tensorflow as tf

    def values(examples: Any) -> Any:
        return tf.sqrt(tf.range(7.0) * examples.reduce(0.1, lambda state, one: state + tf.strings.to_number(one)))

    return own_plan(values)


@pytest.fixture(scope="module")
def endless_plan():
    import tensorflow as tf

    return own_plan(lambda examples: examples.repeat().reduce(tf.constant(1.0), lambda state, _: state + 1.0))


@pytest.fixture(scope="module")
def greedy_plan():
    """A text that doubles until it has 4 GiB; of a tensor TensorFlow asks for ten seconds whether there is room now."""
    import tensorflow as tf

    def values(examples: Any) -> Any:
        text = examples.reduce(tf.constant(""), lambda state, one: state + one)
        for _ in range(32):
            text = tf.strings.join([text, text])
        return tf.strings.length(text)

    return own_plan(values)


# The processes are kept from test to test, because each loads it anew.


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def trainer(loop, tmp_path_factory, confined):
    scratch = tmp_path_factory.mktemp("scratch")
    trainer = IsolatedTrainer(scratch)
    yield trainer
    loop.run(trainer.close())
    assert list(scratch.iterdir()) == []


@pytest.fixture(scope="module")
def hurried(loop, tmp_path_factory, confined):
    """A trainer whose computations may take a second and a GiB."""
    trainer = IsolatedTrainer(tmp_path_factory.mktemp("scratch"), time_limit=1.0, memory=GIBIBYTE)
    yield trainer
    loop.run(trainer.close())


def test_an_update_is_that_of_the_plan_runner_in_this_process(loop, trainer, roots_plan):
    runner = PlanRunner()
    examples = [b"1.5", b"2", b"0.25"]
    expected = runner.run(roots_plan, b"", examples)
    runner.close()
    assert loop.run(trainer.train("owner", roots_plan, b"", examples)) == expected
    np.testing.assert_allclose(read_checkpoint(expected.update)["update"], np.sqrt(np.arange(7) * 3.85), rtol=1e-6)


def test_the_references_plan_gives_the_same_bytes_confined(loop, trainer, reference_plan, dense_data, dense_weights):
    leaves = {f"client/0/trainable/{i}": weights for i, weights in enumerate(dense_weights)}
    checkpoint = write_checkpoint({**leaves, "client/1": np.array(0.1, np.float32)})
    runner = PlanRunner()
    expected = runner.run(reference_plan("client_only_plan.pb"), checkpoint, dense_data[2])
    runner.close()
    result = loop.run(trainer.train("owner", reference_plan("client_only_plan.pb"), checkpoint, dense_data[2]))
    assert result == expected
    assert result.example_count == 20


def test_the_next_training_of_the_same_owner_uses_the_same_process_and_is_quick(loop, trainer, roots_plan):
    first = loop.run(trainer.train("owner", roots_plan, b"", [b"1"]))
    pid, start = trainer.pid, time.monotonic()
    assert loop.run(trainer.train("owner", roots_plan, b"", [b"1"])) == first
    assert time.monotonic() - start < 0.5
    assert trainer.pid == pid


def test_what_the_plan_runner_refuses_comes_back_with_its_reason_and_remedy(loop, trainer, roots_plan):
    with pytest.raises(DeviceRunFailed, match="StringToNumber") as caught:
        loop.run(trainer.train("owner", roots_plan, b"", [b"not a number"]))
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED
    pid = trainer.pid
    with pytest.raises(DeviceRunFailed, match="example 0 of 1 has no bytes") as caught:
        loop.run(trainer.train("owner", roots_plan, b"", [b""]))
    assert caught.value.reason is Reason.EXAMPLES_FAILED
    assert trainer.pid == pid


def test_a_plan_that_reads_files_is_refused_before_it_runs(loop, trainer):
    import tensorflow as tf

    plan = own_plan(lambda examples: examples.reduce(tf.io.read_file("/etc/passwd"), lambda state, one: state + one))
    with pytest.raises(DeviceRunFailed, match="ReadFile") as caught:
        loop.run(trainer.train("owner", plan, b"", [b"x"]))
    assert caught.value.reason is Reason.OPS_NOT_SUPPORTED
    assert "docs/plan-operations.md" in caught.value.remedy


def test_a_training_that_is_cancelled_ends_within_a_second_and_the_next_one_works(
    loop, trainer, endless_plan, roots_plan, processes
):
    async def scenario() -> float:
        task = asyncio.create_task(trainer.train("owner", endless_plan, b"", [b"x"]))
        await asyncio.sleep(0.5)
        assert not task.done()
        pid, start = trainer.pid, time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seconds = time.monotonic() - start
        assert processes.is_gone(pid, 0)
        return seconds

    assert loop.run(scenario()) < 1
    assert loop.run(trainer.train("owner", roots_plan, b"", [b"1"])).example_count == 1
    # What it has left is looked at by others.
    loop.run(trainer.close())


def test_a_training_over_its_time_ends_itself_and_its_process_is_kept(loop, hurried, endless_plan, roots_plan):
    with pytest.raises(DeviceRunFailed, match="a run may compute for 1 s") as caught:
        loop.run(hurried.train("owner", endless_plan, b"", [b"x"]))
    assert caught.value.reason is Reason.PLAN_COMPUTATION_FAILED
    pid = hurried.pid
    assert loop.run(hurried.train("owner", roots_plan, b"", [b"1"])).example_count == 1
    assert hurried.pid == pid


def test_a_training_gets_no_more_memory_than_it_may_have(loop, hurried, greedy_plan, roots_plan, aborted):
    loop.run(aborted(hurried.train("owner", greedy_plan, b"", [b"x"])))
    assert loop.run(hurried.train("owner", roots_plan, b"", [b"1"])).example_count == 1


def test_a_process_that_is_killed_while_it_computes_costs_that_training(loop, hurried, endless_plan, answered, aborted):
    async def scenario() -> None:
        task = asyncio.create_task(hurried.train("owner", endless_plan, b"", [b"x"]))
        await asyncio.sleep(0.3)
        os.kill(hurried.pid, signal.SIGKILL)
        assert await aborted(task) == "no update; the process got SIGKILL"
        assert await answered(hurried, 5)

    loop.run(scenario())


def test_a_process_too_small_for_tensorflow_says_so(loop, tmp_path, roots_plan, aborted):
    async def scenario() -> str:
        small = IsolatedTrainer(tmp_path, memory=128 << 20)
        detail = await aborted(small.train("owner", roots_plan, b"", [b"1"]))
        await small.close()
        return detail

    assert loop.run(scenario()) in (
        "the computation needs more than 128 MiB of memory",
        "no update; the process got SIGABRT",
        "no update; the process ended with 1",
    )
