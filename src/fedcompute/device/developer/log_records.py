"""The REQUESTS and EVENTS of a service (spec/device.md 7.5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedcompute.device.developer.connection import Ask, Refused
from fedcompute.device.developer.errors import IllegalState

if TYPE_CHECKING:
    ColumnValue = bool | int | float | str | bytes | None
else:
    # The decoder of messages between processes takes no union of text and bytes; `check_columns` does.
    ColumnValue = Any

Row = Mapping[str, ColumnValue]
"""Named columns: truth values, 64-bit integers, floats, text, bytes, or None."""


def check_columns(columns: Row) -> None:
    """Raises TypeError or ValueError naming the first column that is not what a `Row` may hold."""
    for name, value in columns.items():
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str, bytes, type(None))):
            raise TypeError(f"column {name!r} holds {type(value).__name__}, which is no value of a column")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"column {name!r} holds an integer of more than 64 bits")


@dataclass(frozen=True)
class RequestLogRecord:
    """What a service keeps of one request: rows of named columns. The device sets `time` and `id` as it writes."""

    rows: Sequence[Row] = ()
    time: datetime | None = None
    id: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.id < 2**63:
            raise ValueError(f"id is {self.id}, which the device never gave")
        for row in self.rows:
            check_columns(row)


@dataclass(frozen=True)
class EventLogRecord:
    """What happened to one row of a request record.

    `row_index`: of the row; `type`: 1 to 127, the developer's. `request_log_record`: a record that was read back;
    None stands for that of the same output. An event without a record, or with a row that it lacks, is dropped.
    """

    row_index: int = 0
    type: int = 1
    data: Row | None = None
    request_log_record: RequestLogRecord | None = None
    time: datetime | None = None

    def __post_init__(self) -> None:
        if self.row_index < 0:
            raise ValueError(f"row_index is {self.row_index}, not at least 0")
        if not 1 <= self.type <= 127:
            raise ValueError(f"type is {self.type}, not 1 to 127")
        if self.data is not None:
            check_columns(self.data)


class LogReader:
    """The service's own records by time, both bounds exclusive, in the order in which they were written.

    Its methods raise ValueError for bounds in the wrong order or before 1970, IllegalState where there is no reading.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def get_requests(self, start: datetime, end: datetime) -> list[RequestLogRecord]:
        """Request records written between `start` and `end`."""
        try:
            found: list[RequestLogRecord] = self._ask("logs.requests", _bounds(start, end), list[RequestLogRecord])
        except Refused as refused:
            raise IllegalState(refused.detail) from None
        return found

    def get_joined_events(self, start: datetime, end: datetime) -> list[EventLogRecord]:
        """Event records written between `start` and `end`, each with its request record and its own row index."""
        try:
            found: list[EventLogRecord] = self._ask("logs.joined_events", _bounds(start, end), list[EventLogRecord])
        except Refused as refused:
            raise IllegalState(refused.detail) from None
        return found


def _bounds(start: datetime, end: datetime) -> tuple[int, int]:
    refusal = f"from {start} to {end}: the end must lie after the start, the start not before 1970"
    try:
        low, high = (round(one.astimezone(UTC).timestamp() * 1000) for one in (start, end))
    except OverflowError:
        raise ValueError(refusal) from None
    if low < 0 or high <= low:
        raise ValueError(refusal)
    return low, high
