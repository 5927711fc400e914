"""Frames between a device and its isolated processes: four bytes of length, then MessagePack."""

import asyncio
import socket
import struct
from typing import Any

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError)
"""What decoding hostile bytes raises."""

_LENGTH = struct.Struct(">I")
_MOST = (1 << 32) - 1
_PIECE_BYTES = 1 << 18
_KINDS: tuple[type[Any], ...] = (str, bytes, int, float)


class FrameTooLarge(Exception):
    """A message of more bytes than its side may send."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a message of {size} bytes, over {limit}")


def _plain(value: Any) -> Any:
    """The plain value that a subclass of a plain type or a scalar of NumPy stands for."""
    for kind in _KINDS:
        if isinstance(value, kind):
            return kind(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no plain data")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode(value: Any) -> bytes:
    """MessagePack of plain data. Raises TypeError, ValueError or OverflowError for what no message may hold."""
    return _ENCODER.encode(value)


def frame(message: Any, limit: int = _MOST) -> bytearray:
    """A message as it travels. Raises FrameTooLarge over `limit` bytes, and as `encode`."""
    data = bytearray(_LENGTH.size)
    _ENCODER.encode_into(message, data, _LENGTH.size)
    size = len(data) - _LENGTH.size
    if size > limit:
        raise FrameTooLarge(size, limit)
    _LENGTH.pack_into(data, 0, size)
    return data


async def write_frame(writer: asyncio.StreamWriter, message: Any) -> None:
    """Sends a message, a piece at a time, as a transport copies what it cannot send at once.

    Raises EOFError if nobody reads it any more, and as `frame`.
    """
    data = memoryview(frame(message))
    try:
        for start in range(0, len(data), _PIECE_BYTES):
            writer.write(data[start : start + _PIECE_BYTES])
            await writer.drain()
    except ConnectionError:
        raise EOFError from None


async def read_frame(reader: asyncio.StreamReader, limit: int) -> bytearray:
    """The body of the next frame. Raises FrameTooLarge before it reads more than `limit` bytes, EOFError at the end."""
    try:
        (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if size > limit:
            raise FrameTooLarge(size, limit)
        body = bytearray()
        while len(body) < size:
            piece = await reader.read(min(size - len(body), _PIECE_BYTES))
            if not piece:
                raise EOFError
            body += piece
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EOFError from None
    return body


class ChildEnd:
    """The isolated side of the connection, blocking. What it reads comes from the device, whom it trusts.

    `limit`: bytes of the largest message that the device takes, once it has said so.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._stream = self._socket.makefile("rb")
        self.limit = _MOST

    def send(self, message: Any) -> None:
        """Sends a message. Raises FrameTooLarge, and as `encode`; nothing has been sent then."""
        self._socket.sendall(frame(message, self.limit))

    def receive(self) -> bytes:
        """The body of the next frame; the process ends if there is none, as nobody waits for it any more."""
        head = self._stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise SystemExit(0)
        return self._stream.read(_LENGTH.unpack(head)[0])
