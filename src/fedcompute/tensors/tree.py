"""Named tensors: how a tree of arrays becomes leaf names and back, and what a leaf is (spec/artifacts.md 3.1)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.protos import tensorflow_pb2

DataType = tensorflow_pb2.DataType

Tensors = Mapping[str, NDArray[Any]]
"""Leaf name -> array. A string tensor is an object array of `bytes`."""


def _quantized(name: str, storage: type[np.generic]) -> np.dtype[Any]:
    return np.dtype([(name, storage)])


_PAIRS: tuple[tuple[np.dtype[Any], DataType], ...] = (
    (np.dtype(np.float32), tensorflow_pb2.DT_FLOAT),
    (np.dtype(np.float64), tensorflow_pb2.DT_DOUBLE),
    (np.dtype(np.float16), tensorflow_pb2.DT_HALF),
    (np.dtype(np.int8), tensorflow_pb2.DT_INT8),
    (np.dtype(np.int16), tensorflow_pb2.DT_INT16),
    (np.dtype(np.int32), tensorflow_pb2.DT_INT32),
    (np.dtype(np.int64), tensorflow_pb2.DT_INT64),
    (np.dtype(np.uint8), tensorflow_pb2.DT_UINT8),
    (np.dtype(np.uint16), tensorflow_pb2.DT_UINT16),
    (np.dtype(np.uint32), tensorflow_pb2.DT_UINT32),
    (np.dtype(np.uint64), tensorflow_pb2.DT_UINT64),
    (np.dtype(np.bool_), tensorflow_pb2.DT_BOOL),
    (np.dtype(np.complex64), tensorflow_pb2.DT_COMPLEX64),
    (np.dtype(np.complex128), tensorflow_pb2.DT_COMPLEX128),
    (np.dtype(object), tensorflow_pb2.DT_STRING),
    # One-field records, the form that TensorFlow itself hands out: a plain int8 would lose the type on the way back.
    (_quantized("qint8", np.int8), tensorflow_pb2.DT_QINT8),
    (_quantized("quint8", np.uint8), tensorflow_pb2.DT_QUINT8),
    (_quantized("qint32", np.int32), tensorflow_pb2.DT_QINT32),
)

DTYPES: Mapping[np.dtype[Any], DataType] = MappingProxyType(dict(_PAIRS))
"""NumPy dtype (native byte order) -> TensorFlow DataType; `object` is string."""

_BY_DATA_TYPE: Mapping[int, np.dtype[Any]] = MappingProxyType({int(code): dtype for dtype, code in _PAIRS})


@dataclass(frozen=True)
class LeafSpec:
    """What a leaf is, without its values: name, fully known shape, dtype (`np.dtype(object)` for strings)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def to_data_type(dtype: np.dtype[Any]) -> DataType:
    """The TensorFlow code of a NumPy dtype of either byte order.

    Raises ArtifactInvalid(WRONG_LEAF_TYPE) for a dtype that no tensor here has, such as fixed-width strings.
    """
    code = DTYPES.get(dtype.newbyteorder("="))
    if code is None:
        raise ArtifactInvalid(
            Reason.WRONG_LEAF_TYPE,
            f"no tensor type corresponds to the array type {dtype}",
            remedy="use a numeric array, or an object array of bytes for strings",
        )
    return code


def to_dtype(data_type: int) -> np.dtype[Any]:
    """The NumPy dtype of a TensorFlow code; ArtifactInvalid(WRONG_LEAF_TYPE) if it has none (bfloat16, resources)."""
    dtype = _BY_DATA_TYPE.get(data_type)
    if dtype is None:
        raise ArtifactInvalid(Reason.WRONG_LEAF_TYPE, f"tensor type {data_type} is not supported")
    return dtype


def flatten(prefix: str, tree: object) -> dict[str, NDArray[Any]]:
    """Names every leaf of a nested dict, tuple or list (spec/artifacts.md 3.1), depth first in field order.

    A dict and a named tuple give field names, other tuples and lists decimal indices; an empty one gives nothing.
    Leaves are arrays, NumPy scalars or `bytes`. Raises TypeError for any other leaf (a Python number has no definite
    dtype) and ValueError if two leaves get one name.
    """
    leaves: dict[str, NDArray[Any]] = {}
    _flatten_into(leaves, prefix, tree)
    return leaves


def _flatten_into(leaves: dict[str, NDArray[Any]], name: str, tree: object) -> None:
    branches = _branches(tree)
    if branches is not None:
        for field, branch in branches:
            _flatten_into(leaves, f"{name}/{field}", branch)
        return
    if name in leaves:
        raise ValueError(f"two leaves are named {name!r}")
    if isinstance(tree, bytes):
        leaves[name] = np.array(tree, dtype=object)
    elif isinstance(tree, np.ndarray | np.generic):
        leaves[name] = np.asarray(tree)
    else:
        raise TypeError(f"leaf {name!r} is a {type(tree).__name__}, not an array, a NumPy scalar or bytes")


def _branches(tree: object) -> Iterable[tuple[object, object]] | None:
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return zip(tree._fields, tree, strict=True)
    if isinstance(tree, tuple | list):
        return enumerate(tree)
    return None


def subtree(tensors: Tensors, prefix: str) -> dict[str, NDArray[Any]]:
    """The leaves under `prefix`, named relative to it, indices in numeric order.

    `subtree(t, "server/model")` gives "trainable/0", ..., "trainable/9", "trainable/10" for "server/model/trainable/0"
    and so on: checkpoints sort by bytes and put 10 before 2, which is never the order of the fields. A leaf that is
    `prefix` itself has the relative name "". An unknown prefix gives an empty dict, as an empty struct does.
    """
    start = f"{prefix}/"
    relative = {name[len(start) :]: leaf for name, leaf in tensors.items() if name.startswith(start)}
    if prefix in tensors:
        relative[""] = tensors[prefix]
    return dict(sorted(relative.items(), key=lambda item: _field_order(item[0])))


def _field_order(name: str) -> list[tuple[bool, int, str]]:
    parts = name.split("/")
    return [(not _is_index(part), int(part) if _is_index(part) else 0, part) for part in parts]


def _is_index(part: str) -> bool:
    return len(part) < 10 and part.isascii() and part.isdigit()


def spec_to_proto(spec: LeafSpec) -> tensorflow_pb2.TensorSpecProto:
    """The TensorFlow message of a leaf; ArtifactInvalid(WRONG_LEAF_TYPE) as `to_data_type`."""
    dims = [tensorflow_pb2.TensorShapeProto.Dim(size=size) for size in spec.shape]
    return tensorflow_pb2.TensorSpecProto(
        name=spec.name, shape=tensorflow_pb2.TensorShapeProto(dim=dims), dtype=to_data_type(spec.dtype)
    )


def spec_from_proto(proto: tensorflow_pb2.TensorSpecProto) -> LeafSpec:
    """The leaf of a TensorFlow message.

    Raises ArtifactInvalid(WRONG_LEAF_SHAPE) unless every dimension is known, (WRONG_LEAF_TYPE) as `to_dtype`.
    """
    shape = tuple(dim.size for dim in proto.shape.dim)
    if proto.shape.unknown_rank or any(size < 0 for size in shape):
        raise ArtifactInvalid(Reason.WRONG_LEAF_SHAPE, f"leaf {proto.name!r} has no fully known shape")
    return LeafSpec(proto.name, shape, to_dtype(proto.dtype))
