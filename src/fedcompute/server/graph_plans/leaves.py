"""Leaves and metrics of the files that plans with graphs read and write."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec, Tensors

# The reference's bound on a tensor that a graph restores (spec/artifacts.md 2.6).
MOST_TENSOR_BYTES = 500 << 20
# A sum of up to this many values of at most MAX / MOST_ADDENDS is finite whatever the values.
_MOST_ADDENDS = 1 << 20


def check_update(update: Tensors, expected: Mapping[str, LeafSpec]) -> None:
    """Judges one device's update by its layout and its values; raises UploadRejected with the typed reason.

    Refused: leaves missing or unknown, another shape or dtype, a value that is not finite or so large that the sum of
    a million of them would not be. What a value means only the plan's graph knows: it is not bounded otherwise.
    """
    if update.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - update.keys()), sorted(update.keys() - expected.keys())
        raise UploadRejected(
            Reason.WRONG_LEAF_NAMES,
            f"{len(missing)} leaves missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
        )
    for name, spec in expected.items():
        value = update[name]
        if value.dtype != spec.dtype:
            raise UploadRejected(Reason.WRONG_LEAF_TYPE, f"{name} is {value.dtype}, not {spec.dtype}")
        if value.shape != spec.shape:
            raise UploadRejected(Reason.WRONG_LEAF_SHAPE, f"{name} has shape {value.shape}, not {spec.shape}")
        if value.dtype.kind in "fc" and value.size:
            limit = float(np.finfo(value.dtype).max) / (_MOST_ADDENDS if value.dtype.itemsize > 2 else 1)
            # A comparison, unlike a maximum, is false for what is no number.
            if not (np.abs(value) <= limit).all():
                raise UploadRejected(Reason.NOT_FINITE, f"{name} holds a value not finite or above {limit:.3g}")


def check_leaves(leaves: Tensors, expected: Mapping[str, LeafSpec], reason: Reason) -> None:
    """Raises ArtifactInvalid (`reason`) unless `leaves` holds all that is expected; others are ignored.

    A size of -1 takes any. CHECKPOINT_TOO_LARGE for a leaf of more than 500 MiB.
    """
    for name, spec in expected.items():
        value = leaves.get(name)
        if value is None:
            raise ArtifactInvalid(reason, f"leaf {name!r} is missing")
        fits = len(value.shape) == len(spec.shape) and all(
            want in (-1, size) for size, want in zip(value.shape, spec.shape, strict=True)
        )
        if value.dtype != spec.dtype or not fits:
            raise ArtifactInvalid(
                reason, f"leaf {name!r} is {value.dtype}{list(value.shape)}, not {spec.dtype}{list(spec.shape)}"
            )
        check_size(name, value.nbytes)


def check_size(name: str, size: int) -> None:
    """Raises ArtifactInvalid (CHECKPOINT_TOO_LARGE) for a leaf of more than 500 MiB."""
    if size > MOST_TENSOR_BYTES:
        raise ArtifactInvalid(Reason.CHECKPOINT_TOO_LARGE, f"leaf {name!r} has {size} bytes, over {MOST_TENSOR_BYTES}")


def metric_leaf(stat_name: str) -> str:
    """The server checkpoint's leaf of a released metric (spec/artifacts.md 6.4)."""
    return f"metrics/{stat_name.removeprefix('server/')}"


def first_values(names: Sequence[str], values: Sequence[NDArray[Any]]) -> dict[str, float]:
    """Metrics as numbers: a tensor's first element, 0 for types that are none (spec/server.md 6.5)."""
    return {
        name: float(value.reshape(-1)[0]) if value.dtype.kind in "fiub" and value.size else 0.0
        for name, value in zip(names, values, strict=True)
    }


def with_metrics(server_checkpoint: bytes, metrics: Mapping[str, float]) -> bytes:
    """The checkpoint with a leaf for each metric, so that both are released together or not at all.

    A file that has them all, as the reference's graphs write it, stays as it is, byte for byte.
    """
    leaves = read_checkpoint(server_checkpoint)
    missing = {metric_leaf(name): np.array(value) for name, value in metrics.items() if metric_leaf(name) not in leaves}
    return write_checkpoint({**leaves, **missing}) if missing else server_checkpoint
