"""Checkpoints that come one after the other and differ in their values alone, as the updates of a task do."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.tensors.checkpoint import CheckpointLimits, StoredLeaf, stored_leaves, values_of
from fedcompute.tensors.table import CHECKSUM_BYTES, check_block, data_blocks

_MOST_FRAME_BYTES = 1 << 16


class CheckpointReader:
    """Reads checkpoints, each as `read_checkpoint` would, but copies no leaf that is not aligned.

    What surrounds the values is parsed once. Of a file that has the very same bytes there, all that is left to look at
    are the values and the checksums over them. Safe for threads.
    """

    def __init__(self, limits: CheckpointLimits) -> None:
        self._limits = limits
        self._layout: _Layout | None = None

    def read(self, data: bytes | memoryview) -> dict[str, NDArray[Any]]:
        """The leaves of a file; see `read_checkpoint`."""
        view = memoryview(data)
        layout = self._layout
        if layout is not None and layout.fits(view):
            for offset, size in layout.blocks:
                check_block(view, offset, size)
            stored = [(leaf, view[start:end]) for leaf, start, end in layout.values]
        else:
            stored = stored_leaves(view, self._limits)
            self._layout = _layout_of(view, stored)
        return {leaf.name: values_of(leaf, payload, align=False) for leaf, payload in stored}


@dataclass(frozen=True)
class _Layout:
    """A file without its values.

    `values`: the leaves with start and end of their bytes; `blocks`: offset and size of each block that has some;
    `places`, `frame`: where all other bytes lie, but for the checksums of those blocks, and what they are.
    """

    size: int
    values: tuple[tuple[StoredLeaf, int, int], ...]
    blocks: tuple[tuple[int, int], ...]
    places: NDArray[np.intp]
    frame: NDArray[np.uint8]

    def fits(self, data: memoryview) -> bool:
        return len(data) == self.size and np.array_equal(np.frombuffer(data, np.uint8).take(self.places), self.frame)


def _layout_of(data: memoryview, stored: Sequence[tuple[StoredLeaf, memoryview]]) -> _Layout | None:
    """The layout of a file that was found to be a checkpoint; None if its frame is more than is worth keeping."""
    flat = np.frombuffer(data, np.uint8)
    values = []
    for leaf, payload in stored:
        start = _address(np.frombuffer(payload, np.uint8)) - _address(flat) if len(payload) else 0
        values.append((leaf, start, start + len(payload)))
    spans = sorted((start, end) for _, start, end in values if start < end)
    every = data_blocks(data)
    offsets = [offset for offset, _ in every]
    blocks = [every[index] for index in sorted({bisect_right(offsets, start) - 1 for start, _ in spans})]
    checksums = [(offset + size + 1, offset + size + 1 + CHECKSUM_BYTES) for offset, size in blocks]
    left, at = [], 0
    for start, end in sorted([*spans, *checksums, (len(data), len(data))]):
        left.append((at, start))
        at = end
    if sum(end - start for start, end in left) > _MOST_FRAME_BYTES:
        return None
    places = np.concatenate([np.arange(start, end) for start, end in left])
    return _Layout(len(data), tuple(values), tuple(blocks), places, flat.take(places))


def _address(array: NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
