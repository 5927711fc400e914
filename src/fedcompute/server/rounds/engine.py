"""The round engine: one loop that looks at what the database says and does what comes next."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_LOG = logging.getLogger(__name__)
_TICK = 1.0
# Without a pause between passes a burst of uploads would make the engine compete with the requests it waits for.
_PAUSE = 0.005
# A pass reads and writes the database and a few blobs; one that takes longer than this hangs.
_LONGEST_PASS = 60.0


class Engine:
    """Runs passes one after the other in a thread of its own: at every `wake`, and once a second.

    `one_pass` returns whether it changed anything, in which case the next pass follows at once. It must be safe to
    repeat and to cut off between transactions; an exception ends one pass and is logged once per distinct text.
    """

    def __init__(self, one_pass: Callable[[], bool]) -> None:
        self._one_pass = one_pass
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._last = time.monotonic()
        self._last_error = ""

    def start(self) -> None:
        """Starts the loop; call from the event loop that it shall live in."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="round engine")

    def wake(self) -> None:
        """Asks for a pass soon; callable from any thread, and before `start` and after `stop`."""
        if self._loop is not None:
            # A job may end when the loop is closed already.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    async def stop(self) -> None:
        """Waits for the running pass and ends the loop."""
        self._stopping = True
        self._event.set()
        if self._task is not None:
            await self._task

    @property
    def alive(self) -> bool:
        """Whether the loop runs and finished a pass within the last minute."""
        running = self._task is not None and not self._task.done()
        return running and time.monotonic() - self._last < _LONGEST_PASS

    async def _run(self) -> None:
        # A thread of its own: requests may have taken every thread of the shared pool.
        with ThreadPoolExecutor(1, thread_name_prefix="round-engine") as thread:
            while not self._stopping:
                self._event.clear()
                changed = await asyncio.get_running_loop().run_in_executor(thread, self._guarded_pass)
                if self._stopping:
                    break
                await asyncio.sleep(_PAUSE)
                if not changed:
                    try:
                        await asyncio.wait_for(self._event.wait(), _TICK)
                    except TimeoutError:
                        continue

    def _guarded_pass(self) -> bool:
        try:
            changed = self._one_pass()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != self._last_error:
                _LOG.exception("a pass of the round engine failed")
            self._last_error = text
            return False
        self._last, self._last_error = time.monotonic(), ""
        return changed
