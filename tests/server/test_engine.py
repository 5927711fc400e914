import asyncio
import threading
import time

from fedcompute.server.rounds import engine as rounds_engine
from fedcompute.server.rounds.engine import Engine


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_wake_is_answered_at_once_and_not_at_the_next_tick():
    async def scenario():
        passes = []
        engine = Engine(lambda: bool(passes.append(time.monotonic())))
        engine.start()
        await asyncio.sleep(0.2)
        before, begun = len(passes), time.monotonic()
        threading.Thread(target=engine.wake).start()
        while len(passes) == before:
            await asyncio.sleep(0.005)
        assert passes[-1] - begun < 0.2
        await engine.stop()
        assert not engine.alive

    run(scenario)


def test_a_pass_that_changed_something_is_followed_by_another():
    async def scenario():
        answers = [True, True, True, False]
        engine = Engine(lambda: answers.pop(0) if answers else False)
        engine.start()
        await asyncio.sleep(0.3)
        assert not answers
        await engine.stop()

    run(scenario)


def test_a_pass_that_raises_ends_neither_loop_nor_life(caplog):
    async def scenario():
        passes = []

        def one_pass():
            passes.append(1)
            raise RuntimeError("no luck")

        engine = Engine(one_pass)
        engine.start()
        for _ in range(3):
            engine.wake()
            await asyncio.sleep(0.1)
        assert len(passes) >= 3
        assert engine.alive
        await engine.stop()

    run(scenario)
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_an_engine_whose_passes_all_fail_for_longer_than_its_patience_is_not_alive_until_one_succeeds(monkeypatch):
    monkeypatch.setattr(rounds_engine, "_LONGEST_PASS", 0.5)

    async def scenario():
        broken = True

        def one_pass():
            if broken:
                raise RuntimeError("no luck")
            return True

        engine = Engine(one_pass)
        engine.start()
        assert engine.alive
        await asyncio.sleep(0.7)
        assert not engine.alive
        broken = False
        engine.wake()
        while not engine.alive:
            await asyncio.sleep(0.01)
        await engine.stop()

    run(scenario)


def test_stop_waits_for_the_pass_under_way_and_wakes_are_harmless_afterwards():
    engines = []

    async def scenario():
        done = []

        def one_pass():
            time.sleep(0.3)
            return bool(done.append(1))

        engine = Engine(one_pass)
        engines.append(engine)
        engine.start()
        await asyncio.sleep(0.1)
        await engine.stop()
        assert done == [1]

    run(scenario)
    engines[0].wake()
