"""What a worker reaches beside its input, and in which operation (spec/device.md 7.1, "Facilities per operation")."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.log_records import check_columns
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.isolation.frames import UNDECODABLE, encode
from fedcompute.device.isolation.messages import WORKER_MESSAGE_BYTES, Answer
from fedcompute.device.owner import Owner
from fedcompute.device.state import key_values, log_records
from fedcompute.device.state.apps import App
from fedcompute.device.state.database import DeviceDatabase, Transaction
from fedcompute.device.state.tasks import is_population

_READ = {
    "remote_data": {"execute", "download_completed", "render", "event", "training_examples", "web_trigger"},
    "local_data": {"execute", "download_completed", "event", "training_examples", "web_trigger"},
    "logs": {"execute", "download_completed", "event", "training_examples", "web_trigger"},
    "user_data": {"execute", "download_completed", "event", "training_examples", "web_trigger"},
    "scheduler": {"execute", "download_completed"},
    "event_urls": {"execute", "download_completed", "render", "event", "training_examples", "web_trigger"},
    "downloaded_contents": {"download_completed"},
    "models": {"execute"},
}
"""Facility -> operations that have it."""
_WRITE_LOCAL = {"execute", "download_completed", "event", "web_trigger"}
_ARGUMENTS_BYTES = 64 * 1024
# Sealed, or quoted as a destination, they make a URL that `open_event_url` still takes.
_URL_ARGUMENTS_BYTES = 256 * 1024
_KEY_BYTES = 4096
_DETAIL_CHARACTERS = 200
# Beyond it a time or an interval means nothing, and SQLite takes no more than 64 bits.
_MAX_MILLISECONDS = 1 << 53


class NotAnswered(Exception):
    """Why a facility says nothing."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True)
class Outside:
    """What facilities need of the device around them; all of it is called in threads.

    `schedule(app, population, recurrent, minimum interval in ms)` and `cancel(app, population)` raise NotAnswered;
    `event_url(app, parameters, response data, mime type, destination)` makes a URL. `writes_local`:
    whether consent allows it. `local_bytes_limit`: that a service may store.
    """

    database: DeviceDatabase
    user_data: Callable[[App], UserData]
    schedule: Callable[[App, str, bool, int], None]
    cancel: Callable[[App, str], None]
    event_url: Callable[[App, Mapping[str, Any], bytes | None, str | None, str | None], str]
    writes_local: bool
    local_bytes_limit: int


@dataclass(frozen=True)
class Facilities:
    """The facilities of one operation of one app; `downloaded`: what a download brought.

    Formal guarantees: an answer holds nothing of another owner, and nothing that the operation lacks by the table
    above; what is asked, how, and how often changes nothing but the owner's own local data and tasks. Decoding a
    question takes at most 75 times its bytes, of which there are 256 KiB unless it stores a value.
    """

    outside: Outside
    app: App
    operation: str
    downloaded: Mapping[str, bytes] | None = None

    def __call__(self, method: str, arguments: bytes | memoryview) -> Answer:
        """Answers a worker's question, whatever it is; an unknown one is refused.

        Raises OperationFailed (STORAGE_FAILED) where the device's file cannot be read or written.
        """
        found, name = _METHODS.get(method), method[:_DETAIL_CHARACTERS]
        try:
            if found is None or self.operation not in _READ[method.partition(".")[0]]:
                raise NotAnswered(Status.PERMISSION_DENIED, f"{self.operation} has no {name}")
            if len(arguments) > found.bytes_limit:
                detail = f"{name}: {len(arguments)} bytes, {found.bytes_limit} are the limit"
                raise NotAnswered(Status.INTERNAL, detail)
            value = found.answer(self, *msgspec.msgpack.decode(arguments, type=found.arguments))
            return Answer(msgspec.Raw(encode(value)))
        except NotAnswered as why:
            return Answer(status=why.status, detail=str(why))
        except UNDECODABLE as error:
            return Answer(status=Status.INTERNAL, detail=f"{name}: {error}")

    def _get(self, table: key_values.Table, key: str) -> bytes | None:
        with self.outside.database.read() as tx:
            return key_values.get_value(tx, table, self.app.owner, key)

    def _key_set(self, table: key_values.Table) -> list[str]:
        with self.outside.database.read() as tx:
            return key_values.key_set(tx, table, self.app.owner)

    def _put(self, key: str, value: bytes) -> bytes | None:
        self._check_writable()
        if not 0 < len(key.encode()) <= _KEY_BYTES:
            raise NotAnswered(Status.LOCAL_WRITE, f"a key of {len(key.encode())} bytes, not 1 to {_KEY_BYTES}")
        limit = self.outside.local_bytes_limit
        with self.outside.database.write() as tx:
            before = key_values.put_value(tx, "local_data", self.app.owner, key, value)
            if key_values.stored_bytes(tx, "local_data", self.app.owner) > limit:
                raise NotAnswered(Status.LOCAL_WRITE, f"local data would exceed {limit} bytes")
        return before

    def _remove(self, key: str) -> bytes | None:
        self._check_writable()
        with self.outside.database.write() as tx:
            return key_values.remove_value(tx, "local_data", self.app.owner, key)

    def _check_writable(self) -> None:
        if self.operation not in _WRITE_LOCAL or not self.outside.writes_local:
            raise NotAnswered(Status.LOCAL_DATA_READ_ONLY, f"{self.operation} may only read local data")

    def _logs(self, read: Callable[[Transaction, Owner, int, int], Any], start: int, end: int) -> Any:
        if not 0 <= start < end <= _MAX_MILLISECONDS:
            raise NotAnswered(Status.TIMESTAMPS_INVALID, "the end must lie after the start, the start not before 1970")
        try:
            with self.outside.database.read() as tx:
                return read(tx, self.app.owner, start, end)
        except log_records.TooManyRecords as error:
            raise NotAnswered(Status.DATA_ACCESS, f"{error}; ask for a shorter time") from None

    def _schedule(self, population: str, recurrent: bool, interval: int) -> None:
        if not is_population(population):
            raise NotAnswered(Status.INTERNAL, f"{population[:80]!r} is no name of a population")
        if not 0 <= interval <= _MAX_MILLISECONDS:
            raise NotAnswered(Status.INTERNAL, f"an interval of {interval} ms")
        self.outside.schedule(self.app, population, recurrent, interval)

    def _event_url(
        self, parameters: dict[str, Any], data: bytes | None, mime_type: str | None, destination: str | None
    ) -> str:
        try:
            check_columns(parameters)
        except (TypeError, ValueError) as error:
            raise NotAnswered(Status.INTERNAL, str(error)) from None
        return self.outside.event_url(self.app, parameters, data, mime_type, destination)


@dataclass(frozen=True)
class _Method:
    """The types of a question's arguments, who answers, and how many bytes the arguments may have."""

    arguments: Any
    answer: Callable[..., Any]
    bytes_limit: int = _ARGUMENTS_BYTES


_METHODS = {
    "remote_data.get": _Method(tuple[str], lambda own, key: own._get("remote_data", key)),
    "remote_data.key_set": _Method(tuple[()], lambda own: own._key_set("remote_data")),
    "local_data.get": _Method(tuple[str], lambda own, key: own._get("local_data", key)),
    "local_data.key_set": _Method(tuple[()], lambda own: own._key_set("local_data")),
    "local_data.put": _Method(tuple[str, bytes], Facilities._put, WORKER_MESSAGE_BYTES),
    "local_data.remove": _Method(tuple[str], Facilities._remove),
    "downloaded_contents.get": _Method(tuple[str], lambda own, key: (own.downloaded or {}).get(key)),
    "downloaded_contents.key_set": _Method(tuple[()], lambda own: sorted(own.downloaded or {})),
    "logs.requests": _Method(tuple[int, int], lambda own, start, end: own._logs(log_records.read_requests, start, end)),
    "logs.joined_events": _Method(
        tuple[int, int], lambda own, start, end: own._logs(log_records.read_joined_events, start, end)
    ),
    "user_data": _Method(tuple[()], lambda own: own.outside.user_data(own.app)),
    "scheduler.schedule": _Method(tuple[str, bool, int], Facilities._schedule),
    "scheduler.cancel": _Method(tuple[str], lambda own, population: own.outside.cancel(own.app, population)),
    "models.allowed": _Method(tuple[()], lambda own: None),
    "event_urls.create": _Method(
        tuple[dict[str, Any], bytes | None, str | None, str | None], Facilities._event_url, _URL_ARGUMENTS_BYTES
    ),
}
