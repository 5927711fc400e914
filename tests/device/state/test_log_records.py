"""The tables of requests and events (spec/device.md 7.5)."""

from datetime import UTC, datetime

import msgspec
import pytest

from fedcompute.device.developer.log_records import EventLogRecord, RequestLogRecord
from fedcompute.device.isolation.frames import encode
from fedcompute.device.owner import Owner
from fedcompute.device.state import log_records
from fedcompute.device.state.database import DeviceDatabase
from fedcompute.device.state.log_records import TooManyRecords, has_event, read_request, write_event, write_records

OWNER = Owner("com.example.app", "com.example.app.Service", "A" * 64)
OTHER = Owner("com.example.app", "com.example.app.Service", "B" * 64)
TIME = 1_700_000_000_123


@pytest.fixture
def tx():
    database = DeviceDatabase()
    with database.write() as tx:
        yield tx
    database.close()


def write(tx, request, events=(), *, owner=OWNER, time=TIME):
    return write_records(tx, owner, "com.example.caller", request, events, time)


def requests(tx, start=0, end=TIME * 2, owner=OWNER):
    """As they reach the service."""
    return msgspec.msgpack.decode(encode(log_records.read_requests(tx, owner, start, end)), type=list[RequestLogRecord])


def events(tx, start=0, end=TIME * 2, owner=OWNER):
    return msgspec.msgpack.decode(
        encode(log_records.read_joined_events(tx, owner, start, end)), type=list[EventLogRecord]
    )


def moment(milliseconds=TIME):
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def test_records_come_back_with_their_time_and_id(tx):
    row = {"n": 2**63 - 1, "x": 0.1, "s": "é", "b": b"\xff", "yes": True, "none": None}
    assert write(tx, RequestLogRecord([row, {}], moment(5), 77)) == 1
    assert write(tx, RequestLogRecord([{}])) == 2
    assert requests(tx) == [RequestLogRecord([row, {}], moment(), 1), RequestLogRecord([{}], moment(), 2)]
    assert read_request(tx, OWNER, 1) == RequestLogRecord([row, {}], moment(), 1)
    assert read_request(tx, OTHER, 1) is None
    assert read_request(tx, OWNER, 3) is None


def test_no_record_is_nothing_and_no_rows_are_one_empty_row(tx):
    assert write(tx, None) == 0
    assert requests(tx) == []
    write(tx, RequestLogRecord())
    assert requests(tx)[0].rows == [{}]


def test_bounds_are_exclusive_at_both_ends(tx):
    for time in (TIME - 1, TIME, TIME + 1):
        write(tx, RequestLogRecord(), [EventLogRecord()], time=time)
    for read in (requests, events):
        assert [record.time for record in read(tx, TIME - 1, TIME + 1)] == [moment()]
        assert len(read(tx, TIME - 2, TIME + 2)) == 3
        assert read(tx, TIME, TIME + 1) == []


def test_events_belong_to_the_request_of_the_same_output_and_keep_their_row(tx):
    record = RequestLogRecord([{"row": 0}, {"row": 1}])
    write(tx, record, [EventLogRecord(1, 127, {"a": 1}), EventLogRecord(0, 1)])
    parent = RequestLogRecord(record.rows, moment(), 1)
    assert events(tx) == [
        EventLogRecord(1, 127, {"a": 1}, parent, moment()),
        EventLogRecord(0, 1, None, parent, moment()),
    ]


def test_an_event_may_belong_to_a_request_that_was_read_back(tx):
    write(tx, RequestLogRecord([{"first": 1}]))
    (read_back,) = requests(tx)
    later = EventLogRecord(0, 2, None, read_back)
    write(tx, RequestLogRecord([{"second": 2}]), [later], time=TIME + 5)
    write(tx, None, [later], time=TIME + 6)
    assert [(event.request_log_record.id, event.time) for event in events(tx)] == [
        (1, moment(TIME + 5)),
        (1, moment(TIME + 6)),
    ]


def test_events_without_a_parent_or_a_row_are_dropped(tx):
    write(tx, None, [EventLogRecord()])
    write(tx, RequestLogRecord([{}, {}]), [EventLogRecord(2), EventLogRecord(2**62)])
    write(tx, RequestLogRecord([{}]), [EventLogRecord(0, 1, None, RequestLogRecord([{}], None, 99))])
    write(tx, RequestLogRecord([{}]), [EventLogRecord(0, 1, None, RequestLogRecord([{}]))])
    # As long as it says, not as it is.
    write(tx, None, [EventLogRecord(1, 1, None, RequestLogRecord([{}, {}], None, 3))])
    assert events(tx) == []


def test_no_event_belongs_to_anothers_request(tx):
    foreign = write(tx, RequestLogRecord([{}]), owner=OTHER)
    write(tx, None, [EventLogRecord(0, 1, None, RequestLogRecord([{}], None, foreign))])
    assert not write_event(tx, OWNER, foreign, EventLogRecord(), TIME)
    assert events(tx) == events(tx, owner=OTHER) == []
    assert requests(tx) == []


def test_an_event_of_the_same_type_and_row_is_known(tx):
    request = write(tx, RequestLogRecord([{}, {}]))
    assert write_event(tx, OWNER, request, EventLogRecord(1, 5), TIME)
    assert has_event(tx, OWNER, request, EventLogRecord(1, 5, {"other": "data"}))
    assert not has_event(tx, OWNER, request, EventLogRecord(0, 5))
    assert not has_event(tx, OWNER, request, EventLogRecord(1, 6))
    assert not has_event(tx, OTHER, request, EventLogRecord(1, 5))


def test_records_come_in_the_order_of_writing_whatever_the_clock_did(tx):
    for time in (TIME + 9, TIME, TIME + 5):
        write(tx, RequestLogRecord([{"t": time}]), [EventLogRecord()], time=time)
    assert [record.rows[0]["t"] - TIME for record in requests(tx)] == [9, 0, 5]
    assert [event.time for event in events(tx)] == [moment(TIME + 9), moment(TIME), moment(TIME + 5)]


def test_more_than_can_be_read_at_once_is_refused_with_its_size(tx, monkeypatch):
    monkeypatch.setattr(log_records, "READ_BYTES_LIMIT", 1000)
    write(tx, RequestLogRecord([{"a": bytes(900)}]), [EventLogRecord()])
    assert len(requests(tx)) == len(events(tx)) == 1
    write_event(tx, OWNER, 1, EventLogRecord(), TIME)
    with pytest.raises(TooManyRecords, match=r"18\d\d bytes of records, 1000 are read at once"):
        events(tx)
    write(tx, RequestLogRecord([{"a": bytes(900)}]))
    with pytest.raises(TooManyRecords, match=r"18\d\d bytes of records, 1000 are read at once"):
        requests(tx)
    write(tx, RequestLogRecord([{"a": bytes(2000)}]), owner=OTHER)
    assert len(requests(tx, TIME - 1, TIME, OWNER)) == 0


def test_beyond_what_may_be_stored_the_owners_oldest_records_go_with_their_events(tx, monkeypatch):
    monkeypatch.setattr(log_records, "STORED_BYTES_LIMIT", 10 * 1024)
    kept = write(tx, RequestLogRecord([{"other": 1}]), [EventLogRecord()], owner=OTHER)
    for number in range(12):
        write(tx, RequestLogRecord([{"n": number}]), [EventLogRecord(data={"n": number})])
    assert [record.rows[0]["n"] for record in requests(tx)] == list(range(2, 12))
    assert [event.data["n"] for event in events(tx)] == list(range(2, 12))
    write(tx, RequestLogRecord([{"n": 12, "large": bytes(5000)}]))
    assert [record.rows[0]["n"] for record in requests(tx)] == list(range(7, 13))
    for number in range(20):
        write_event(tx, OWNER, 13, EventLogRecord(data={"n": number}), TIME)
    assert [event.data["n"] for event in events(tx)] == list(range(10, 20))
    assert read_request(tx, OTHER, kept) is not None
    assert len(events(tx, owner=OTHER)) == 1
