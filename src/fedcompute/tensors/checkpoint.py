"""Checkpoints: TensorFlow's V1 single-file format, read and written without TensorFlow (spec/artifacts.md 11.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import tensorflow_pb2 as tf
from fedcompute.tensors.table import Piece, read_table, write_table
from fedcompute.tensors.tree import DTYPES, Tensors, to_dtype
from fedcompute.tensors.wire import (
    chunk,
    chunk_header,
    fields,
    integer,
    malformed,
    pack_varints,
    single_fields,
    unpack_varints,
)

_STRINGS = 8

# TensorProto's field of each type, and whether it is a packed field of fixed-width values. The others are varints.
_FIELDS: Mapping[int, tuple[int, bool]] = MappingProxyType(
    {
        tf.DT_FLOAT: (5, True),
        tf.DT_DOUBLE: (6, True),
        tf.DT_INT32: (7, False),
        tf.DT_INT16: (7, False),
        tf.DT_INT8: (7, False),
        tf.DT_UINT16: (7, False),
        tf.DT_UINT8: (7, False),
        tf.DT_QINT32: (7, False),
        tf.DT_QINT8: (7, False),
        tf.DT_QUINT8: (7, False),
        tf.DT_STRING: (_STRINGS, False),
        tf.DT_COMPLEX64: (9, True),
        tf.DT_INT64: (10, False),
        tf.DT_BOOL: (11, False),
        tf.DT_COMPLEX128: (12, True),
        tf.DT_HALF: (13, False),
    }
)
_MAX_VALUE_BYTES = (1 << 31) - 1  # protobuf's limit on a message, which TensorFlow's reader has too
_FORMAT_VERSION = 1
_MAX_RANK = 32  # of a NumPy 1 array


@dataclass(frozen=True)
class CheckpointLimits:
    """What a reader takes at most; beyond it a file is CHECKPOINT_TOO_LARGE. `max_elements` is that of all leaves."""

    max_bytes: int = 1 << 30
    max_tensors: int = 1 << 14
    max_elements: int = 1 << 28
    max_name_bytes: int = 1024
    max_rank: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.max_rank <= _MAX_RANK:
            raise ValueError(f"max_rank must be between 0 and {_MAX_RANK}, not {self.max_rank}")
        if not 0 <= self.max_elements <= 1 << 40:
            raise ValueError("max_elements must be between 0 and 2^40")


DEFAULT_LIMITS = CheckpointLimits()


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf as a file lists it; `data_type`: TensorFlow's code."""

    name: str
    shape: tuple[int, ...]
    data_type: int


def read_checkpoint(data: bytes | memoryview, limits: CheckpointLimits = DEFAULT_LIMITS) -> dict[str, NDArray[Any]]:
    """The leaves of a checkpoint file, sorted by name.

    The arrays are read-only. Aligned fixed-width ones are views of `data`, which they keep alive; copy before changing
    or before holding on to a small leaf of a large file. Strings are object arrays of `bytes`.

    Whole tensors only: a leaf that is stored in parts is refused, as are compressed blocks and any byte that
    TensorFlow's `SaveSlices` would not have written. Memory beyond `data` stays within a small multiple of it (at
    worst about sixteen, for very short strings) whatever shapes the file claims. Raises ArtifactInvalid:
    CHECKPOINT_MALFORMED or CHECKPOINT_TOO_LARGE.
    """
    stored = stored_leaves(memoryview(data).cast("B"), limits)
    return {leaf.name: values_of(leaf, payload) for leaf, payload in stored}


def stored_leaves(data: memoryview, limits: CheckpointLimits) -> list[tuple[StoredLeaf, memoryview]]:
    """The leaves of a checkpoint file, sorted by name, with the bytes that `values_of` takes: views of `data`.

    `data`: flat bytes. Raises ArtifactInvalid as `read_checkpoint`; everything but the values has been checked.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(f"{len(data)} bytes exceed the limit of {limits.max_bytes}")
    entries = read_table(
        data,
        # The entry of the shapes comes on top.
        max_entries=limits.max_tensors + 1,
        # Escaping doubles a name at worst; a dimension takes two bytes, the frame six.
        max_key_bytes=2 * (limits.max_name_bytes + limits.max_rank) + 6,
    )
    if not entries or entries[0][0] != b"":
        raise malformed("the file has no list of tensors")
    leaves = {_key(leaf): leaf for leaf in _read_meta(entries[0][1], limits)}
    if len(entries) - 1 != len(leaves):
        raise malformed(f"{len(leaves)} tensors are listed, {len(entries) - 1} stored")
    stored = []
    for key, value in entries[1:]:
        leaf = leaves.get(key)
        if leaf is None:
            raise malformed("a stored tensor is not listed")
        stored.append((leaf, _read_payload(leaf, value)))
    return stored


def write_checkpoint(tensors: Tensors) -> bytes:
    """The checkpoint file of the given leaves, sorted by name: a function of names, dtypes, shapes and values only.

    Equal to what TensorFlow's `SaveSlices` writes for the same leaves, byte for byte. Raises ArtifactInvalid:
    CHECKPOINT_MALFORMED for a dtype that `SaveSlices` refuses (bfloat16, uint32, uint64) or that is no tensor's, for
    a string element that is not `bytes` and for a name that is not Unicode text; CHECKPOINT_TOO_LARGE for a leaf of
    2 GiB.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    leaves = [_leaf(name, arrays[name]) for name in sorted(arrays, key=_encoded)]
    meta = b"".join(chunk(1, _listing(leaf)) for leaf in leaves) + chunk(2, integer(1, _FORMAT_VERSION))
    entries: list[tuple[bytes, list[Piece]]] = [(b"", [chunk(1, meta)])]
    entries += [(_key(leaf), _value(leaf, arrays[leaf.name])) for leaf in leaves]
    return write_table(entries)


def _too_large(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.CHECKPOINT_TOO_LARGE, detail)


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise malformed(f"the leaf name {name!r} is not Unicode text") from None


def _key(leaf: StoredLeaf) -> bytes:
    """The ordered code of (0, name, rank, per dimension start 0 and length -1)."""
    # The code escapes 0xff too, a byte that UTF-8 never has.
    escaped = _encoded(leaf.name).replace(b"\0", b"\0\xff")
    return b"\0" + escaped + b"\0\1" + _ordered(len(leaf.shape)) + b"\x80\x7f" * len(leaf.shape)


def _ordered(number: int) -> bytes:
    return bytes([1, number]) if number else b"\0"


# --- Reading ---


def _read_meta(value: memoryview, limits: CheckpointLimits) -> list[StoredLeaf]:
    _, outer = single_fields(value, chunks=(1,))
    leaves: dict[str, StoredLeaf] = {}
    elements = 0
    versions: memoryview | None = None
    for number, content in fields(outer.get(1, memoryview(b""))):
        if number == 1 and isinstance(content, memoryview):
            if len(leaves) >= limits.max_tensors:
                raise _too_large(f"more tensors than the limit of {limits.max_tensors}")
            leaf = _read_listing(content, limits)
            if leaf.name in leaves:
                raise malformed(f"leaf {leaf.name!r} is listed twice")
            leaves[leaf.name] = leaf
            elements += math.prod(leaf.shape)
            if elements > limits.max_elements:
                raise _too_large(f"more elements than the limit of {limits.max_elements}")
        elif number == 2 and isinstance(content, memoryview) and versions is None:
            versions = content
        else:
            raise malformed(f"unexpected field {number}")
    if versions is None:
        raise malformed("the file names no format version")
    found, _ = single_fields(versions, integers=(1, 2))
    if found.get(2, 0) > _FORMAT_VERSION:
        raise malformed(f"the file needs a reader of format version {found[2]}")
    return list(leaves.values())


def _read_listing(content: memoryview, limits: CheckpointLimits) -> StoredLeaf:
    integers, chunks = {}, {}
    slices: list[memoryview] = []
    for number, value in fields(content):
        if number == 4 and isinstance(value, memoryview):
            slices.append(value)
            if len(slices) > 1:
                raise _in_parts()
        elif number in (1, 2) and isinstance(value, memoryview) and number not in chunks:
            chunks[number] = value
        elif number == 3 and isinstance(value, int) and number not in integers:
            integers[number] = value
        else:
            raise malformed(f"unexpected field {number}")
    name = _read_name(chunks.get(1), limits)
    shape = _read_shape(chunks.get(2, memoryview(b"")), limits)
    data_type = integers.get(3, 0)
    if data_type not in _FIELDS:
        raise malformed(f"leaf {name!r} has type {data_type}, which no checkpoint holds")
    if not slices:
        raise malformed(f"leaf {name!r} has no data")
    _check_whole(slices[0], len(shape))
    return StoredLeaf(name, shape, data_type)


def _read_name(raw: memoryview | None, limits: CheckpointLimits) -> str:
    raw = memoryview(b"") if raw is None else raw
    if len(raw) > limits.max_name_bytes:
        raise _too_large(f"a leaf name exceeds {limits.max_name_bytes} bytes")
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise malformed("a leaf name is not UTF-8") from None


def _read_shape(content: memoryview, limits: CheckpointLimits) -> tuple[int, ...]:
    shape: list[int] = []
    for number, value in fields(content):
        if number != 2 or not isinstance(value, memoryview):
            raise malformed("a shape is not fully known")
        if len(shape) >= limits.max_rank:
            raise _too_large(f"a shape has more than {limits.max_rank} dimensions")
        size = single_fields(value, integers=(1,))[0].get(1, 0)
        if size >= 1 << 63:
            raise malformed("a dimension is negative")
        shape.append(size)
    # A zero elsewhere must not excuse a dimension that NumPy cannot hold.
    if math.prod(max(size, 1) for size in shape) > limits.max_elements:
        raise _too_large(f"a shape has more elements than the limit of {limits.max_elements}")
    return tuple(shape)


def _check_whole(content: memoryview, rank: int) -> None:
    extents = 0
    for number, value in fields(content):
        if number != 1 or not isinstance(value, memoryview):
            raise malformed(f"unexpected field {number}")
        if len(value):
            raise _in_parts()
        extents += 1
        if extents > rank:
            break
    if extents != rank:
        raise malformed("a slice has another rank than its tensor")


def _in_parts() -> ArtifactInvalid:
    return ArtifactInvalid(
        Reason.CHECKPOINT_MALFORMED,
        "a tensor is stored in parts",
        remedy="write every tensor whole, without partitioned variables",
    )


def _read_payload(leaf: StoredLeaf, value: memoryview) -> memoryview:
    _, outer = single_fields(value, chunks=(2,))
    _, saved = single_fields(outer.get(2, memoryview(b"")), chunks=(1, 2, 3))
    empty = memoryview(b"")
    if saved.get(1, empty) != leaf.name.encode():
        raise malformed(f"the data of leaf {leaf.name!r} bears another name")
    _check_whole(saved.get(2, empty), len(leaf.shape))
    number, _ = _FIELDS[leaf.data_type]
    content = saved.get(3, empty)
    return content if number == _STRINGS else single_fields(content, chunks=(number,))[1].get(number, empty)


def values_of(leaf: StoredLeaf, payload: memoryview, *, align: bool = True) -> NDArray[Any]:
    """The array in a leaf's bytes, as `read_checkpoint` gives it; without `align` always a view where it can be one.

    Raises ArtifactInvalid (CHECKPOINT_MALFORMED).
    """
    number, fixed_width = _FIELDS[leaf.data_type]
    count = math.prod(leaf.shape)
    if number == _STRINGS:
        array = _read_strings(leaf, payload, count)
    else:
        flat = np.frombuffer(payload, np.uint8) if len(payload) else np.empty(0, np.uint8)
        dtype = to_dtype(leaf.data_type)
        array = _read_fixed(leaf, flat, count, dtype, align) if fixed_width else _read_varints(flat, count, dtype)
    array = array.reshape(leaf.shape)
    array.flags.writeable = False
    return array


def _read_fixed(
    leaf: StoredLeaf, payload: NDArray[np.uint8], count: int, dtype: np.dtype[Any], align: bool
) -> NDArray[Any]:
    if len(payload) != count * dtype.itemsize:
        raise malformed(f"leaf {leaf.name!r} has {len(payload)} bytes of data, its shape {count * dtype.itemsize}")
    values = payload.view(dtype.newbyteorder("<")).astype(dtype, copy=False)
    return values if values.flags.aligned or not align else values.copy()


def _read_varints(payload: NDArray[np.uint8], count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    values = unpack_varints(payload, count, _storage(dtype))
    if dtype == np.bool_ and count and values.max() > 1:
        raise malformed("a truth value is neither 0 nor 1")
    return values.view(dtype)


def _storage(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The integer type whose values the file holds for `dtype`."""
    if dtype.names:
        return dtype[0]
    match dtype.kind:
        case "f":
            return np.dtype(np.uint16)
        case "b":
            return np.dtype(np.uint8)
    return dtype


def _read_strings(leaf: StoredLeaf, content: memoryview, count: int) -> NDArray[Any]:
    strings: list[bytes] = []
    for number, value in fields(content):
        if number != _STRINGS or not isinstance(value, memoryview) or len(strings) == count:
            raise malformed(f"leaf {leaf.name!r} holds more than its {count} strings")
        strings.append(bytes(value))
    if len(strings) != count:
        raise malformed(f"leaf {leaf.name!r} has {len(strings)} of its {count} strings")
    return np.fromiter(strings, dtype=object, count=count)


# --- Writing ---


def _leaf(name: str, array: NDArray[Any]) -> StoredLeaf:
    data_type = DTYPES.get(array.dtype.newbyteorder("="))
    if data_type is None or data_type not in _FIELDS:
        raise malformed(f"leaf {name!r} has the type {array.dtype}, which a checkpoint cannot hold")
    if array.nbytes > _MAX_VALUE_BYTES and array.dtype.kind in "fc":
        raise _too_large(f"leaf {name!r} has {array.nbytes} bytes; a checkpoint holds less than 2 GiB per leaf")
    return StoredLeaf(name, array.shape, data_type)


def _listing(leaf: StoredLeaf) -> bytes:
    shape = b"".join(chunk(2, integer(1, size) if size else b"") for size in leaf.shape)
    name = chunk(1, _encoded(leaf.name)) if leaf.name else b""
    return name + chunk(2, shape) + integer(3, leaf.data_type) + chunk(4, _whole(leaf))


def _whole(leaf: StoredLeaf) -> bytes:
    return chunk(1, b"") * len(leaf.shape)


def _value(leaf: StoredLeaf, array: NDArray[Any]) -> list[Piece]:
    number, fixed_width = _FIELDS[leaf.data_type]
    payload: Piece
    if number == _STRINGS:
        header, payload = b"", _strings(leaf, array)
    else:
        payload = _fixed(array) if fixed_width else _varints(array)
        header = chunk_header(number, len(payload)) if len(payload) else b""
    name = chunk(1, _encoded(leaf.name)) if leaf.name else b""
    saved = name + chunk(2, _whole(leaf)) + chunk_header(3, len(header) + len(payload)) + header
    size = len(saved) + len(payload)
    if size > _MAX_VALUE_BYTES - 16:
        raise _too_large(f"leaf {leaf.name!r} takes {size} bytes; a checkpoint holds less than 2 GiB per leaf")
    return [chunk_header(2, size) + saved, payload]


def _fixed(array: NDArray[Any]) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8)


def _varints(array: NDArray[Any]) -> bytes:
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1)
    return pack_varints(flat.view(_storage(flat.dtype)))


def _strings(leaf: StoredLeaf, array: NDArray[Any]) -> bytes:
    strings = array.reshape(-1).tolist()
    if not all(isinstance(string, bytes) for string in strings):
        raise malformed(f"leaf {leaf.name!r} holds objects that are not bytes")
    return b"".join(chunk(_STRINGS, string) for string in strings)
