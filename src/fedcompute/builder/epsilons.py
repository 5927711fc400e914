"""Exact epsilons that take long: computed beside other work, kept for the next time, and announced."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from time import monotonic

from fedcompute.builder.number_cache import number_path, read_number, write_number

logger = logging.getLogger(__name__)

# Seconds of silence before a computation is announced, and below which a result is not worth a file.
PATIENCE = 2.0
_WORTH_A_FILE = 0.5
_NAME = "epsilon"
# Kept bounds and values may differ by the rounding of their decimal forms.
_ROUNDING = 1e-12


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Says once in the log what is being computed if it takes longer than PATIENCE."""
    timer = threading.Timer(PATIENCE, logger.warning, ["%s takes more than %g seconds ...", what, PATIENCE])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class ExactEpsilon:
    """An exact epsilon, computed in a thread of its own from `begin` on, or in `result` where nobody began it.

    `key`: all that the value depends on. `bounds`: proven limits of the value.

    Formal guarantees: a value from a file lies within `bounds`, so a wrong file can move the epsilon that is shown
    between them and no further; whoever decides on a privacy target asks `fresh`, which reads no file.
    """

    def __init__(self, compute: Callable[[], float], key: Sequence[object], bounds: tuple[float, float]) -> None:
        self._compute = compute
        self._path = number_path("epsilons", key)
        self._bounds = bounds
        self._future: Future[float] | None = None
        self._from_file = False

    def begin(self) -> None:
        """Starts the thread unless the value is known or a thread runs."""
        if self._future is not None:
            return
        future: Future[float] = Future()
        self._future = future
        if (known := self._kept()) is not None:
            self._from_file = True
            future.set_result(known)
            return
        # A daemon: a build that fails meanwhile need not wait for a number that nobody will read.
        threading.Thread(target=self._run, args=(future,), name="exact-epsilon", daemon=True).start()

    def result(self, timeout: float | None = None) -> float:
        """The value; TimeoutError after `timeout` seconds, else whatever the computation raises."""
        self.begin()
        assert self._future is not None, "a thread has begun"
        if timeout is not None or self._future.done():
            return self._future.result(timeout)
        with announced("The exact epsilon"):
            return self._future.result()

    def fresh(self) -> float:
        """The value, computed and not read from a file."""
        if self._future is None or self._from_file:
            self._future, self._from_file = Future(), False
            with announced("The exact epsilon"):
                self._run(self._future)
        return self._future.result()

    def _run(self, future: "Future[float]") -> None:
        start = monotonic()
        try:
            value = self._compute()
        except BaseException as error:
            future.set_exception(error)
            return
        if monotonic() - start > _WORTH_A_FILE:
            # First, since the process may end as soon as the value is there.
            write_number(self._path, _NAME, value)
        future.set_result(value)

    def _kept(self) -> float | None:
        lower, upper = self._bounds
        known = read_number(self._path, _NAME)
        if known is None or not lower * (1 - _ROUNDING) <= known <= upper * (1 + _ROUNDING):
            return None
        return known
