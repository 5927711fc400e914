"""The REQUESTS and EVENTS tables (spec/device.md 7.5, 9.2). Times are Unix milliseconds."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from fedcompute.device.developer.log_records import EventLogRecord, RequestLogRecord, Row
from fedcompute.device.owner import Owner
from fedcompute.device.state.database import Transaction

# Of one answer to a service, and of all requests or all events of one service, each counted as 1 KiB at least.
READ_BYTES_LIMIT = 16 << 20
STORED_BYTES_LIMIT = 32 << 20
_LEAST_BYTES = 1024

_ROWS = msgspec.msgpack.Decoder(list[dict[str, Any]])


class TooManyRecords(Exception):
    """More records than can be read at once; says how large they are."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes of records, {READ_BYTES_LIMIT} are read at once")


class StoredRequest(msgspec.Struct, frozen=True):
    """A RequestLogRecord as it travels to a service, its rows still encoded."""

    rows: msgspec.Raw
    time: datetime
    id: int


class StoredEvent(msgspec.Struct, frozen=True):
    """An EventLogRecord as it travels to a service, its data still encoded."""

    row_index: int
    type: int
    data: msgspec.Raw
    request_log_record: StoredRequest
    time: datetime


def write_records(
    tx: Transaction,
    owner: Owner,
    app_package: str,
    request: RequestLogRecord | None,
    events: Sequence[EventLogRecord],
    now: int,
) -> int:
    """Appends what an output holds; returns the request's id, 0 without one.

    Empty rows become one empty row. An event belongs to its own request record, which must be stored and the owner's,
    else to `request`; without either, or with a row that the record lacks, it is dropped. Beyond STORED_BYTES_LIMIT the
    owner's oldest records go.
    """
    request_id = 0
    if request is not None:
        rows = [dict(row) for row in request.rows] or [{}]
        request_id = _insert_request(tx, owner, app_package, rows, now)
    for event in events:
        parent = event.request_log_record.id if event.request_log_record is not None else request_id
        _insert_event(tx, owner, parent, event, now)
    _trim(tx, owner)
    return request_id


def write_event(tx: Transaction, owner: Owner, request_id: int, event: EventLogRecord, now: int) -> bool:
    """Appends one event to a stored request record, as `write_records`; False if there is no such record or row."""
    written = _insert_event(tx, owner, request_id, event, now)
    _trim(tx, owner)
    return written


def _insert_event(tx: Transaction, owner: Owner, request_id: int, event: EventLogRecord, now: int) -> bool:
    found = tx.execute(
        "SELECT row_count FROM request_log WHERE id = ? AND owner = ?", (request_id, owner.digest)
    ).fetchone()
    if found is None or event.row_index >= found[0]:
        return False
    data = msgspec.msgpack.encode(None if event.data is None else dict(event.data))
    tx.execute(
        "INSERT INTO event_log (request_id, owner, row_index, type, time, data) VALUES (?, ?, ?, ?, ?, ?)",
        (request_id, owner.digest, event.row_index, event.type, now, data),
    )
    return True


def has_event(tx: Transaction, owner: Owner, request_id: int, event: EventLogRecord) -> bool:
    """Whether an event of the same type is stored for the same row."""
    row = tx.execute(
        "SELECT 1 FROM event_log WHERE request_id = ? AND owner = ? AND row_index = ? AND type = ?",
        (request_id, owner.digest, event.row_index, event.type),
    ).fetchone()
    return row is not None


def read_request(tx: Transaction, owner: Owner, request_id: int) -> RequestLogRecord | None:
    """One request record of the owner, None without it."""
    row = tx.execute(
        "SELECT id, time, rows FROM request_log WHERE id = ? AND owner = ?", (request_id, owner.digest)
    ).fetchone()
    return None if row is None else _request(*row)


def read_requests(tx: Transaction, owner: Owner, start: int, end: int) -> list[StoredRequest]:
    """Request records with start < time < end, in the order of writing. Raises TooManyRecords."""
    condition, bounds = "owner = ? AND time > ? AND time < ?", (owner.digest, start, end)
    _check_size(tx, f"SELECT SUM(LENGTH(rows)) FROM request_log WHERE {condition}", bounds)
    rows = tx.execute(f"SELECT rows, time, id FROM request_log WHERE {condition} ORDER BY id", bounds)
    return [_stored(*row) for row in rows]


def read_joined_events(tx: Transaction, owner: Owner, start: int, end: int) -> list[StoredEvent]:
    """Event records with start < time < end, each with its request record, in the order of writing.

    Raises TooManyRecords.
    """
    tables = (
        "FROM event_log JOIN request_log ON request_log.id = event_log.request_id"
        " WHERE event_log.owner = ? AND event_log.time > ? AND event_log.time < ?"
    )
    bounds = (owner.digest, start, end)
    _check_size(tx, f"SELECT SUM(LENGTH(event_log.data) + LENGTH(request_log.rows)) {tables}", bounds)
    rows = tx.execute(
        "SELECT event_log.row_index, event_log.type, event_log.data, event_log.time,"
        f" request_log.rows, request_log.time, request_log.id {tables} ORDER BY event_log.id",
        bounds,
    )
    return [
        StoredEvent(index, kind, msgspec.Raw(data), _stored(*request), _datetime(time))
        for index, kind, data, time, *request in rows
    ]


def _insert_request(tx: Transaction, owner: Owner, app_package: str, rows: Sequence[Row], now: int) -> int:
    cursor = tx.execute(
        "INSERT INTO request_log (owner, app_package, time, row_count, rows) VALUES (?, ?, ?, ?, ?)",
        (owner.digest, app_package, now, len(rows), msgspec.msgpack.encode(rows)),
    )
    return int(cursor.lastrowid or 0)


def _request(request_id: int, time: int, rows: bytes) -> RequestLogRecord:
    return RequestLogRecord(_ROWS.decode(rows), _datetime(time), request_id)


def _check_size(tx: Transaction, query: str, bounds: tuple[str, int, int]) -> None:
    size = tx.execute(query, bounds).fetchone()[0] or 0
    if size > READ_BYTES_LIMIT:
        raise TooManyRecords(size)


def _trim(tx: Transaction, owner: Owner) -> None:
    for table, column in (("request_log", "rows"), ("event_log", "data")):
        size = f"MAX(LENGTH({column}), {_LEAST_BYTES})"
        stored = tx.execute(f"SELECT SUM({size}) FROM {table} WHERE owner = ?", (owner.digest,)).fetchone()[0] or 0
        if stored > STORED_BYTES_LIMIT:
            totals = f"SELECT id, SUM({size}) OVER (ORDER BY id DESC) AS total FROM {table} WHERE owner = ?"
            tx.execute(
                f"DELETE FROM {table} WHERE owner = ? AND id <= (SELECT MAX(id) FROM ({totals}) WHERE total > ?)",
                (owner.digest, owner.digest, STORED_BYTES_LIMIT),
            )


def _stored(rows: bytes, time: int, request_id: int) -> StoredRequest:
    return StoredRequest(msgspec.Raw(rows), _datetime(time), request_id)


def _datetime(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
