"""Tables as files: gzip, one JSON array per row, the same from and for every kind of database.

The first line names the columns. Times are ISO 8601 in UTC, bytes base64; everything else is what JSON makes of it.
"""

import base64
import binascii
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Column, LargeBinary, Table, insert, select

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.storage.database import Transaction
from fedcompute.storage.schema import UtcDateTime

_ROWS = 1000
# An evaluation's or a training's description is some kilobytes; a claim less.
_LINE_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True)
class TableFile:
    """What is known of a written table: rows, and the SHA-256 of the file."""

    rows: int
    sha256: str


def write_table(tx: Transaction, table: Table, path: Path) -> TableFile:
    """Writes all rows of a table in the order of its key; `tx` says of which moment."""
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_ROWS)
    columns = list(table.columns)
    rows = 0
    # Without a time in it, so that the same rows give the same file.
    with path.open("xb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        file.write(_line([column.name for column in columns]))
        for row in tx.execute(query):
            file.write(_line([_plain(value) for value in row]))
            rows += 1
    return TableFile(rows, sha256_of(path))


def read_table(tx: Transaction, table: Table, path: Path) -> int:
    """Inserts what `write_table` wrote into an empty table; returns the number of rows.

    Raises ArtifactInvalid(BACKUP_DAMAGED) for a file that is not of this table.
    """
    columns = list(table.columns)
    lines = _lines(path)
    try:
        if next(lines, None) != [column.name for column in columns]:
            raise _damaged(path, "its columns are not those of this release")
        rows, chunk = 0, []
        for values in lines:
            if len(values) != len(columns):
                raise _damaged(path, f"row {rows + 1} has {len(values)} values, not {len(columns)}")
            chunk.append({one.name: _stored(one, value) for one, value in zip(columns, values, strict=True)})
            rows += 1
            if len(chunk) == _ROWS:
                tx.execute(insert(table), chunk)
                chunk = []
        if chunk:
            tx.execute(insert(table), chunk)
    except (OSError, EOFError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, type(error).__name__) from error
    return rows


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(values: list[Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _lines(path: Path) -> Iterator[list[Any]]:
    with gzip.open(path, "rb") as file:
        while line := file.readline(_LINE_LIMIT):
            values = json.loads(line)
            if not isinstance(values, list):
                raise _damaged(path, "a line is not an array")
            yield values


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes | memoryview):
        return base64.b64encode(value).decode()
    return value


def _stored(column: "Column[Any]", value: Any) -> Any:
    if value is None:
        return None
    if isinstance(column.type, UtcDateTime):
        return datetime.fromisoformat(value)
    if isinstance(column.type, LargeBinary):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ValueError("no base64") from error
    return value


def _damaged(path: Path, why: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.BACKUP_DAMAGED, f"{path.name} of the backup cannot be read: {why}")
