"""TFLite's builtin operations as TensorFlow graph operations: a table.

Each entry takes a `Call` and gives the operation's outputs, one tensor or a list. Activations fused into an
operation are applied by the caller, for every entry alike. Control flow (IF, WHILE) is the translator's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fedcompute.device.plans.flatbuffer import FlatTensor

raw = tf.raw_ops


@dataclass(frozen=True)
class Call:
    """Operands of one operation: input tensors (None = absent), the schema's options, declared outputs."""

    inputs: list[Any]
    options: Any
    outputs: tuple[FlatTensor, ...]


Build = Callable[[Call], Any]


def _of(function: Callable[..., Any]) -> Build:
    """An operation without options: the inputs are the arguments."""
    return lambda call: function(*call.inputs)


def _reduce(function: Callable[..., Any]) -> Build:
    return lambda call: function(call.inputs[0], axis=call.inputs[1], keepdims=call.options.keepDims)


def _fully_connected(call: Call) -> Any:
    x, weights = call.inputs[:2]
    depth = weights.shape[1] if weights.shape.rank == 2 else None
    if x.shape.rank != 2 or depth is None or x.shape[1] != depth:
        x = tf.reshape(x, [-1, tf.shape(weights)[1] if depth is None else depth])
    product = tf.linalg.matmul(x, weights, transpose_b=True)
    if call.options.keepNumDims and call.inputs[0].shape.rank != 2:
        product = tf.reshape(product, tf.concat([tf.shape(call.inputs[0])[:-1], tf.shape(weights)[:1]], 0))
    return _with_bias(product, call.inputs, 2)


def _with_bias(value: Any, inputs: list[Any], index: int) -> Any:
    bias = inputs[index] if len(inputs) > index else None
    # The converter fills in zeros where there is no bias.
    constant = None if bias is None else tf.get_static_value(bias)
    if bias is None or (constant is not None and not constant.any()):
        return value
    return _sum(value, bias)


def _sum(x: Any, y: Any) -> Any:
    """x + y, as a bias where one is a vector along the other's last dimension: TensorFlow fuses those."""
    for value, bias in ((x, y), (y, x)):
        wide = value.shape.rank is not None and value.shape.rank > 1 and value.dtype.is_floating
        if wide and bias.shape.rank == 1 and bias.shape[0] is not None and bias.shape[0] == value.shape[-1]:
            return tf.nn.bias_add(value, bias)
    return tf.add(x, y)


def _padding(options: Any) -> str:
    return "VALID" if options.padding else "SAME"


def _strides(options: Any) -> list[int]:
    return [1, options.strideH, options.strideW, 1]


def _conv_2d(call: Call) -> Any:
    x, weights = call.inputs[:2]
    options = call.options
    value = raw.Conv2D(
        input=x,
        filter=tf.transpose(weights, [1, 2, 3, 0]),  # stored output channels first
        strides=_strides(options),
        padding=_padding(options),
        dilations=[1, options.dilationHFactor, options.dilationWFactor, 1],
    )
    return _with_bias(value, call.inputs, 2)


def _depthwise_conv_2d(call: Call) -> Any:
    x, weights = call.inputs[:2]
    options = call.options
    shape = tf.shape(weights)  # [1, height, width, channels * multiplier]
    value = raw.DepthwiseConv2dNative(
        input=x,
        filter=tf.reshape(weights, [shape[1], shape[2], -1, options.depthMultiplier]),
        strides=_strides(options),
        padding=_padding(options),
        dilations=[1, options.dilationHFactor, options.dilationWFactor, 1],
    )
    return _with_bias(value, call.inputs, 2)


def _transpose_conv(call: Call) -> Any:
    shape, weights, x = call.inputs[:3]
    value = raw.Conv2DBackpropInput(
        input_sizes=shape,
        filter=tf.transpose(weights, [1, 2, 0, 3]),
        out_backprop=x,
        strides=_strides(call.options),
        padding=_padding(call.options),
    )
    return _with_bias(value, call.inputs, 3)


def _volume(options: Any) -> dict[str, Any]:
    return {
        "strides": [1, options.strideD, options.strideH, options.strideW, 1],
        "padding": _padding(options),
        "dilations": [1, options.dilationDFactor, options.dilationHFactor, options.dilationWFactor, 1],
    }


def _conv_3d(call: Call) -> Any:
    value = raw.Conv3D(input=call.inputs[0], filter=call.inputs[1], **_volume(call.options))
    return _with_bias(value, call.inputs, 2)


def _conv_3d_transpose(call: Call) -> Any:
    shape, weights, x = call.inputs[:3]
    value = raw.Conv3DBackpropInputV2(input_sizes=shape, filter=weights, out_backprop=x, **_volume(call.options))
    return _with_bias(value, call.inputs, 3)


def _pool(function: Callable[..., Any], argument: str) -> Build:
    def build(call: Call) -> Any:
        options = call.options
        window = [1, options.filterHeight, options.filterWidth, 1]
        return function(
            **{argument: call.inputs[0]}, ksize=window, strides=_strides(options), padding=_padding(options)
        )

    return build


def _strided_slice(call: Call) -> Any:
    x, begin, end, strides = call.inputs
    options = call.options
    return raw.StridedSlice(
        input=x,
        begin=begin,
        end=begin + end if getattr(options, "offset", False) else end,
        strides=strides,
        begin_mask=options.beginMask,
        end_mask=options.endMask,
        ellipsis_mask=options.ellipsisMask,
        new_axis_mask=options.newAxisMask,
        shrink_axis_mask=options.shrinkAxisMask,
    )


def _reshape(call: Call) -> Any:
    x = call.inputs[0]
    shape = call.inputs[1] if len(call.inputs) > 1 else [int(size) for size in call.options.newShape]
    return tf.reshape(x, shape)


def _squeeze(call: Call) -> Any:
    dims = call.options.squeezeDims
    return tf.squeeze(call.inputs[0], axis=None if dims is None or len(dims) == 0 else [int(d) for d in dims])


def _resize(function: Callable[..., Any]) -> Build:
    return lambda call: function(
        images=call.inputs[0],
        size=call.inputs[1],
        align_corners=call.options.alignCorners,
        half_pixel_centers=call.options.halfPixelCenters,
    )


def _random(function: Callable[..., Any]) -> Build:
    return lambda call: function(
        shape=call.inputs[0], dtype=call.outputs[0].dtype, seed=call.options.seed, seed2=call.options.seed2
    )


def _multinomial(call: Call) -> Any:
    return raw.Multinomial(
        logits=call.inputs[0],
        num_samples=call.inputs[1],
        seed=call.options.seed,
        seed2=call.options.seed2,
        output_dtype=call.outputs[0].dtype,
    )


def _arg(function: Callable[..., Any]) -> Build:
    return lambda call: function(call.inputs[0], axis=call.inputs[1], output_type=call.outputs[0].dtype)


BUILTINS: Mapping[str, Build] = {
    # Arithmetic
    "ABS": _of(tf.abs),
    "ADD": _of(_sum),
    "ADD_N": lambda call: tf.add_n(call.inputs),
    "ATAN2": _of(tf.atan2),
    "BITCAST": lambda call: tf.bitcast(call.inputs[0], call.outputs[0].dtype),
    "BITWISE_XOR": _of(tf.bitwise.bitwise_xor),
    "CEIL": _of(tf.math.ceil),
    "COMPLEX_ABS": _of(tf.abs),
    "COS": _of(tf.cos),
    "CUMSUM": lambda call: tf.cumsum(
        call.inputs[0], call.inputs[1], exclusive=call.options.exclusive, reverse=call.options.reverse
    ),
    "DIV": lambda call: raw.Div(x=call.inputs[0], y=call.inputs[1]),
    "EXP": _of(tf.exp),
    "FLOOR": _of(tf.floor),
    "FLOOR_DIV": _of(tf.math.floordiv),
    "FLOOR_MOD": _of(tf.math.floormod),
    "IMAG": _of(tf.math.imag),
    "LOG": _of(tf.math.log),
    "MAXIMUM": _of(tf.maximum),
    "MINIMUM": _of(tf.minimum),
    "MUL": _of(tf.multiply),
    "NEG": _of(tf.negative),
    "POW": _of(tf.pow),
    "REAL": _of(tf.math.real),
    "RFFT2D": _of(tf.signal.rfft2d),
    "RIGHT_SHIFT": _of(tf.bitwise.right_shift),
    "ROUND": _of(tf.round),
    "RSQRT": _of(tf.math.rsqrt),
    "SIGN": _of(tf.sign),
    "SIN": _of(tf.sin),
    "SQRT": _of(tf.sqrt),
    "SQUARE": _of(tf.square),
    "SQUARED_DIFFERENCE": _of(tf.math.squared_difference),
    "SUB": _of(tf.subtract),
    # Comparison and logic
    "EQUAL": _of(tf.equal),
    "GREATER": _of(tf.greater),
    "GREATER_EQUAL": _of(tf.greater_equal),
    "LESS": _of(tf.less),
    "LESS_EQUAL": _of(tf.less_equal),
    "LOGICAL_AND": _of(tf.logical_and),
    "LOGICAL_NOT": _of(tf.logical_not),
    "LOGICAL_OR": _of(tf.logical_or),
    "NOT_EQUAL": _of(tf.not_equal),
    "SELECT": lambda call: raw.Select(condition=call.inputs[0], x=call.inputs[1], y=call.inputs[2]),
    "SELECT_V2": lambda call: raw.SelectV2(condition=call.inputs[0], t=call.inputs[1], e=call.inputs[2]),
    "WHERE": lambda call: tf.where(call.inputs[0]),
    # Reduction
    "ARG_MAX": _arg(tf.argmax),
    "ARG_MIN": _arg(tf.argmin),
    "MEAN": _reduce(tf.reduce_mean),
    "REDUCE_ALL": _reduce(tf.reduce_all),
    "REDUCE_ANY": _reduce(tf.reduce_any),
    "REDUCE_MAX": _reduce(tf.reduce_max),
    "REDUCE_MIN": _reduce(tf.reduce_min),
    "REDUCE_PROD": _reduce(tf.reduce_prod),
    "SUM": _reduce(tf.reduce_sum),
    "SEGMENT_SUM": _of(tf.math.segment_sum),
    "UNSORTED_SEGMENT_MAX": _of(tf.math.unsorted_segment_max),
    "UNSORTED_SEGMENT_MIN": _of(tf.math.unsorted_segment_min),
    "UNSORTED_SEGMENT_PROD": _of(tf.math.unsorted_segment_prod),
    "UNSORTED_SEGMENT_SUM": _of(tf.math.unsorted_segment_sum),
    # Shapes and indexing
    "BATCH_TO_SPACE_ND": _of(tf.batch_to_space),
    "BROADCAST_ARGS": _of(tf.broadcast_dynamic_shape),
    "BROADCAST_TO": _of(tf.broadcast_to),
    "BUCKETIZE": lambda call: raw.Bucketize(
        input=call.inputs[0], boundaries=[float(bound) for bound in call.options.boundaries]
    ),
    "CAST": lambda call: tf.cast(call.inputs[0], call.outputs[0].dtype),
    "CONCATENATION": lambda call: tf.concat(call.inputs, call.options.axis),
    "DEPTH_TO_SPACE": lambda call: tf.nn.depth_to_space(call.inputs[0], call.options.blockSize),
    "EMBEDDING_LOOKUP": lambda call: tf.gather(call.inputs[1], call.inputs[0]),
    "EXPAND_DIMS": _of(tf.expand_dims),
    "FILL": _of(tf.fill),
    "GATHER": lambda call: tf.gather(
        call.inputs[0], call.inputs[1], axis=call.options.axis, batch_dims=call.options.batchDims
    ),
    "GATHER_ND": _of(tf.gather_nd),
    "MATRIX_DIAG": _of(tf.linalg.diag),
    "MATRIX_SET_DIAG": _of(tf.linalg.set_diag),
    "MIRROR_PAD": lambda call: tf.pad(*call.inputs, mode="SYMMETRIC" if call.options.mode else "REFLECT"),
    "ONE_HOT": lambda call: tf.one_hot(*call.inputs, axis=call.options.axis),
    "PACK": lambda call: tf.stack(call.inputs, axis=call.options.axis),
    "PAD": _of(tf.pad),
    "PADV2": lambda call: tf.pad(call.inputs[0], call.inputs[1], constant_values=call.inputs[2]),
    "RANGE": _of(tf.range),
    "RANK": _of(tf.rank),
    "RESHAPE": _reshape,
    "REVERSE_SEQUENCE": lambda call: tf.reverse_sequence(
        call.inputs[0], call.inputs[1], seq_axis=call.options.seqDim, batch_axis=call.options.batchDim
    ),
    "REVERSE_V2": _of(tf.reverse),
    "SCATTER_ND": _of(tf.scatter_nd),
    "SHAPE": lambda call: tf.shape(call.inputs[0], out_type=call.outputs[0].dtype),
    "SLICE": _of(tf.slice),
    "SPACE_TO_BATCH_ND": _of(tf.space_to_batch),
    "SPACE_TO_DEPTH": lambda call: tf.nn.space_to_depth(call.inputs[0], call.options.blockSize),
    "SPARSE_TO_DENSE": lambda call: raw.SparseToDense(
        sparse_indices=call.inputs[0],
        output_shape=call.inputs[1],
        sparse_values=call.inputs[2],
        default_value=call.inputs[3],
        validate_indices=False,
    ),
    "SPLIT": lambda call: tf.split(call.inputs[1], call.options.numSplits, axis=call.inputs[0]),
    "SPLIT_V": lambda call: raw.SplitV(
        value=call.inputs[0], size_splits=call.inputs[1], axis=call.inputs[2], num_split=call.options.numSplits
    ),
    "SQUEEZE": _squeeze,
    "STRIDED_SLICE": _strided_slice,
    "TILE": _of(tf.tile),
    "TOPK_V2": lambda call: list(tf.math.top_k(call.inputs[0], call.inputs[1])),
    "TRANSPOSE": _of(tf.transpose),
    "UNIQUE": lambda call: list(tf.unique(call.inputs[0], out_idx=call.outputs[1].dtype)),
    "UNPACK": lambda call: tf.unstack(call.inputs[0], call.options.num, axis=call.options.axis),
    "ZEROS_LIKE": _of(tf.zeros_like),
    # Neural networks
    "AVERAGE_POOL_2D": _pool(raw.AvgPool, "value"),
    "BATCH_MATMUL": lambda call: tf.linalg.matmul(
        call.inputs[0], call.inputs[1], adjoint_a=call.options.adjX, adjoint_b=call.options.adjY
    ),
    "CONV_2D": _conv_2d,
    "CONV_3D": _conv_3d,
    "CONV_3D_TRANSPOSE": _conv_3d_transpose,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "ELU": _of(tf.nn.elu),
    "FULLY_CONNECTED": _fully_connected,
    "GELU": lambda call: tf.nn.gelu(call.inputs[0], approximate=call.options.approximate),
    "HARD_SWISH": lambda call: call.inputs[0] * tf.nn.relu6(call.inputs[0] + 3.0) / 6.0,
    "L2_NORMALIZATION": lambda call: tf.math.l2_normalize(call.inputs[0], axis=-1),
    "LEAKY_RELU": lambda call: tf.nn.leaky_relu(call.inputs[0], alpha=call.options.alpha),
    "LOCAL_RESPONSE_NORMALIZATION": lambda call: tf.nn.local_response_normalization(
        call.inputs[0], call.options.radius, call.options.bias, call.options.alpha, call.options.beta
    ),
    "LOGISTIC": _of(tf.sigmoid),
    "LOG_SOFTMAX": _of(tf.nn.log_softmax),
    "MAX_POOL_2D": _pool(raw.MaxPool, "input"),
    "MULTINOMIAL": _multinomial,
    "PRELU": lambda call: tf.nn.relu(call.inputs[0]) + call.inputs[1] * tf.minimum(call.inputs[0], 0.0),
    "RANDOM_STANDARD_NORMAL": _random(raw.RandomStandardNormal),
    "RANDOM_UNIFORM": _random(raw.RandomUniform),
    "RELU": _of(tf.nn.relu),
    "RELU6": _of(tf.nn.relu6),
    "RELU_0_TO_1": lambda call: tf.clip_by_value(call.inputs[0], 0.0, 1.0),
    "RELU_N1_TO_1": lambda call: tf.clip_by_value(call.inputs[0], -1.0, 1.0),
    "RESIZE_BILINEAR": _resize(raw.ResizeBilinear),
    "RESIZE_NEAREST_NEIGHBOR": _resize(raw.ResizeNearestNeighbor),
    "SOFTMAX": lambda call: tf.nn.softmax(call.inputs[0] * call.options.beta),
    "TANH": _of(tf.tanh),
    "TRANSPOSE_CONV": _transpose_conv,
}

ACTIVATIONS: Mapping[int, Callable[[Any], Any]] = {
    0: lambda value: value,
    1: tf.nn.relu,
    2: lambda value: tf.clip_by_value(value, -1.0, 1.0),
    3: tf.nn.relu6,
    4: tf.tanh,
}
