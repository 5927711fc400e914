"""The flatbuffer that devices run, made from a client graph: as it is, or lowered to operations that they have."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import tensorflow as tf

from fedcompute.builder.client_graph import INPUT_NAME, OUTPUT_NAME, TARGET_NAME, TOKEN_NAME
from fedcompute.builder.lower_ops import LowerOps
from fedcompute.builder.lowered_ops import FORMS, MISCONVERTED
from fedcompute.builder.lowering import lower
from fedcompute.builder.op_check import count_ops, flex_ops
from fedcompute.builder.tflite import convert, prune
from fedcompute.errors import BuildFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceGraph:
    """A flatbuffer, and in `lowered` what was lowered in it and at what cost; empty if nothing was."""

    flatbuffer: bytes
    lowered: str = ""


def device_graph(
    client_graph: tf.compat.v1.GraphDef, supported: Mapping[str, int] | None, choice: LowerOps
) -> DeviceGraph:
    """Converts a client graph, and lowers it if `choice` says so.

    `supported`: the table of the operator check, None if that is skipped. A graph that cannot be lowered, or that
    still fails the check afterwards, is the check's to refuse. Raises BuildFailed for a graph without a TFLite form.
    """
    pruned = prune(client_graph, TARGET_NAME)
    plain = _convert(pruned)
    offenders = flex_ops(plain).keys() - (supported.keys() if supported is not None else set())
    if choice is LowerOps.ALWAYS:
        wanted = frozenset(FORMS)
    elif choice is LowerOps.AUTO and supported is not None and offenders & FORMS.keys():
        wanted = frozenset(FORMS.keys() & offenders) | MISCONVERTED
    else:
        return DeviceGraph(plain)
    lowered = lower(pruned, TARGET_NAME, wanted)
    if not lowered.ops:
        return DeviceGraph(plain)
    try:
        flatbuffer = _convert(lowered.graph)
    except BuildFailed as error:
        logger.warning("The lowered graph does not convert, so the graph stays as it is: %s", error.detail)
        return DeviceGraph(plain)
    ops = ", ".join(f"{count} {op}" for op, count in lowered.ops.items())
    cost = (
        f"lowered to operations that devices have: {ops}; the device graph takes {len(flatbuffer):,} bytes instead of "
        f"{len(plain):,} and has {count_ops(flatbuffer):,} operations instead of {count_ops(plain):,}"
    )
    return DeviceGraph(flatbuffer, cost)


def _convert(graph: tf.compat.v1.GraphDef) -> bytes:
    return convert(graph, [TOKEN_NAME, INPUT_NAME, OUTPUT_NAME], TARGET_NAME)
