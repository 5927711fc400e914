"""Sorted tables: keys and values in checksummed blocks, the container of a checkpoint file (spec/artifacts.md 11.1)."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.tensors.wire import malformed, read_varint, varint

Piece = bytes | NDArray[np.uint8]

_MAGIC = bytes.fromhex("57fb808b247547db")
CHECKSUM_BYTES = 4
_FOOTER = 48
_TRAILER = 1 + CHECKSUM_BYTES
_BLOCK_SIZE = 256 << 10
_OVERLY_LARGE = 2 * _BLOCK_SIZE
_RESTART_INTERVAL = 16


def read_table(data: memoryview, *, max_entries: int, max_key_bytes: int) -> list[tuple[bytes, memoryview]]:
    """All entries of a table in key order; the values are views of `data`, a flat view of bytes.

    Every byte is accounted for: blocks must tile the file, every checksum must hold, keys must rise strictly and agree
    with the index. Work is linear in the file plus `max_entries * max_key_bytes`. Raises ArtifactInvalid:
    CHECKPOINT_MALFORMED, or CHECKPOINT_TOO_LARGE beyond a limit.
    """
    if len(data) < _FOOTER:
        raise malformed(f"{len(data)} bytes are too few for a checkpoint")
    footer = data[-_FOOTER:]
    if footer[-8:] != _MAGIC:
        raise malformed("the file does not end as a checkpoint does")
    metaindex, at = _read_handle(footer, 0)
    index, _ = _read_handle(footer, at)
    if footer != _footer(_handle(*metaindex), _handle(*index)):
        raise malformed("the footer is damaged")
    tail = len(data) - _FOOTER
    if index[0] + index[1] + _TRAILER != tail or metaindex[0] + metaindex[1] + _TRAILER != index[0]:
        raise malformed("the index does not end where the footer begins")

    limits = (max_entries, max_key_bytes)
    if list(_entries(_block(data, metaindex), *limits)):
        raise malformed("the meta index is not empty")
    entries: list[tuple[bytes, memoryview]] = []
    end = 0
    previous_bound: bytes | None = None
    for bound, value in _entries(_block(data, index), *limits):
        handle, at = _read_handle(value, 0)
        if at != len(value) or handle[0] != end:
            raise malformed("the index does not list the blocks in order")
        start = len(entries)
        entries.extend(_entries(_block(data, handle), max_entries - start, max_key_bytes))
        if start == len(entries):
            raise malformed("a block is empty")
        if (previous_bound is not None and entries[start][0] <= previous_bound) or bound < entries[-1][0]:
            raise malformed("the index does not bound the keys of its blocks")
        previous_bound = bound
        end = handle[0] + handle[1] + _TRAILER
    if end != metaindex[0]:
        raise malformed("bytes of the file belong to no block")
    return entries


def data_blocks(data: memoryview) -> list[tuple[int, int]]:
    """Offset and size of the blocks that hold the entries of a table which `read_table` has taken, in order.

    A block is followed by its kind and its checksum: one byte and four.
    """
    footer = data[-_FOOTER:]
    index, _ = _read_handle(footer, _read_handle(footer, 0)[1])
    limit = len(data)
    return [_read_handle(value, 0)[0] for _, value in _entries(_block(data, index), limit, limit)]


def check_block(data: memoryview, offset: int, size: int) -> None:
    """Raises ArtifactInvalid (CHECKPOINT_MALFORMED) unless the checksum of the block with `size` bytes holds."""
    end = offset + size
    (stored,) = struct.unpack_from("<I", data, end + 1)
    # The extension takes no memoryview; an array over the same bytes is no copy.
    if stored != _masked(google_crc32c.value(np.frombuffer(data[offset : end + 1], np.uint8))):
        raise malformed(f"the checksum of the block at byte {offset} does not hold")


def _footer(metaindex: bytes, index: bytes) -> bytes:
    return (metaindex + index).ljust(_FOOTER - len(_MAGIC), b"\0") + _MAGIC


def _handle(offset: int, size: int) -> bytes:
    return varint(offset) + varint(size)


def _read_handle(data: memoryview, at: int) -> tuple[tuple[int, int], int]:
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return (offset, size), at


def _block(data: memoryview, handle: tuple[int, int]) -> memoryview:
    offset, size = handle
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise malformed("a block lies outside of the file")
    check_block(data, offset, size)
    if data[end] != 0:
        raise ArtifactInvalid(
            Reason.CHECKPOINT_MALFORMED,
            f"the block at byte {offset} is compressed (kind {data[end]})",
            remedy="write the checkpoint without compression",
        )
    return data[offset:end]


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _entries(block: memoryview, max_entries: int, max_key_bytes: int) -> Iterator[tuple[bytes, memoryview]]:
    if len(block) < 4:
        raise malformed("a block is too short")
    (restart_count,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * restart_count
    if end < 0 or restart_count == 0:
        raise malformed("a block's restart list is damaged")
    restarts = np.frombuffer(block[end:-4], "<u4")
    at = 0
    count = restarted = 0
    key = b""
    while at < end:
        if count >= max_entries:
            raise ArtifactInvalid(Reason.CHECKPOINT_TOO_LARGE, f"more entries than the limit of {max_entries} leaves")
        if restarted < restart_count and restarts[restarted] == at:
            restarted += 1
            restart = True
        else:
            restart = False
        shared, at = read_varint(block, at)
        fresh, at = read_varint(block, at)
        size, at = read_varint(block, at)
        if shared > len(key) or (restart and shared):
            raise malformed("a key shares more than its predecessor has")
        if shared + fresh > max_key_bytes:
            raise ArtifactInvalid(Reason.CHECKPOINT_TOO_LARGE, f"a key exceeds {max_key_bytes} bytes")
        if fresh + size > end - at:
            raise malformed("an entry is cut off")
        following = key[:shared] + bytes(block[at : at + fresh])
        if count and following <= key:
            raise malformed("keys do not rise")
        key = following
        yield key, block[at + fresh : at + fresh + size]
        at += fresh + size
        count += 1
    # A table without entries still lists one restart, at 0.
    if restarted != restart_count and not (count == 0 and restart_count == 1 and restarts[0] == 0):
        raise malformed("a block's restart list is damaged")


@dataclass
class _Block:
    """A block being written: its pieces, and the state that prefix compression needs."""

    interval: int
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    restarts: list[int] = field(default_factory=lambda: [0])
    since_restart: int = 0
    last_key: bytes = b""

    def add(self, key: bytes, value: Sequence[Piece]) -> None:
        if self.since_restart == self.interval:
            self.restarts.append(self.size)
            self.since_restart = 0
        shared = _common_prefix(self.last_key, key) if self.since_restart else 0
        header = varint(shared) + varint(len(key) - shared) + varint(sum(len(piece) for piece in value)) + key[shared:]
        self.pieces += [header, *value]
        self.size += len(header) + sum(len(piece) for piece in value)
        self.since_restart += 1
        self.last_key = key

    def estimate(self) -> int:
        return self.size + 4 * len(self.restarts) + 4

    def finish(self) -> list[Piece]:
        tail = struct.pack(f"<{len(self.restarts) + 1}I", *self.restarts, len(self.restarts)) + b"\0"
        pieces = [*self.pieces, tail]
        crc = 0
        for piece in pieces:
            crc = google_crc32c.extend(crc, piece)
        return [*pieces, struct.pack("<I", _masked(crc))]


def write_table(entries: Iterable[tuple[bytes, Sequence[Piece]]]) -> bytes:
    """The table of the given entries, whose keys must rise strictly; byte for byte what TensorFlow's writer makes.

    A value is a sequence of pieces, so that an array's bytes are copied once, into the result.
    """
    pieces: list[Piece] = []
    written = 0
    block = _Block(_RESTART_INTERVAL)
    index = _Block(1)
    pending: tuple[bytes, bytes] | None = None

    def flush(finished: _Block) -> bytes:
        nonlocal written
        handle = _handle(written, finished.estimate())
        written += finished.estimate() + _TRAILER
        pieces.extend(finished.finish())
        return handle

    for key, value in entries:
        if block.size and len(key) + sum(len(piece) for piece in value) >= _OVERLY_LARGE:
            pending = block.last_key, flush(block)
            block = _Block(_RESTART_INTERVAL)
        if pending is not None:
            index.add(_separator(pending[0], key), [pending[1]])
            pending = None
        block.add(key, value)
        if block.estimate() >= _BLOCK_SIZE:
            pending = block.last_key, flush(block)
            block = _Block(_RESTART_INTERVAL)
    if block.size:
        pending = block.last_key, flush(block)
    metaindex_handle = flush(_Block(_RESTART_INTERVAL))
    if pending is not None:
        index.add(_successor(pending[0]), [pending[1]])
    pieces.append(_footer(metaindex_handle, flush(index)))
    return b"".join(piece if isinstance(piece, bytes) else piece.data for piece in pieces)


def _common_prefix(left: bytes, right: bytes) -> int:
    size = min(len(left), len(right))
    return next((index for index in range(size) if left[index] != right[index]), size)


def _separator(last: bytes, following: bytes) -> bytes:
    """The shortest key in [last, following) that raising one byte of `last` gives, else `last`."""
    at = _common_prefix(last, following)
    if at < min(len(last), len(following)) and last[at] < 0xFF and last[at] + 1 < following[at]:
        return last[:at] + bytes([last[at] + 1])
    return last


def _successor(last: bytes) -> bytes:
    at = next((index for index, byte in enumerate(last) if byte != 0xFF), None)
    return last if at is None else last[:at] + bytes([last[at] + 1])
