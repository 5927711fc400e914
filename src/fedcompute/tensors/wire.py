"""Protocol-buffer bytes read and written by hand, so that a large tensor costs a few array operations.

The reader is stricter than a protobuf parser: it takes what a checkpoint holds and refuses the rest (unknown fields,
repeated single fields, values out of range), which bounds its work by what its caller expects.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason

_VARINT = 0
_CHUNK = 2
_LONGEST = 10  # bytes of a 64-bit varint
_SLAB = 1 << 16  # varints or bytes that one vectorised step handles; bounds its scratch memory


def malformed(detail: str) -> ArtifactInvalid:
    """The error of every byte sequence that is no checkpoint."""
    return ArtifactInvalid(Reason.CHECKPOINT_MALFORMED, detail)


def varint(value: int) -> bytes:
    """A number in [0, 2^64) as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def chunk(number: int, content: bytes) -> bytes:
    """Field `number` that holds bytes, a string or a message."""
    return chunk_header(number, len(content)) + content


def chunk_header(number: int, size: int) -> bytes:
    """What precedes the `size` bytes of field `number`."""
    return varint(number << 3 | _CHUNK) + varint(size)


def integer(number: int, value: int) -> bytes:
    """Field `number` that holds an integer; a negative one takes ten bytes."""
    return varint(number << 3 | _VARINT) + varint(value % (1 << 64))


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The varint at byte `at` and the offset behind it; ArtifactInvalid if it is cut off or exceeds 64 bits."""
    value = 0
    for index in range(_LONGEST):
        if at + index >= len(data):
            raise malformed("a number is cut off")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + index + 1
    raise malformed("a number exceeds 64 bits")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field of a message in order; chunks are views of `data`. Raises ArtifactInvalid."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        value, at = read_varint(data, at)
        if tag & 7 == _VARINT:
            yield tag >> 3, value
        elif tag & 7 == _CHUNK:
            if value > len(data) - at:
                raise malformed("a field is cut off")
            yield tag >> 3, data[at : at + value]
            at += value
        else:
            raise malformed(f"a field has wire type {tag & 7}")


def single_fields(
    data: memoryview, *, integers: Collection[int] = (), chunks: Collection[int] = ()
) -> tuple[dict[int, int], dict[int, memoryview]]:
    """The fields of a message that has each of the given ones at most once, and no other; else ArtifactInvalid."""
    found_integers: dict[int, int] = {}
    found_chunks: dict[int, memoryview] = {}
    for number, value in fields(data):
        if isinstance(value, int) and number in integers and number not in found_integers:
            found_integers[number] = value
        elif isinstance(value, memoryview) and number in chunks and number not in found_chunks:
            found_chunks[number] = value
        else:
            raise malformed(f"unexpected field {number}")
    return found_integers, found_chunks


def pack_varints(values: NDArray[Any]) -> bytes:
    """The packed field content of integers of any width, shape [n]; negative ones take ten bytes each."""
    if values.size == 0:
        return b""
    if values.min() >= 0 and values.max() < 0x80:
        return values.astype(np.uint8).tobytes()
    return b"".join(_pack_slab(values[at : at + _SLAB]) for at in range(0, len(values), _SLAB))


def _pack_slab(values: NDArray[Any]) -> bytes:
    rest = values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values.astype(np.uint64)
    sizes = np.ones(len(rest), np.int64)
    for bits in range(7, 64, 7):
        sizes += rest >> np.uint64(bits) != 0
    ends = np.cumsum(sizes)
    out = np.empty(int(ends[-1]), np.uint8)
    for index in range(int(sizes.max())):
        here = np.flatnonzero(sizes > index)
        more = np.where(sizes[here] > index + 1, 0x80, 0).astype(np.uint8)
        low = (rest[here] >> np.uint64(7 * index) & np.uint64(0x7F)).astype(np.uint8)
        out[(ends - sizes)[here] + index] = low | more
    return out.tobytes()


def unpack_varints(data: NDArray[np.uint8], count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The `count` integers in a packed field's content, as `dtype`, shape [count].

    Raises ArtifactInvalid unless `data` holds exactly `count` varints that fit `dtype`. Allocates the result and
    bounded scratch, and only after counting.
    """
    last = data < 0x80
    if np.count_nonzero(last) != count or (len(data) and not last[-1]):
        raise malformed(f"{np.count_nonzero(last)} integers where {count} belong")
    if len(data) == count:
        # One byte each: what it can say fits every type.
        return data.astype(dtype)
    out = np.empty(count, dtype)
    at = done = 0
    while done < count:
        ends = np.flatnonzero(last[at : at + _SLAB]) + 1
        if not len(ends):
            raise malformed("a number exceeds 64 bits")
        values = _unpack_slab(data[at : at + int(ends[-1])], ends)
        if dtype.kind == "i":
            values = values.view(np.int64)
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise malformed(f"an integer does not fit {dtype}")
        out[done : done + len(ends)] = values
        at += int(ends[-1])
        done += len(ends)
    return out


def _unpack_slab(data: NDArray[np.uint8], ends: NDArray[np.intp]) -> NDArray[Any]:
    starts = np.concatenate([np.zeros(1, np.intp), ends[:-1]])
    sizes = ends - starts
    longest = int(sizes.max())
    if longest > _LONGEST or (longest == _LONGEST and (data[starts[sizes == _LONGEST] + _LONGEST - 1] > 1).any()):
        raise malformed("a number exceeds 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for index in range(longest):
        here = np.flatnonzero(sizes > index)
        low = (data[starts[here] + index] & 0x7F).astype(np.uint64)
        values[here] |= low << np.uint64(7 * index)
    return values
