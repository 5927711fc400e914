"""What a benchmark found, as plain data: the rows of the one table that `make bench` prints (see README.md here)."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure, and what stands beside it."""

    group: str
    name: str
    value: float | None  # None: it failed, and the note says how
    unit: str
    against: str = ""  # a peer, the floor or the hardware, with its figure
    ratio: float | None = None  # speed over that of `against`: above 1 is faster
    note: str = ""


def write_rows(path: Path | None, rows: Iterable[Row]) -> None:
    """Writes a JSON list of rows; without a path nothing."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
