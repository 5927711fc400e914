"""Jobs and results on their way to other machines."""

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedcompute.crypto.keys import PublicKey
from fedcompute.errors import OperationFailed, Reason
from fedcompute.privacy.ledger import GaussianEvent, TreeEvent
from fedcompute.privacy.noise import Draw
from fedcompute.protos import task_builder_pb2
from fedcompute.server.executors import Failure
from fedcompute.server.job_data import decode_data, encode_data, name_of, named
from fedcompute.server.rounds.aggregate import AggregateJob, AggregateResult, Rejected, aggregate
from fedcompute.server.rounds.jobs import Sizes
from fedcompute.server.rounds.spending import Overspent, Prospect
from fedcompute.server.rounds.update import Preparation
from fedcompute.server.security.key_service import Coordinator, KeyService
from fedcompute.storage.releases import Standing
from fedcompute.tracing import Finished, Origin, Told

SERVICE = KeyService(Coordinator("https://a", "file:t"), Coordinator("https://b"), "https://c")
JOB = AggregateJob(
    "s3://b", "plan", "told", (("s", "p"), ("t", "q")), "out", 1, 2, False, {"k": b"\0private"}, SERVICE, True,
    PublicKey("k", b"\1" * 32),
)  # fmt: skip
STANDING = Standing(3, None)
PROSPECT = Prospect(STANDING, 8, (GaussianEvent(0.5), TreeEvent(1.0, 2)), float("inf"), Overspent(2.0, STANDING), None)


@pytest.mark.parametrize(
    "value",
    [
        None, True, -(1 << 63), 1 << 90, 1.5, "text", b"bytes", [1, [2]], (1, (2,)), {1: {"a": (b"x",)}},
        {("a", 1): [None]}, datetime(2026, 1, 2, tzinfo=UTC), timedelta(3, 4, 5), Path("/a/b"), Reason.NOT_FINITE,
        JOB, AggregateResult(2, (Rejected("s", Reason.UNKNOWN_KEY, "none"),)), PROSPECT, Sizes(1, 2, 3, 4),
        Told(Failure(Reason.INTERNAL, "no"), Origin({}, {"a": 1}), (Finished("x", 1, 2, {"b": 0.5}),)),
        task_builder_pb2.TaskReport(warnings=["careful"]), np.float32(0.1), Preparation(PROSPECT, ()),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_travels_arrives_as_it_was(value):
    found = decode_data(encode_data(value))
    assert type(found) is type(value)
    assert found == value


@pytest.mark.parametrize("array", [np.arange(6, dtype="<i8").reshape(2, 3).T, np.array(2.5), np.zeros((0, 3), "?")])
def test_arrays_keep_shape_and_type_and_may_be_written_to(array):
    found = decode_data(encode_data(Draw(1.0, array))).values
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype
    found[...] = 1


def test_a_function_is_found_by_its_name_and_only_where_there_is_one():
    assert named(name_of(aggregate)) is aggregate
    for job in (lambda _: None, partial(aggregate), JOB.__repr__):
        with pytest.raises(OperationFailed, match="function of a module"):
            name_of(job)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), msgspec.UNSET])
def test_what_is_no_plain_data_does_not_leave(value):
    with pytest.raises(OperationFailed, match="does not travel"):
        encode_data([value])


@pytest.mark.parametrize(
    "flat",
    [
        [9, "os:_Environ", 1], [9, "subprocess:Popen", ["sh"]], [9, "fedcompute.server.job_data:named", "os:system"],
        [10, "fedcompute.errors:Reason", "no such"], [11, "fedcompute.errors:Reason", b""], [99], [],
        [4, "O", [1], b""], [9, "fedcompute.errors:Entry", 1, 2, 3, 4, 5],
    ],
)  # fmt: skip
def test_nothing_but_our_own_plain_classes_is_made_of_what_arrives(flat):
    with pytest.raises(OperationFailed, match="no job and no result"):
        decode_data(msgspec.msgpack.encode(flat))


def test_bytes_that_are_cut_off_are_an_error_and_no_value():
    data = encode_data(JOB)
    with pytest.raises(OperationFailed, match="no job and no result"):
        decode_data(data[:-1])
