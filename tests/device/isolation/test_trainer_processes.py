"""How the confined processes of trainings come and go; no plan here needs TensorFlow."""

import asyncio
import os
import signal
import sys
import time

import pytest

from fedcompute.device.isolation import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("confined")


def test_another_owner_gets_another_process(light, processes, answered):
    async def scenario(trainer):
        assert await answered(trainer, 1, "one")
        first = trainer.pid
        assert await answered(trainer, 2, "other")
        assert trainer.pid != first
        assert processes.is_gone(first, 0)

    light(scenario)


def test_a_process_is_replaced_after_some_computations(light, answered):
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


def test_an_idle_process_is_ended_after_a_while_and_not_before(light, processes, answered):
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


def test_a_process_that_died_while_it_was_idle_is_replaced_unnoticed(light, answered):
    async def scenario(trainer):
        assert await answered(trainer, 1)
        os.kill(trainer.pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert await answered(trainer, 2)

    light(scenario)


def test_trainings_started_together_take_turns_and_get_their_own_updates(light, answered):
    async def scenario(trainer):
        owners = ["one", "other"]
        return await asyncio.gather(*(answered(trainer, value, owners[value % 2]) for value in range(4)))

    assert all(light(scenario))


def test_a_process_that_does_not_come_back_is_killed(light, monkeypatch, answered, aborted):
    monkeypatch.setattr(trainer_module, "_GRACE_SECONDS", 0.3)

    async def scenario(trainer):
        assert await answered(trainer, 1)
        os.kill(trainer.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert await aborted(answered(trainer, 2)) == "no update within 0.5 s"
        assert time.monotonic() - start < 3
        assert await answered(trainer, 3)

    light(scenario, time_limit=0.2)


def test_closing_ends_a_training_in_progress_and_those_to_come(light, answered, aborted):
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
def test_a_cancellation_leaves_nothing_whenever_it_comes(light, seconds, answered):
    async def scenario(trainer):
        task = asyncio.create_task(answered(trainer, 1))
        await asyncio.sleep(seconds)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
        assert await answered(trainer, 2)

    light(scenario)


def test_a_training_without_a_place_or_a_process_fails(light, tmp_path, monkeypatch, answered, aborted):
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
