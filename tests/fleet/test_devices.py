import asyncio
import contextlib

from fedcompute.device.client.runtime import Device, RunOutcome
from fedcompute.fleet.devices import Observer, run_devices
from fedcompute.fleet.settings import FleetSettings


def test_a_device_ends_even_if_its_run_swallowed_the_cancellation(monkeypatch):
    """Stands in for libraries that lose a cancellation in a race, which no test can arrange."""
    running = asyncio.Event()

    async def swallow(self):
        running.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(30)
        return RunOutcome(success=False, phase="check_in", retry_window=0.01)

    async def cancel_once():
        settings = FleetSettings("http://localhost:1", "p", devices=2, processes=1, pause_minimum=0, pause_maximum=0)
        observer = Observer(lambda *_: None, lambda *_: None)
        fleet = asyncio.create_task(run_devices(settings, range(2), observer))
        await running.wait()
        await asyncio.sleep(0.1)
        fleet.cancel()
        _, unfinished = await asyncio.wait({fleet}, timeout=5)
        return unfinished

    monkeypatch.setattr(Device, "run_once", swallow)
    assert not asyncio.run(cancel_once())
