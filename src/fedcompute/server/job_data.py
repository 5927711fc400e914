"""Jobs and their results as bytes, for executors on other machines: plain data in MessagePack, and nothing that runs.

A value that MessagePack has travels as it is, any other as an array that begins with what it is. Of classes only our
own dataclasses, named tuples, enumerations and messages are made again, from their fields, by their constructors.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError, Message

from fedcompute.errors import OperationFailed, Reason

# The most that a job or a result may hold; MessagePack counts the bytes of one value in 32 bits.
BYTES_LIMIT = (1 << 32) - 1

_OURS = "fedcompute."
_AS_THEY_ARE = (type(None), bool, float, str, bytes)
_DTYPES = "biuf"


class _Kind(IntEnum):
    """What an array stands for."""

    LIST = 0
    TUPLE = 1
    DICT = 2
    INTEGER = 3  # of any size
    ARRAY = 4
    SCALAR = 5
    MOMENT = 6
    DURATION = 7
    PATH = 8
    RECORD = 9  # a dataclass or a named tuple
    CHOICE = 10
    MESSAGE = 11


def encode_data(value: Any) -> bytes:
    """The bytes of a value; raises OperationFailed(INTERNAL) for a class that does not travel or too many bytes."""
    data = msgspec.msgpack.encode(_flat(value))
    if len(data) > BYTES_LIMIT:
        raise OperationFailed(Reason.INTERNAL, f"a job or result of {len(data)} bytes, over {BYTES_LIMIT}")
    return data


def decode_data(data: bytes) -> Any:
    """The value that `encode_data` was given; raises OperationFailed(INTERNAL) for anything else."""
    try:
        return _whole(msgspec.msgpack.decode(data))
    except (msgspec.DecodeError, DecodeError, LookupError, TypeError, ValueError, AttributeError, ImportError) as error:
        text = f"{len(data)} bytes are no job and no result: {type(error).__name__}: {error}"
        raise OperationFailed(Reason.INTERNAL, text) from error


def name_of(job: Any) -> str:
    """What a module-level function is found by in another process; raises OperationFailed(INTERNAL) for others."""
    module, name = getattr(job, "__module__", None), getattr(job, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(str(module)), name, None) is not job:
        raise OperationFailed(Reason.INTERNAL, f"{job!r:.200} is no function of a module, and cannot run elsewhere")
    return f"{module}:{name}"


def named(name: str) -> Any:
    """The function of a name; raises ImportError or AttributeError where there is none."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _flat(value: Any) -> Any:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else [_Kind.INTEGER, hex(value)]
    if kind is list:
        return [_Kind.LIST, *map(_flat, value)]
    if kind is tuple:
        return [_Kind.TUPLE, *map(_flat, value)]
    if isinstance(value, Enum):
        return [_Kind.CHOICE, _class_name(kind), _flat(value.value)]
    if is_dataclass(kind) and all(one.init for one in fields(value)):
        return [_Kind.RECORD, _class_name(kind), *(_flat(getattr(value, one.name)) for one in fields(value))]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return [_Kind.RECORD, _class_name(kind), *map(_flat, value)]
    if isinstance(value, Mapping):
        return [_Kind.DICT, *(_flat(part) for pair in value.items() for part in pair)]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _DTYPES:
        tag = _Kind.ARRAY if isinstance(value, np.ndarray) else _Kind.SCALAR
        return [tag, value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()]
    if isinstance(value, Message):
        return [_Kind.MESSAGE, _class_name(kind), value.SerializeToString()]
    if kind is datetime:
        return [_Kind.MOMENT, value.isoformat()]
    if kind is timedelta:
        return [_Kind.DURATION, value.days, value.seconds, value.microseconds]
    if isinstance(value, Path):
        return [_Kind.PATH, str(value)]
    raise _homeless(f"{kind.__module__}.{kind.__qualname__}")


def _whole(flat: Any) -> Any:
    if not isinstance(flat, list):
        return flat
    tag, *parts = flat
    match tag:
        case _Kind.LIST:
            return [_whole(part) for part in parts]
        case _Kind.TUPLE:
            return tuple(_whole(part) for part in parts)
        case _Kind.DICT:
            return {_whole(key): _whole(value) for key, value in zip(parts[::2], parts[1::2], strict=True)}
        case _Kind.INTEGER:
            return int(parts[0], 16)
        case _Kind.ARRAY | _Kind.SCALAR:
            dtype, shape, data = parts
            # A copy, because who gets an array may write to it.
            array = np.frombuffer(data, dtype).reshape(shape).copy()
            return array if tag == _Kind.ARRAY else array[()]
        case _Kind.MOMENT:
            return datetime.fromisoformat(parts[0])
        case _Kind.DURATION:
            return timedelta(*parts)
        case _Kind.PATH:
            return Path(parts[0])
        case _Kind.RECORD:
            return _record(_class(parts[0]), [_whole(part) for part in parts[1:]])
        case _Kind.CHOICE:
            return _of(_class(parts[0]), Enum)(_whole(parts[1]))
        case _Kind.MESSAGE:
            return _of(_class(parts[0]), Message).FromString(parts[1])
    raise ValueError(f"unknown kind {tag!r}")


def _record(kind: Any, values: list[Any]) -> Any:
    names = [one.name for one in fields(kind)] if is_dataclass(kind) else None
    if names is None:
        return _of(kind, tuple)(*values)
    return kind(**dict(zip(names, values, strict=True)))


def _of(kind: Any, base: type) -> Any:
    if not issubclass(kind, base):
        raise TypeError(f"{kind} is no {base.__name__}")
    return kind


def _class_name(kind: type) -> str:
    if not kind.__module__.startswith(_OURS) or "." in kind.__qualname__:
        raise _homeless(f"{kind.__module__}.{kind.__qualname__}")
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> Any:
    if not name.startswith(_OURS):
        raise TypeError(f"class {name:.200} is none of ours")
    found = named(name)
    if not isinstance(found, type):
        raise TypeError(f"{name:.200} is no class")
    return found


def _homeless(name: str) -> OperationFailed:
    return OperationFailed(Reason.INTERNAL, f"{name} does not travel between machines")
