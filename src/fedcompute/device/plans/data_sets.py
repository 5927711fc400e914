"""Data sets over a run's examples as loops of the graph itself (spec/artifacts.md 4, 16.5).

TensorFlow's own data sets compile their functions anew in every run, which takes as long as dozens of training steps; a
loop is compiled once per session.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

Element = list[Any]


@dataclass(frozen=True)
class DataSet:
    """How many elements a data set has, how to compute one, and the same as TensorFlow's data set.

    `count`: int64 scalar. `element`: of an int64 scalar, the number of the element. `handle`: makes a variant tensor,
    for operations that want one. `plain`: whether element i is example i itself, as a string scalar.
    """

    count: Any
    element: Callable[[Any], Element]
    handle: Callable[[], Any]
    plain: bool = False


def source(examples: Any) -> DataSet:
    """The examples, a string vector, one by one."""
    return DataSet(
        count=tf.size(examples, out_type=tf.int64),
        element=lambda number: [examples[number]],
        handle=lambda: tf.raw_ops.TensorSliceDataset(components=[examples], output_shapes=[[]]),
        plain=True,
    )


def take(data: DataSet, count: Any, handle: Callable[[], Any]) -> DataSet:
    """The first `count` elements, all of them if it is negative."""
    taken = tf.where(count < 0, data.count, tf.minimum(data.count, count))
    return DataSet(taken, data.element, handle, data.plain)


def batch(data: DataSet, examples: Any, size: Any, drop_remainder: Any, handle: Callable[[], Any]) -> DataSet | None:
    """Vectors of `size` examples; None where elements are no plain examples or the size is no positive constant."""
    if not data.plain or (tf.get_static_value(size) or 0) < 1:
        return None
    whole = data.count // size
    count = tf.where(drop_remainder, whole, whole + tf.cast(data.count > whole * size, tf.int64))

    def element(number: Any) -> Element:
        start = number * size
        return [examples[start : tf.minimum(start + size, data.count)]]

    return DataSet(count, element, handle)


def mapped(data: DataSet, function: Callable[[Element], Element], handle: Callable[[], Any]) -> DataSet:
    """`function` of each element."""
    return DataSet(data.count, lambda number: function(data.element(number)), handle)


def reduced(
    data: DataSet, start: Sequence[Any], function: Callable[[Element, Element], Element], shapes: Sequence[Any]
) -> Element:
    """The state after `function(state, element)` of every element in turn; `shapes` hold for it throughout."""

    def turn(number: Any, *state: Any) -> tuple[Any, ...]:
        return (number + 1, *shaped(function(list(state), data.element(number)), shapes))

    _, *state = tf.while_loop(
        lambda number, *_: number < data.count,
        turn,
        (tf.constant(0, tf.int64), *start),
        shape_invariants=(tf.TensorShape([]), *shapes),
        parallel_iterations=1,
    )
    return list(state)


def shaped(values: Sequence[Any], shapes: Sequence[Any]) -> Element:
    """The values with static shapes of at least `shapes`; one that turns out otherwise fails the run."""
    return [
        value if value.shape.is_subtype_of(shape) else tf.ensure_shape(value, shape)
        for value, shape in zip(values, shapes, strict=True)
    ]
