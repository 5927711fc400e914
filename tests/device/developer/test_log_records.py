"""Records of requests and events, and their reader, as a service sees them (spec/device.md 7.5)."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from fedcompute.device.developer.connection import Refused
from fedcompute.device.developer.errors import IllegalState, Status
from fedcompute.device.developer.log_records import EventLogRecord, LogReader, RequestLogRecord, check_columns

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize("value", [None, True, 0, -(2**63), 2**63 - 1, 0.5, float("nan"), "", "é", b"", b"\xff"])
def test_a_column_holds_plain_values(value):
    check_columns({"a": value})
    assert RequestLogRecord([{"a": value}]).rows[0]["a"] is value
    assert EventLogRecord(data={"a": value}).data["a"] is value


@pytest.mark.parametrize(
    "value",
    [[1], (1,), {"b": 1}, {1}, object(), 1j, NOON, bytearray(b"x"), type],
    ids=lambda value: type(value).__name__,
)
def test_a_column_holds_nothing_else(value):
    for make in (lambda row: RequestLogRecord([{}, row]), lambda row: EventLogRecord(data=row)):
        with pytest.raises(TypeError, match=f"column 'odd' holds {type(value).__name__}"):
            make({"fine": 1, "odd": value})


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**100])
def test_an_integer_has_64_bits(value):
    with pytest.raises(ValueError, match="column 'n' holds an integer of more than 64 bits"):
        RequestLogRecord([{"n": value}])


def test_a_column_has_a_name_of_text():
    with pytest.raises(TypeError, match="column 1 holds"):
        RequestLogRecord([{1: "a"}])


@pytest.mark.parametrize("type_", [0, -1, 128, 1000])
def test_the_type_of_an_event_is_1_to_127(type_):
    with pytest.raises(ValueError, match=f"type is {type_}, not 1 to 127"):
        EventLogRecord(type=type_)
    assert [EventLogRecord(type=one).type for one in (1, 127)] == [1, 127]


def test_a_row_index_is_not_negative():
    with pytest.raises(ValueError, match="row_index is -1, not at least 0"):
        EventLogRecord(-1)


def test_defaults_are_androids():
    event = EventLogRecord()
    assert (event.row_index, event.type, event.data, event.request_log_record, event.time) == (0, 1, None, None, None)
    assert (RequestLogRecord().rows, RequestLogRecord().time) == ((), None)


@pytest.mark.parametrize("record_id", [-1, 2**63, 2**64 - 1])
def test_a_record_has_an_id_that_the_device_can_have_given(record_id):
    with pytest.raises(ValueError, match="which the device never gave"):
        RequestLogRecord(id=record_id)


def reader(questions, answer=()):
    def ask(*question):
        questions.append(question)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return LogReader(ask)


def test_bounds_travel_as_milliseconds_of_1970():
    questions = []
    logs = reader(questions)
    logs.get_requests(datetime.fromtimestamp(0, UTC), NOON)
    tokyo = timezone(timedelta(hours=9))
    logs.get_joined_events(NOON.astimezone(tokyo) - timedelta(milliseconds=1), NOON)
    noon = int(NOON.timestamp()) * 1000
    assert questions == [
        ("logs.requests", (0, noon), list[RequestLogRecord]),
        ("logs.joined_events", (noon - 1, noon), list[EventLogRecord]),
    ]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (NOON, NOON),
        (NOON, NOON - timedelta(seconds=1)),
        (NOON, NOON + timedelta(microseconds=1)),
        (datetime(1969, 12, 31, tzinfo=UTC), NOON),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=23))), NOON),
        (NOON, datetime.max.replace(tzinfo=timezone(-timedelta(hours=23)))),
    ],
)
def test_bounds_that_are_none_are_refused_before_anybody_is_asked(start, end):
    questions = []
    for read in (reader(questions).get_requests, reader(questions).get_joined_events):
        with pytest.raises(ValueError, match="the end must lie after the start, the start not before 1970"):
            read(start, end)
    assert questions == []


def test_a_refusal_is_an_illegal_state():
    logs = reader([], Refused(Status.PERMISSION_DENIED, "render has no logs.requests"))
    for read in (logs.get_requests, logs.get_joined_events):
        with pytest.raises(IllegalState, match=r"render has no logs\.requests"):
            read(NOON - timedelta(1), NOON)
