"""What a device makes of its delta before it reports: one entry per aggregator (spec/artifacts.md 9).

Formal guarantees of everything here: none that the server relies on. Float32 arithmetic may exceed a norm by about
1e-6 relative, and a device may run anything; the server checks and clips again before it adds.
"""

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from fedcompute.builder.client_work import Tensors, WorkResult
from fedcompute.learning.aggregators import BELOW_ESTIMATE, COUNT, DELTA, WEIGHT, ZEROED, Role

Sent = dict[Role, Tensors]
"""Role -> tensors in the order of the update file."""

Told = Sequence[tf.Tensor]
"""Broadcast leaves beside the model, in the order of the client checkpoint."""


def _uniform(result: WorkResult, told: Told) -> Sent:
    return {COUNT: (tf.constant(1, tf.int32),), DELTA: result.deltas}


def _weighted(result: WorkResult, told: Told) -> Sent:
    weight = result.weight
    return {DELTA: tuple(delta * weight for delta in result.deltas), WEIGHT: (weight,)}


def _fixed_gaussian(result: WorkResult, told: Told) -> Sent:
    (clip_norm,) = told
    return {DELTA: _clipped(result.deltas, clip_norm)}


def _adaptive_gaussian(result: WorkResult, told: Told) -> Sent:
    return _with_bit(result.deltas, told)


def _tree(result: WorkResult, told: Told) -> Sent:
    zeroing_norm, clip_norm = told
    deltas, zeroed = _zeroed(result.deltas, zeroing_norm)
    return {DELTA: _clipped(deltas, clip_norm), ZEROED: (zeroed,)}


def _adaptive_tree(result: WorkResult, told: Told) -> Sent:
    deltas, zeroed = _zeroed(result.deltas, told[0])
    return {**_with_bit(deltas, told[1:]), ZEROED: (zeroed,)}


POSTPROCESSORS: Mapping[str, Callable[[WorkResult, Told], Sent]] = {
    "uniform_mean": _uniform,
    "weighted_mean": _weighted,
    "fixed_gaussian": _fixed_gaussian,
    "adaptive_gaussian": _adaptive_gaussian,
    "tree_aggregation": _tree,
    "adaptive_tree": _adaptive_tree,
    # The device's half is the same: only the server's noise differs.
    "banded_mf": _fixed_gaussian,
}


def _clipped(deltas: Tensors, clip_norm: tf.Tensor) -> Tensors:
    """The whole update scaled to an L2 norm of at most `clip_norm`."""
    clipped, _ = tf.clip_by_global_norm(deltas, clip_norm)
    return tuple(clipped)


def _with_bit(deltas: Tensors, told: Told) -> Sent:
    """The clipped update, and whether its norm was within the current estimate, as plus or minus one half."""
    clip_norm, estimate, bit_bound = told
    below = tf.where(tf.linalg.global_norm(deltas) <= estimate, 0.5, -0.5)
    bit = tf.maximum(-bit_bound, tf.minimum(below, bit_bound))
    return {DELTA: _clipped(deltas, clip_norm), BELOW_ESTIMATE: (bit,)}


def _zeroed(deltas: Tensors, zeroing_norm: tf.Tensor) -> tuple[Tensors, tf.Tensor]:
    """Zeros in place of an update with an element above `zeroing_norm`, and whether that was so, as int32."""
    largest = tf.reduce_max(tf.stack([tf.reduce_max(tf.abs(delta)) for delta in deltas]))
    large = largest > zeroing_norm
    kept = tuple(tf.where(large, tf.zeros_like(delta), delta) for delta in deltas)
    return kept, tf.cast(large, tf.int32)
