"""Who reaches what in which operation, and how much of it (spec/device.md 7.1, 7.4, 7.5)."""

from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.developer.log_records import EventLogRecord, RequestLogRecord
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.facilities import Facilities, NotAnswered, Outside
from fedcompute.device.isolation.frames import encode
from fedcompute.device.isolation.messages import HOOKS
from fedcompute.device.owner import Owner
from fedcompute.device.state import key_values, log_records
from fedcompute.device.state.apps import App
from fedcompute.device.state.database import DeviceDatabase

OWNER = Owner("com.example.app", "com.example.app.Service", "A" * 64)
OTHER = Owner("com.example.app", "com.example.app.Service", "B" * 64)
TIME = 1_700_000_000_123

QUESTIONS = {
    "remote data": ("remote_data.get", ["k"]),
    "keys of remote data": ("remote_data.key_set", []),
    "local data": ("local_data.get", ["k"]),
    "keys of local data": ("local_data.key_set", []),
    "put": ("local_data.put", ["new", b"value"]),
    "remove": ("local_data.remove", ["k"]),
    "requests": ("logs.requests", [0, TIME * 2]),
    "joined events": ("logs.joined_events", [0, TIME * 2]),
    "user data": ("user_data", []),
    "schedule": ("scheduler.schedule", ["population", True, 60_000]),
    "cancel": ("scheduler.cancel", ["population"]),
    "event URL": ("event_urls.create", [{"n": 1}, None, None, None]),
    "models": ("models.allowed", []),
    "download": ("downloaded_contents.get", ["d"]),
    "keys of the download": ("downloaded_contents.key_set", []),
}
# The table of spec 7.1: read, write or denied, one column for each operation.
TABLE = """
                 execute  download_completed  render  event  training_examples  web_trigger
remote_data      read     read                read    read   read               read
local_data       write    write               -       write  read               write
logs             read     read                -       read   read               read
user_data        read     read                -       read   read               read
scheduler        write    write               -       -      -                  -
event_urls       read     read                read    read   read               read
downloaded       -        read                -       -      -                  -
models           read     -                   -       -      -                  -
"""
FACILITIES = {
    "remote_data": ({"remote data", "keys of remote data"}, set()),
    "local_data": ({"local data", "keys of local data"}, {"put", "remove"}),
    "logs": ({"requests", "joined events"}, set()),
    "user_data": ({"user data"}, set()),
    "scheduler": (set(), {"schedule", "cancel"}),
    "event_urls": ({"event URL"}, set()),
    "downloaded": ({"download", "keys of the download"}, set()),
    "models": ({"models"}, set()),
}


def cells():
    header, *rows = (line.split() for line in TABLE.strip().splitlines())
    for facility, *rights in rows:
        reading, writing = FACILITIES[facility]
        for operation, right in zip(header, rights, strict=True):
            for question in sorted(reading | writing):
                yield operation, question, right == "write" or (right == "read" and question in reading)


class Device:
    """A database with a row of everything for two owners, and what was scheduled."""

    def __init__(self) -> None:
        self.database = DeviceDatabase()
        self.scheduled = []
        self.outside = Outside(
            database=self.database,
            user_data=lambda app: UserData(battery_percentage=60),
            schedule=lambda app, *what: self.scheduled.append(what),
            cancel=lambda app, population: self.scheduled.append(population),
            event_url=lambda app, *what: f"odp://localhost?e={app.owner.id}",
            writes_local=True,
            local_bytes_limit=10_000,
        )
        with self.database.write() as tx:
            for owner in (OTHER, OWNER):
                mark = owner.certificate_digest[:1].encode()
                key_values.put_value(tx, "remote_data", owner, "k", b"remote " + mark)
                key_values.put_value(tx, "local_data", owner, "k", b"local " + mark)
                record = RequestLogRecord([{"owner": mark}])
                log_records.write_records(tx, owner, "com.example.caller", record, [EventLogRecord(0, 3)], TIME)

    def ask(self, question, operation="execute", **changes):
        method, arguments = QUESTIONS[question] if isinstance(question, str) else question
        outside = replace(self.outside, **changes)
        facilities = Facilities(outside, App(OWNER, None), operation, {"d": b"downloaded"})
        return facilities(method, encode(arguments))

    def value(self, question, kind=None, **more):
        answer = self.ask(question, **more)
        assert answer.status is Status.SUCCESS, answer
        return msgspec.msgpack.decode(answer.value) if kind is None else msgspec.msgpack.decode(answer.value, type=kind)


@pytest.fixture
def device():
    device = Device()
    yield device
    device.database.close()


def test_the_table_has_every_operation_and_every_question():
    assert {operation for operation, _, _ in cells()} == HOOKS.keys()
    assert {question for _, question, _ in cells()} == QUESTIONS.keys()


@pytest.mark.parametrize(("operation", "question", "granted"), list(cells()))
def test_an_operation_reaches_what_the_table_grants_and_nothing_else(device, operation, question, granted):
    answer = device.ask(question, operation)
    if granted:
        assert answer.status is Status.SUCCESS
    else:
        reads_only = operation == "training_examples" and question in ("put", "remove")
        assert answer.status is (Status.LOCAL_DATA_READ_ONLY if reads_only else Status.PERMISSION_DENIED)
        assert msgspec.msgpack.decode(answer.value) is None
        assert operation in answer.detail
        assert device.scheduled == []
    with device.database.read() as tx:
        assert (key_values.get_value(tx, "local_data", OWNER, "new") is not None) == (granted and question == "put")
        assert (key_values.get_value(tx, "local_data", OWNER, "k") is None) == (granted and question == "remove")


def test_answers_are_the_owners_own(device):
    assert device.value("remote data") == b"remote A"
    assert device.value("local data") == b"local A"
    assert device.value("keys of local data") == ["k"]
    assert device.value("user data", UserData) == UserData(battery_percentage=60)
    assert device.value("download", operation="download_completed") == b"downloaded"
    assert device.value("keys of the download", operation="download_completed") == ["d"]
    (record,) = device.value("requests", list[RequestLogRecord])
    assert record == RequestLogRecord([{"owner": b"A"}], datetime.fromtimestamp(TIME / 1000, UTC), 2)
    (event,) = device.value("joined events", list[EventLogRecord])
    assert event == EventLogRecord(0, 3, None, record, record.time)


def test_writing_tells_what_was_there_before(device):
    assert device.value(("local_data.put", ["k", b"2"])) == b"local A"
    assert device.value(("local_data.put", ["l", b""])) is None
    assert device.value(("local_data.remove", ["l"])) == b""
    assert device.value(("local_data.remove", ["l"])) is None
    with device.database.read() as tx:
        assert key_values.get_value(tx, "local_data", OTHER, "k") == b"local B"


@pytest.mark.parametrize("question", ["put", "remove"])
def test_without_consent_local_data_is_read_only(device, question):
    assert device.ask(question, writes_local=False).status is Status.LOCAL_DATA_READ_ONLY
    assert device.value("local data", writes_local=False) == b"local A"


def test_a_value_in_place_of_another_needs_only_the_difference(device):
    size = 10_000 - 300 - len("k")
    assert device.ask(("local_data.put", ["k", bytes(size)])).status is Status.SUCCESS
    assert device.ask(("local_data.put", ["k", bytes(size)])).status is Status.SUCCESS
    refused = device.ask(("local_data.put", ["k", bytes(size + 1)]))
    assert (refused.status, refused.detail) == (Status.LOCAL_WRITE, "local data would exceed 10000 bytes")
    assert len(device.value("local data")) == size


def test_rows_count_also_if_there_is_nothing_in_them(device):
    answers = [device.ask(("local_data.put", [str(number), b""])).status for number in range(50)]
    assert answers.count(Status.SUCCESS) == 32  # of at least 301 bytes each, beside the one of 308
    assert answers[-1] is Status.LOCAL_WRITE


def test_a_refused_write_leaves_what_was_there(device):
    assert device.ask(("local_data.put", ["k", bytes(20_000)])).status is Status.LOCAL_WRITE
    assert device.value("local data") == b"local A"


@pytest.mark.parametrize(
    ("question", "status"),
    [
        (("local_data.put", ["", b"x"]), Status.LOCAL_WRITE),
        (("local_data.put", ["é" * 2049, b"x"]), Status.LOCAL_WRITE),
        (("local_data.get", ["k" * 70_000]), Status.INTERNAL),
        (("local_data.get", [b"k"]), Status.INTERNAL),
        (("local_data.get", []), Status.INTERNAL),
        (("logs.requests", [-1, 5]), Status.TIMESTAMPS_INVALID),
        (("logs.requests", [5, 5]), Status.TIMESTAMPS_INVALID),
        (("logs.joined_events", [6, 5]), Status.TIMESTAMPS_INVALID),
        (("logs.joined_events", [0, 2**64 - 1]), Status.TIMESTAMPS_INVALID),
        (("scheduler.schedule", ["p", True, -1]), Status.INTERNAL),
        (("scheduler.schedule", ["p", True, 2**63]), Status.INTERNAL),
        (("scheduler.schedule", ["", True, 1]), Status.INTERNAL),
        (("scheduler.schedule", ["p", 1, 1]), Status.INTERNAL),
        (("event_urls.create", [{"a": [1]}, None, None, None]), Status.INTERNAL),
        (("event_urls.create", [{"a": 2**63}, None, None, None]), Status.INTERNAL),
        (("event_urls.create", [{}, bytes(300_000), None, None]), Status.INTERNAL),
        (("remote_data.put", ["k", b"x"]), Status.PERMISSION_DENIED),
        (("remote_data", []), Status.PERMISSION_DENIED),
        (("", []), Status.PERMISSION_DENIED),
        (("__class__", []), Status.PERMISSION_DENIED),
    ],
)
def test_a_question_that_breaks_a_rule_is_refused(device, question, status):
    answer = device.ask(question)
    assert answer.status is status
    assert 0 < len(answer.detail) < 300
    assert device.scheduled == []


@pytest.mark.parametrize("name", ["a/b", "../x", "a?b", "a#b", "a%41", "a\nb", "a\0", " a", "a ", "p" * 256, "\u202ea"])
def test_a_population_that_no_url_can_hold_is_not_scheduled(device, name):
    assert device.ask(("scheduler.schedule", [name, False, 0])).status is Status.INTERNAL
    assert device.scheduled == []


@pytest.mark.parametrize("name", ["a", "keras_mnist", "my population", "größe", "p" * 255])
def test_other_populations_are(device, name):
    device.value(("scheduler.schedule", [name, False, 0]))
    assert device.scheduled == [(name, False, 0)]


def test_what_the_device_refuses_comes_back_with_its_status(device):
    def schedule(*_):
        raise NotAnswered(Status.FEDERATED_COMPUTE_MANIFEST_INVALID, "the manifest names no server")

    answer = device.ask("schedule", schedule=schedule)
    assert (answer.status, answer.detail) == (110, "the manifest names no server")


def test_more_logs_than_an_answer_holds_are_asked_for_bit_by_bit(device):
    with device.database.write() as tx:
        record = RequestLogRecord([{"a": bytes(9 << 20)}])
        for number in (1, 2):
            log_records.write_records(tx, OWNER, "a", record, [EventLogRecord()], TIME + number)
    for question in ("requests", "joined events"):
        answer = device.ask(question)
        assert answer.status is Status.DATA_ACCESS
        assert answer.detail.endswith("16777216 are read at once; ask for a shorter time")
    assert len(device.value(("logs.requests", [TIME, TIME + 2]))) == 1
    assert len(device.value(("logs.joined_events", [TIME + 1, TIME + 3]))) == 1
