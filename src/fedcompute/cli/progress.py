"""Live progress at the prompt: one line that changes, on a terminal; nothing in a file or a pipe."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

# In the order in which a run passes them.
_STATES = ("waiting", "check_in", "examples", "download", "train", "encrypt", "report", "upload", "starting")


class DeviceLine:
    """A line with what is going on, the seconds since its start, and how many devices are in each state."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._start = time.monotonic()
        self._live = Live("", console=self.console, transient=True, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def show(self, what: str, states: Mapping[str, int]) -> None:
        """Replaces the line."""
        if not self.console.is_terminal:
            return
        line = Text(f"{time.monotonic() - self._start:4.0f} s  ", style="dim")
        line.append(f"{what}  ", style="bold")
        for state in _STATES:
            if states.get(state):
                line.append(f"{state.replace('_', '-')} ", style="dim").append(f"{states[state]}  ", style="cyan")
        self._live.update(line)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is waited for while the block runs, on a terminal; beside the output, so that pipes stay clean."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
