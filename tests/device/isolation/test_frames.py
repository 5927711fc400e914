"""Frames over real sockets, whole, cut and hostile."""

import asyncio
import socket
import struct
import threading
from contextlib import asynccontextmanager, closing
from enum import IntEnum

import msgspec
import numpy as np
import pytest

from fedcompute.device.isolation.frames import (
    UNDECODABLE,
    ChildEnd,
    FrameTooLarge,
    encode,
    frame,
    read_frame,
    write_frame,
)

MEBIBYTE = 1 << 20


@asynccontextmanager
async def connected():
    """Reader and writer of this side, and the plain socket of the other."""
    mine, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=mine)
    try:
        yield reader, writer, theirs
    finally:
        writer.close()
        theirs.close()


def read(data: bytes, limit: int = 100) -> bytes:
    """The first frame of what the other side sends before it lets go."""

    async def scenario():
        async with connected() as (reader, _, theirs):
            theirs.sendall(data)
            theirs.close()
            return await read_frame(reader, limit)

    return asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 1, 4, 65_535, 262_144, 262_145, 5 * MEBIBYTE])
def test_what_one_side_sends_the_other_gets_whatever_its_size(size):
    async def scenario():
        async with connected() as (reader, writer, theirs):
            child = ChildEnd(theirs.detach())
            with closing(child._socket):
                echo = threading.Thread(target=lambda: child.send([msgspec.msgpack.decode(child.receive())]))
                echo.start()
                await write_frame(writer, b"x" * size)
                body = await read_frame(reader, size + 100)
                echo.join()
                child._stream.close()
                return msgspec.msgpack.decode(body)

    assert asyncio.run(scenario()) == [b"x" * size]


def test_frames_sent_together_come_apart_again():
    async def scenario():
        async with connected() as (reader, _, theirs):
            theirs.sendall(b"".join(frame(number) for number in range(1000)))
            return [msgspec.msgpack.decode(await read_frame(reader, 10)) for _ in range(1000)]

    assert asyncio.run(scenario()) == list(range(1000))


@pytest.mark.parametrize("announced", [101, 1 << 31, (1 << 32) - 1])
def test_a_frame_over_its_limit_is_refused_by_what_it_announces(announced):
    with pytest.raises(FrameTooLarge, match=f"a message of {announced} bytes, over 100"):
        read(struct.pack(">I", announced))


def test_a_frame_of_just_the_limit_is_taken():
    assert len(read(struct.pack(">I", 100) + bytes(100))) == 100


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0", b"\0\0\0\5", b"\0\0\0\5abcd"])
def test_an_end_before_the_end_of_a_frame_is_an_end(data):
    with pytest.raises(EOFError):
        read(data)


def test_writing_to_somebody_who_is_gone_is_an_end_and_so_is_reading_after_it():
    async def scenario():
        async with connected() as (reader, writer, theirs):
            theirs.close()
            with pytest.raises(EOFError):
                await write_frame(writer, bytes(8 * MEBIBYTE))
            with pytest.raises(EOFError):
                await read_frame(reader, 10)

    asyncio.run(scenario())


def test_writing_waits_for_the_reader_and_copies_no_more_than_a_piece(processes):
    async def scenario():
        async with connected() as (_, writer, theirs):
            with processes.bounded_memory(72 * MEBIBYTE):
                task = asyncio.create_task(write_frame(writer, bytes(32 * MEBIBYTE)))
                await asyncio.sleep(0.05)
                assert not task.done()
                assert writer.transport.get_write_buffer_size() <= MEBIBYTE // 2
            theirs.close()
            with pytest.raises(EOFError):
                await task

    asyncio.run(scenario())


def test_the_isolated_side_sends_nothing_over_the_limit_that_it_was_told():
    mine, theirs = socket.socketpair()
    child = ChildEnd(theirs.detach())
    child.limit = 10
    with mine, closing(child._socket), closing(child._stream):
        with pytest.raises(FrameTooLarge, match="a message of 12 bytes, over 10"):
            child.send(b"x" * 10)
        child.send(b"x" * 8)
        assert mine.recv(100) == b"\0\0\0\x0a\xc4\x08" + b"x" * 8


@pytest.mark.parametrize("data", [b"", b"\0\0"])
def test_the_isolated_side_ends_with_the_connection(data):
    mine, theirs = socket.socketpair()
    child = ChildEnd(theirs.detach())
    with closing(child._socket), closing(child._stream):
        mine.sendall(data)
        mine.close()
        with pytest.raises(SystemExit) as ended:
            child.receive()
        assert ended.value.code == 0


class Colour(IntEnum):
    RED = 3


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(1.5), 1.5),
        (np.float32(0.5), 0.5),
        (np.int64(-7), -7),
        (np.uint8(7), 7),
        (np.bool_(True), True),
        (np.str_("é"), "é"),
        (np.bytes_(b"\xff"), b"\xff"),
        (np.array(4), 4),
        (Colour.RED, 3),
        (Name("n"), "n"),
        ((1, None), [1, None]),
    ],
)
def test_scalars_and_subclasses_travel_as_plain_values(value, plain):
    decoded = msgspec.msgpack.decode(encode({"value": value}))["value"]
    assert decoded == plain
    assert type(decoded) is type(plain)


@pytest.mark.parametrize("value", [object(), np.arange(3), 1j, {1, 2}.__iter__(), type])
def test_what_is_no_plain_data_does_not_travel(value):
    with pytest.raises(TypeError, match="is no plain data"):
        frame({"value": value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xa2\xff\xff",
        b"\xc0\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 1_000_000,
        b"\x81\xa1k" * 1_000_000,
        b"\xc7\x0c\xff" + b"\xff" * 12,
    ],
)
def test_hostile_bytes_raise_what_is_expected_of_them(data):
    with pytest.raises(UNDECODABLE):
        msgspec.msgpack.decode(data)
