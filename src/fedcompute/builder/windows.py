"""Sliding windows over images as slices, pads and sums: what convolution and pooling gradients are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf


@dataclass(frozen=True)
class Axis:
    """The windows along one spatial dimension; all sizes in elements."""

    size: int  # of the image
    count: int  # of windows
    kernel: int
    stride: int
    dilation: int
    before: int  # padding in front of the image

    @property
    def blocks(self) -> int:
        """How many runs of `stride` elements the windows touch, from the first window's first element on."""
        return self.count + (self.kernel - 1) * self.dilation // self.stride


def axis(
    size: int,
    kernel: int,
    stride: int,
    dilation: int = 1,
    *,
    padding: str = "VALID",
    explicit: tuple[int, int] = (0, 0),
) -> Axis:
    """The windows that TensorFlow lays over `size` elements; `explicit` counts for padding "EXPLICIT" only."""
    extent = (kernel - 1) * dilation + 1
    if padding == "SAME":
        count = -(-size // stride)
        before = max((count - 1) * stride + extent - size, 0) // 2
        return Axis(size, count, kernel, stride, dilation, before)
    before, after = explicit if padding == "EXPLICIT" else (0, 0)
    return Axis(size, (before + size + after - extent) // stride + 1, kernel, stride, dilation, before)


def taps(image: tf.Tensor, rows: Axis, columns: Axis, fill: float = 0.0) -> list[list[tf.Tensor]]:
    """Per window element (row, column) what all windows see there, each [batch, rows.count, columns.count, channels].

    `image` is [batch, rows.size, columns.size, channels]; outside of it windows see `fill`.
    """
    channels = image.shape[-1]
    back = [-1, rows.count, columns.count, channels]
    lines = see(tf.reshape(image, [-1, rows.size, columns.size * channels]), rows, fill)
    return [
        [tf.reshape(part, back) for part in see(tf.reshape(line, [-1, columns.size, channels]), columns, fill)]
        for line in lines
    ]


def scatter(parts: Sequence[Sequence[tf.Tensor]], rows: Axis, columns: Axis) -> tf.Tensor:
    """The transpose of `taps`: adds every part to the elements that it was seen at.

    `parts[row][column]` is [batch, rows.count, columns.count, channels], channels known; the result has the image's
    shape. What lies outside the image is dropped.
    """
    channels = parts[0][0].shape[-1]
    lines = []
    for row in parts:
        flat = [tf.reshape(part, [-1, columns.count, channels]) for part in row]
        lines.append(tf.reshape(_place(flat, columns), [-1, rows.count, columns.size * channels]))
    return tf.reshape(_place(lines, rows), [-1, rows.size, columns.size, channels])


def see(line: tf.Tensor, a: Axis, fill: float = 0.0) -> list[tf.Tensor]:
    """Per window element what all windows over `line` [n, a.size, inner] see there, each [n, a.count, inner]."""
    inner = line.shape[-1]
    after = a.blocks * a.stride - a.before - a.size
    if after < 0:
        line = line[:, : a.size + after]
    if a.before > 0 or after > 0:
        line = tf.pad(line, [[0, 0], [a.before, max(after, 0)], [0, 0]], constant_values=fill)
    # A slice with steps copies number by number; with the elements of a stride side by side it copies rows.
    line = tf.reshape(line, [-1, a.blocks, a.stride * inner])
    seen = []
    for index in range(a.kernel):
        shift, phase = divmod(index * a.dilation, a.stride)
        part = line if a.blocks == a.count else line[:, shift : shift + a.count]
        seen.append(part if a.stride == 1 else part[:, :, phase * inner : (phase + 1) * inner])
    return seen


def _place(parts: Sequence[tf.Tensor], a: Axis) -> tf.Tensor:
    """The transpose of `see`: adds up parts [n, a.count, inner] into [n, a.size, inner]."""
    inner = parts[0].shape[-1]
    phases: dict[int, tf.Tensor] = {}
    for index, part in enumerate(parts):
        shift, phase = divmod(index * a.dilation, a.stride)
        pads = [[0, 0], [shift, a.blocks - a.count - shift], [0, 0]]
        shifted = part if a.blocks == a.count else tf.pad(part, pads)
        phases[phase] = phases[phase] + shifted if phase in phases else shifted
    empty = tf.zeros_like(phases[0])
    whole = phases[0] if a.stride == 1 else tf.concat([phases.get(phase, empty) for phase in range(a.stride)], 2)
    whole = tf.reshape(whole, [-1, a.blocks * a.stride, inner])
    missing = a.before + a.size - a.blocks * a.stride
    if missing > 0:
        whole = tf.pad(whole, [[0, 0], [0, missing], [0, 0]])
    return whole if whole.shape[1] == a.size else whole[:, a.before : a.before + a.size]
