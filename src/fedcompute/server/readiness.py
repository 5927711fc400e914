"""Whether the parts that a server needs do their work, asked so that an answer always comes."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedcompute.errors import FedComputeError

_LOG = logging.getLogger(__name__)
# A part that has not answered by then does not work, whatever it says later.
PATIENCE_S = 2.0
_FRESH_S = 1.0

# Returns what is wrong with a part, None if nothing is.
Part = Callable[[], str | None]


@dataclass
class _Look:
    """One question to a part, on its way or answered."""

    began: float
    problem: str | None = None
    ended: float | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Readiness:
    """Asks each part at most once a second, and never again while it still owes an answer.

    Each question has a thread of its own, so that neither a part that hangs nor requests that have taken every other
    thread keep the answer waiting; a part that hangs costs one thread.
    """

    def __init__(self, parts: Mapping[str, Part], patience: float = PATIENCE_S) -> None:
        """`parts`: by name; one may also raise FedComputeError."""
        self._parts = parts
        self._patience = patience
        self._looks: dict[str, _Look] = {}
        self._told: set[str] = set()

    @property
    def parts(self) -> Collection[str]:
        """The names of the parts."""
        return self._parts.keys()

    async def problems(self) -> dict[str, str]:
        """What does not work, by part; takes no longer than the patience. Changes are logged. For one event loop."""
        asked = {name: self._look(name) for name in self._parts}
        deadline = time.monotonic() + self._patience
        while any(not one.done.is_set() for one in asked.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        found = {}
        for name, one in asked.items():
            if not one.done.is_set():
                found[name] = f"no answer for {time.monotonic() - one.began:.0f} s"
            elif one.problem is not None:
                found[name] = one.problem
        self._tell(found)
        return found

    def _tell(self, found: Mapping[str, str]) -> None:
        for name in found.keys() - self._told:
            _LOG.warning("not ready: %s: %s", name, found[name])
        for name in self._told - found.keys():
            _LOG.warning("%s does its work again", name)
        self._told = set(found)

    def _look(self, name: str) -> _Look:
        known = self._looks.get(name)
        now = time.monotonic()
        if known is not None and (known.ended is None or now - known.ended < _FRESH_S):
            return known
        look = self._looks[name] = _Look(now)
        threading.Thread(target=_ask, args=(self._parts[name], look), name=f"ready-{name}", daemon=True).start()
        return look


def _ask(part: Part, look: _Look) -> None:
    try:
        look.problem = part()
    except FedComputeError as error:
        look.problem = error.detail
    except Exception as error:
        look.problem = f"unexpected {type(error).__name__}"
    finally:
        look.ended = time.monotonic()
        look.done.set()
