"""Training in confined processes: what it computes, how processes come and go, and what a bad one may try."""

import asyncio
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcompute.device.isolation import trainer as trainer_module
from fedcompute.device.isolation.trainer import IsolatedTrainer
from fedcompute.device.plans.plan_runner import PlanResult, PlanRunner
from fedcompute.errors import DeviceRunFailed, OperationFailed, Reason
from fedcompute.protos import plan_pb2
from fedcompute.protos.example_query_result_pb2 import ExampleQueryResult
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

GIBIBYTE = 1 << 30

pytestmark = pytest.mark.usefixtures("confined")


# Plans


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


def query_plan() -> plan_pb2.ClientOnlyPlan:
    """A plan that TensorFlow is not needed for; its update is the vector `v` of the one example."""
    plan = plan_pb2.ClientOnlyPlan()
    query = plan.phase.example_query_spec.example_queries.add()
    query.output_vector_specs["v"].vector_name = "v"
    query.output_vector_specs["v"].data_type = plan_pb2.ExampleQuerySpec.OutputVectorSpec.DataType.INT64
    plan.phase.federated_example_query.aggregations["v"].tf_v1_checkpoint_aggregation.SetInParent()
    return plan


def query_example(value: int) -> bytes:
    result = ExampleQueryResult()
    result.vector_data.vectors["v"].int64_values.value.append(value)
    return result.SerializeToString()


async def answered(trainer: IsolatedTrainer, value: int, owner: str = "owner") -> bool:
    """Whether a training that needs no TensorFlow gives what it should."""
    result = await trainer.train(owner, query_plan(), b"", [query_example(value)])
    return read_checkpoint(result.update)["v"].tolist() == [value]


async def aborted(awaitable: Any) -> str:
    """The detail of a training that fails as TRAINING_ABORTED."""
    with pytest.raises(DeviceRunFailed) as caught:
        await awaitable
    assert caught.value.reason is Reason.TRAINING_ABORTED
    return caught.value.detail


# With TensorFlow. The processes are kept from test to test, because each loads it anew.


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


def test_a_training_gets_no_more_memory_than_it_may_have(loop, hurried, greedy_plan, roots_plan):
    loop.run(aborted(hurried.train("owner", greedy_plan, b"", [b"x"])))
    assert loop.run(hurried.train("owner", roots_plan, b"", [b"1"])).example_count == 1


def test_a_process_that_is_killed_while_it_computes_costs_that_training(loop, hurried, endless_plan):
    async def scenario() -> None:
        task = asyncio.create_task(hurried.train("owner", endless_plan, b"", [b"x"]))
        await asyncio.sleep(0.3)
        os.kill(hurried.pid, signal.SIGKILL)
        assert await aborted(task) == "no update; the process got SIGKILL"
        assert await answered(hurried, 5)

    loop.run(scenario())


def test_a_process_too_small_for_tensorflow_says_so(loop, tmp_path, roots_plan):
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


# Without TensorFlow: how processes come and go


@pytest.fixture
def light(tmp_path, processes):
    """`light(scenario, **options)` runs `scenario(trainer)`; nothing is left behind then."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    async def run(scenario: Callable[[IsolatedTrainer], Any], options: dict[str, Any]) -> Any:
        trainer = IsolatedTrainer(scratch, **options)
        try:
            return await scenario(trainer)
        finally:
            await trainer.close()
            assert trainer.pid is None

    def go(scenario: Callable[[IsolatedTrainer], Any], **options: Any) -> Any:
        result = asyncio.run(run(scenario, options))
        assert list(scratch.iterdir()) == []
        return result

    return go


def test_another_owner_gets_another_process(light, processes):
    async def scenario(trainer):
        assert await answered(trainer, 1, "one")
        first = trainer.pid
        assert await answered(trainer, 2, "other")
        assert trainer.pid != first
        assert processes.is_gone(first, 0)

    light(scenario)


def test_a_process_is_replaced_after_some_computations(light):
    async def scenario(trainer):
        pids = []
        for value in range(10):
            assert await answered(trainer, value)
            pids.append(trainer.pid)
        return pids

    pids = light(scenario)
    assert len(set(pids[:8])) == 1
    assert len(set(pids[8:])) == 1
    assert pids[7] != pids[8]


def test_an_idle_process_is_ended_after_a_while_and_not_before(light, processes):
    async def scenario(trainer):
        assert await answered(trainer, 1)
        pid = trainer.pid
        for _ in range(3):
            await asyncio.sleep(0.25)
            assert trainer.pid == pid
            assert await answered(trainer, 2)
        await asyncio.sleep(1.5)
        assert trainer.pid is None
        assert processes.is_gone(pid, 0)
        assert await answered(trainer, 3)

    light(scenario, linger=0.5)


def test_a_process_that_died_while_it_was_idle_is_replaced_unnoticed(light):
    async def scenario(trainer):
        assert await answered(trainer, 1)
        os.kill(trainer.pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert await answered(trainer, 2)

    light(scenario)


def test_trainings_started_together_take_turns_and_get_their_own_updates(light):
    async def scenario(trainer):
        owners = ["one", "other"]
        return await asyncio.gather(*(answered(trainer, value, owners[value % 2]) for value in range(4)))

    assert all(light(scenario))


def test_a_process_that_does_not_come_back_is_killed(light, monkeypatch):
    monkeypatch.setattr(trainer_module, "_GRACE_SECONDS", 0.3)

    async def scenario(trainer):
        assert await answered(trainer, 1)
        os.kill(trainer.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert await aborted(answered(trainer, 2)) == "no update within 0.5 s"
        assert time.monotonic() - start < 3
        assert await answered(trainer, 3)

    light(scenario, time_limit=0.2)


def test_closing_ends_a_training_in_progress_and_those_to_come(light):
    async def scenario(trainer):
        assert await answered(trainer, 1)
        os.kill(trainer.pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(answered(trainer, value)) for value in (2, 3)]
        await asyncio.sleep(0.1)
        await trainer.close()
        assert await aborted(tasks[0]) == "no update; the process let go of its connection"
        assert await aborted(tasks[1]) == "the trainer is closed"
        assert await aborted(answered(trainer, 4)) == "the trainer is closed"

    light(scenario)


@pytest.mark.parametrize("seconds", [0, 0.001, 0.02, 0.06, 0.1, 0.15, 0.3])
def test_a_cancellation_leaves_nothing_whenever_it_comes(light, seconds):
    async def scenario(trainer):
        task = asyncio.create_task(answered(trainer, 1))
        await asyncio.sleep(seconds)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
        assert await answered(trainer, 2)

    light(scenario)


def test_a_training_without_a_place_or_a_process_fails(light, tmp_path, monkeypatch):
    async def scenario(trainer):
        with monkeypatch.context() as changed:
            changed.setattr(sys, "executable", "/nonexistent/python")
            detail = "no training process: the system starts no process: No such file or directory"
            assert await aborted(answered(trainer, 1)) == detail
        (tmp_path / "scratch").rmdir()
        assert await aborted(answered(trainer, 1)) == "no folder for the training process: No such file or directory"
        (tmp_path / "scratch").mkdir()
        assert await answered(trainer, 2)

    light(scenario)


# A process that a plan has taken over


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """`hostile(code)` has this code run confined in place of the trainer; it may `say` and `send`."""
    program = """
    import ctypes, msgspec, os, socket, struct, subprocess, sys, time
    from pathlib import Path
    from fedcompute.device.isolation.child import enter
    from fedcompute.device.isolation.messages import *

    def send(body, announced=None):
        os.write(int(sys.argv[1]), struct.pack(">I", len(body) if announced is None else announced) + body)

    def say(kind, **fields):
        send(msgspec.msgpack.encode({"type": kind, **fields}))

    end, start = enter()
    end.receive()
    """
    python = sys.executable

    def take_over(code: str) -> None:
        (tmp_path / "hostile.py").write_text(textwrap.dedent(program) + textwrap.dedent(code))
        wrapper = tmp_path / "python"
        source = shlex.quote((tmp_path / "hostile.py").read_text())
        wrapper.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {shlex.quote(python)} -I -u -c {source} "$last"\n')
        wrapper.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(wrapper))

    yield take_over
    monkeypatch.undo()


LIES = {
    "garbage": ("send(b'\\xc1' * 100)", "an answer that breaks a rule (DecodeError)"),
    "nothing": ("send(b'')", "an answer that breaks a rule (DecodeError)"),
    "4 GiB": ("send(b'', announced=0xFFFFFFFF)", "an answer that breaks a rule: a message of 4294967295 bytes, over "),
    "deep nesting": (
        "send(b'\\x82\\xa4type\\xa7Trained\\xa5other' + b'\\x91' * 100_000 + b'\\xc0')",
        "an answer that breaks a rule (RecursionError)",
    ),
    "text that is none": (
        "send(b'\\x84\\xa4type\\xaeTrainingFailed\\xa6reason\\xa1\\xff\\xa6detail\\xa0\\xa6remedy\\xa0')",
        "an answer that breaks a rule (UnicodeDecodeError)",
    ),
    "a worker's message": ("say('Done', output=1)", "an answer that breaks a rule (ValidationError)"),
    "more examples than there were": (
        "say('Trained', update=b'x', example_count=2, example_bytes=1)",
        "an answer that breaks a rule (ValueError)",
    ),
    "fewer than none": (
        "say('Trained', update=b'x', example_count=-1, example_bytes=1)",
        "an answer that breaks a rule (ValueError)",
    ),
    "more bytes than there were": (
        "say('Trained', update=b'x', example_count=1, example_bytes=2**63)",
        "an answer that breaks a rule (ValueError)",
    ),
    "half a message": ("send(b'abc', announced=10); os._exit(0)", "no update; the process ended with 0"),
    "an end": ("os._exit(7)", "no update; the process ended with 7"),
    "a segmentation fault": ("ctypes.string_at(0)", "no update; the process got SIGSEGV"),
    "a closed connection": (
        "os.close(int(sys.argv[1])); time.sleep(60)",
        "no update; the process let go of its connection",
    ),
    "another's reason": ("say('TrainingFailed', reason='data_in_use', detail='d', remedy='r')", "d"),
    "no reason": ("say('TrainingFailed', reason='', detail='line\\n\\x1b[31mred', remedy='r')", "line  [31mred"),
    "a detail without end": ("say('TrainingFailed', reason='', detail='x' * 10_000_000, remedy='')", "x" * 2000),
}


@pytest.mark.parametrize(("code", "detail"), LIES.values(), ids=LIES)
def test_a_process_that_lies_costs_its_own_training(light, hostile, monkeypatch, processes, code, detail):
    hostile(f"{code}\ntime.sleep(60)")

    async def scenario(trainer):
        found = await aborted(answered(trainer, 1))
        monkeypatch.undo()
        assert await answered(trainer, 2)
        return found

    found = light(scenario)
    assert found == detail or (detail.endswith("over ") and found.startswith(detail))


def test_a_process_that_admits_not_to_be_confined_is_not_used(light, hostile):
    hostile("")
    # In place of `enter`, which tells the truth.
    lie = """
    from fedcompute.device.isolation.frames import ChildEnd
    from fedcompute.device.isolation.sandbox import Restriction

    end = ChildEnd(int(sys.argv[1]))
    end.receive()
    end.send(Confined((Restriction("files", False, (), "no Landlock"),)))
    end.receive()
    """
    wrapper = Path(sys.executable)
    wrapper.write_text(wrapper.read_text().replace("end, start = enter()\nend.receive()\n", textwrap.dedent(lie)))

    async def scenario(trainer):
        with pytest.raises(OperationFailed, match="no Landlock") as caught:
            await answered(trainer, 1)
        assert caught.value.reason is Reason.ISOLATION_UNAVAILABLE

    light(scenario)


def test_a_process_that_is_taken_over_reaches_its_own_folder_and_nothing_else(light, hostile, tmp_path):
    secret = tmp_path / "device.db"
    secret.write_text("a user's data")
    other = tmp_path / "scratch" / "training-other"
    hostile(
        f"""
        attempts = {{
            "users": lambda: open("/etc/passwd"),
            "database": lambda: open({str(secret)!r}, "rb"),
            "write database": lambda: open({str(secret)!r}, "ab"),
            "list": lambda: os.listdir({str(tmp_path)!r}),
            "other training": lambda: open({str(other)!r} + "/checkpoint"),
            "write beside": lambda: open({str(tmp_path / "scratch")!r} + "/new", "w"),
            "device memory": lambda: open(f"/proc/{{os.getppid()}}/mem", "rb"),
            "device command line": lambda: open(f"/proc/{{os.getppid()}}/cmdline", "rb"),
            "socket": lambda: socket.socket(),
            "unix socket": lambda: socket.socket(socket.AF_UNIX),
            "fork": lambda: os.fork(),
            "program": lambda: subprocess.run(["/bin/true"]),
            "signal": lambda: os.kill(os.getppid(), 15),
            "link": lambda: os.symlink("/etc/passwd", start.writable[0] + "/link"),
            "hard link": lambda: os.link({str(secret)!r}, start.writable[0] + "/link"),
            "pipe": lambda: os.mkfifo(start.writable[0] + "/pipe"),
            "memory": lambda: bytearray(start.memory),
        }}
        succeeded = []
        for name, attempt in attempts.items():
            try:
                attempt()
                succeeded.append(name)
            except (OSError, MemoryError):
                pass
        own = Path(start.writable[0], "file")
        own.write_text("mine")
        try:
            with own.open("wb") as file:
                file.seek(start.file_bytes)
                file.write(b"x")
                file.flush()
            succeeded.append("a file over its limit")
        except OSError:
            pass
        say("TrainingFailed", reason="", detail=f"succeeded: {{succeeded}}, {{own.exists()}}", remedy="")
        time.sleep(60)
        """
    )

    async def scenario(trainer):
        other.mkdir()
        (other / "checkpoint").write_text("another's")
        try:
            return await aborted(answered(trainer, 1))
        finally:
            (other / "checkpoint").unlink()
            other.rmdir()

    assert light(scenario, memory=GIBIBYTE // 2) == "succeeded: [], True"
    assert secret.read_text() == "a user's data"


def test_what_a_process_leaves_in_its_folder_goes_however_deep_it_is(light, hostile):
    hostile(
        """
        os.chdir(start.writable[0])
        for depth in range(1100):
            os.mkdir("directory")
            Path("file").write_text("x")
            os.chdir("directory")
        os.mkdir("shut", 0)
        say("TrainingFailed", reason="", detail="made", remedy="")
        time.sleep(60)
        """
    )

    async def scenario(trainer):
        assert await aborted(answered(trainer, 1)) == "made"

    light(scenario)


def test_what_a_process_prints_is_dropped(light, hostile, processes):
    hostile(
        """
        for _ in range(64):
            os.write(1, bytes(1 << 20))
        say("Trained", update=b"u", example_count=1, example_bytes=1)
        time.sleep(60)
        """
    )

    async def scenario(trainer):
        with processes.bounded_memory(32 << 20):
            assert await trainer.train("owner", query_plan(), b"", [b"x"]) == PlanResult(b"u", 1, 1)

    light(scenario)
