"""Operations that phones lack, written with those that they have: one entry per operation (spec/artifacts.md 16.9).

A form takes the operation, for its attributes, and its input tensors, and gives its outputs; None where it has no form
for these attributes or shapes, and then the operation stays. Shapes other than the batch must be known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from fedcompute.builder.windows import Axis, axis, scatter, see, taps

Outputs = Sequence[tf.Tensor] | None
Form = Callable[..., Outputs]


def _sizes(tensor: tf.Tensor) -> list[Any] | None:
    """The value of a shape vector as far as the graph knows it, None for what it does not."""
    if tensor.op.type in ("Shape", "ShapeN"):
        shape = tensor.op.inputs[tensor.value_index].shape
        return None if shape.rank is None else list(shape)
    value = tf.get_static_value(tensor)
    return None if value is None else [int(size) for size in value]


def _windows(op: tf.Operation, image: Sequence[Any], kernel: Sequence[Any]) -> tuple[Axis, Axis] | None:
    """The windows of a convolution or pooling `op` over `image` [batch, rows, columns, channels]."""
    strides = op.get_attr("strides")
    dilations = _attribute(op, "dilations") or [1, 1, 1, 1]
    explicit = _attribute(op, "explicit_paddings") or [0] * 8
    channels_last = op.get_attr("data_format") == b"NHWC"
    if not channels_last or len(image) != 4 or None in (*image[1:], *kernel) or strides[0] != 1 or strides[3] != 1:
        return None
    padding = op.get_attr("padding").decode()
    rows, columns = (
        axis(
            image[i],
            kernel[i - 1],
            strides[i],
            dilations[i],
            padding=padding,
            explicit=(explicit[2 * i], explicit[2 * i + 1]),
        )
        for i in (1, 2)
    )
    return rows, columns


def _attribute(op: tf.Operation, name: str) -> Any:
    return op.get_attr(name) if name in op.node_def.attr else None


def _shape(tensor: tf.Tensor) -> list[Any]:
    return [] if tensor.shape.rank is None else list(tensor.shape)


def _conv_2d_backprop_filter(op: tf.Operation, image: tf.Tensor, sizes: tf.Tensor, gradient: tf.Tensor) -> Outputs:
    kernel = _sizes(sizes)
    if kernel is None or None in kernel or (windows := _windows(op, _shape(image), kernel[:2])) is None:
        return None
    rows, columns = windows
    inputs, outputs = kernel[2:]
    groups = image.shape[3] // inputs

    def one(image: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        width = columns.kernel * inputs
        across = tf.concat(see(tf.reshape(image, [-1, columns.size, inputs]), columns), 2)
        lines = see(tf.reshape(across, [-1, rows.size, columns.count * width]), rows)
        patches = tf.concat([tf.reshape(line, [-1, rows.count, columns.count, width]) for line in lines], 3)
        product = tf.matmul(_channels_first(patches), _channels_first(gradient), transpose_b=True)
        return tf.reshape(product, [rows.kernel, columns.kernel, inputs, outputs // groups])

    gradient = tf.reshape(gradient, [-1, rows.count, columns.count, outputs])
    if groups == 1:
        return [one(image, gradient)]
    parts = zip(_split(image, groups), _split(gradient, groups), strict=True)
    return [tf.concat([one(*part) for part in parts], 3)]


def _channels_first(image: tf.Tensor) -> tf.Tensor:
    """[batch, rows, columns, channels] as [channels, batch * rows * columns].

    A transposition of four dimensions is one that the converter cannot fold into a matrix product. It would make it a
    BATCH_MATMUL, which TFLite computes up to twenty times slower than FULLY_CONNECTED.
    """
    return tf.reshape(tf.transpose(image, [3, 0, 1, 2]), [image.shape[3], -1])


def _split(tensor: tf.Tensor, groups: int) -> list[tf.Tensor]:
    width = tensor.shape[-1] // groups
    return [tensor[..., start : start + width] for start in range(0, groups * width, width)]


def _conv_2d_backprop_input(op: tf.Operation, sizes: tf.Tensor, weights: tf.Tensor, gradient: tf.Tensor) -> Outputs:
    image = _sizes(sizes)
    if image is None or not weights.shape.is_fully_defined():
        return None
    if (windows := _windows(op, image, _shape(weights)[:2])) is None:
        return None
    groups = image[3] // weights.shape[2]
    if groups == 1 and op.get_attr("dilations") == [1, 1, 1, 1] and op.get_attr("padding") != b"EXPLICIT":
        return None  # a transposed convolution, which devices have

    def one(gradient: tf.Tensor, weights: tf.Tensor) -> list[list[tf.Tensor]]:
        kernel_rows, kernel_columns, inputs, outputs = weights.shape
        flat = tf.reshape(gradient, [-1, outputs])
        back = [windows[0].count, windows[1].count, inputs]
        return [
            [
                tf.reshape(tf.matmul(flat, weights[row, column], transpose_b=True), [-1, *back])
                for column in range(kernel_columns)
            ]
            for row in range(kernel_rows)
        ]

    parts = zip(_split(gradient, groups), _split(weights, groups), strict=True)
    return [tf.concat([scatter(one(*part), *windows) for part in parts], 3)]


def _depthwise_backprop_filter(op: tf.Operation, image: tf.Tensor, sizes: tf.Tensor, gradient: tf.Tensor) -> Outputs:
    kernel = _sizes(sizes)
    if kernel is None or None in kernel or (windows := _windows(op, _shape(image), kernel[:2])) is None:
        return None
    rows, columns, channels, multiplier = kernel
    flat = tf.reshape(gradient, [-1, channels, multiplier])
    sums = [tf.reduce_sum(tf.reshape(tap, [-1, channels, 1]) * flat, 0) for row in taps(image, *windows) for tap in row]
    return [tf.reshape(tf.stack(sums), [rows, columns, channels, multiplier])]


def _depthwise_backprop_input(op: tf.Operation, sizes: tf.Tensor, weights: tf.Tensor, gradient: tf.Tensor) -> Outputs:
    image = _sizes(sizes)
    if image is None or not weights.shape.is_fully_defined():
        return None
    if (windows := _windows(op, image, _shape(weights)[:2])) is None:
        return None
    rows, columns, channels, multiplier = weights.shape
    flat = tf.reshape(gradient, [-1, channels, multiplier])
    back = [-1, windows[0].count, windows[1].count, channels]
    parts = [
        [tf.reshape(tf.reduce_sum(flat * weights[row, column], -1), back) for column in range(columns)]
        for row in range(rows)
    ]
    return [scatter(parts, *windows)]


def _max_pool_grad(op: tf.Operation, image: tf.Tensor, pooled: tf.Tensor, gradient: tf.Tensor) -> Outputs:
    ksize = op.get_attr("ksize")
    windows = _windows(op, _shape(image), ksize[1:3])
    if windows is None or ksize[0] != 1 or ksize[3] != 1:
        return None
    parts: list[list[tf.Tensor]] = []
    # Of equal maxima the first takes all, so a window's gradient is gone once it has been given.
    left = gradient
    for row in taps(image, *windows, fill=float("-inf")):
        parts.append([])
        for tap in row:
            given = tf.cast(tf.equal(tap, pooled), left.dtype) * left
            parts[-1].append(given)
            left = left - given
    return [scatter(parts, *windows)]


def _avg_pool_grad(op: tf.Operation, sizes: tf.Tensor, gradient: tf.Tensor) -> Outputs:
    image, ksize = _sizes(sizes), op.get_attr("ksize")
    windows = None if image is None else _windows(op, image, ksize[1:3])
    if windows is None or ksize[0] != 1 or ksize[3] != 1:
        return None
    rows, columns = windows
    # A mean is over the elements inside the image.
    inside = [
        [sum(0 <= n * a.stride + k - a.before < a.size for k in range(a.kernel)) for n in range(a.count)]
        for a in windows
    ]
    counts = tf.constant([[[[float(r * c)] for c in inside[1]] for r in inside[0]]], gradient.dtype)
    part = gradient / counts
    return [scatter([[part] * columns.kernel] * rows.kernel, rows, columns)]


def _sparse_cross_entropy(op: tf.Operation, logits: tf.Tensor, labels: tf.Tensor) -> Outputs:
    classes = logits.shape[-1]
    if classes is None:
        return None
    hit = tf.equal(tf.expand_dims(labels, 1), tf.range(classes, dtype=labels.dtype))
    hot = tf.cast(hit, logits.dtype)
    # A label that is no class fails in TensorFlow's kernel. Here 0 / 0 makes its row NaN, and the device then sends
    # zeros, instead of training on an example without a label.
    known = tf.reduce_sum(hot, -1)
    log_likelihood = tf.nn.log_softmax(logits)
    loss = -tf.reduce_sum(tf.where(hit, log_likelihood, tf.zeros_like(log_likelihood)), -1) / known
    return [loss, tf.nn.softmax(logits) - hot / tf.expand_dims(known, 1)]


def _relu6_grad(op: tf.Operation, gradient: tf.Tensor, features: tf.Tensor) -> Outputs:
    passes = tf.logical_and(features > 0, features < 6)
    return [tf.where(passes, gradient, tf.zeros_like(gradient))]


def _leaky_relu_grad(op: tf.Operation, gradient: tf.Tensor, features: tf.Tensor) -> Outputs:
    return [tf.where(features > 0, gradient, gradient * op.get_attr("alpha"))]


def _elu_grad(op: tf.Operation, gradient: tf.Tensor, outputs: tf.Tensor) -> Outputs:
    return [tf.where(outputs < 0, gradient * (outputs + 1), gradient)]


_SELU_SCALE = 1.0507009873554805  # Klambauer et al., arXiv 1706.02515: the fixed point of zero mean, unit variance
_SELU_ALPHA = 1.6732632423543772


def _selu_grad(op: tf.Operation, gradient: tf.Tensor, outputs: tf.Tensor) -> Outputs:
    low = gradient * (outputs + _SELU_SCALE * _SELU_ALPHA)
    return [tf.where(outputs < 0, low, gradient * _SELU_SCALE)]


def _softsign_grad(op: tf.Operation, gradient: tf.Tensor, features: tf.Tensor) -> Outputs:
    return [gradient / tf.square(tf.abs(features) + 1)]


# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
_ERF_P = 0.3275911
_ERF_SERIES = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _erfc_of_magnitude(x: tf.Tensor) -> tf.Tensor:
    t = 1 / (1 + _ERF_P * tf.abs(x))
    series = tf.zeros_like(x)
    for coefficient in reversed(_ERF_SERIES):
        series = (series + coefficient) * t
    return series * tf.exp(-tf.square(x))


def _erf(op: tf.Operation, x: tf.Tensor) -> Outputs:
    return [tf.sign(x) * (1 - _erfc_of_magnitude(x))]


def _erfc(op: tf.Operation, x: tf.Tensor) -> Outputs:
    tail = _erfc_of_magnitude(x)
    return [tf.where(x < 0, 2 - tail, tail)]


FORMS: Mapping[str, Form] = {
    "AvgPoolGrad": _avg_pool_grad,
    "Conv2DBackpropFilter": _conv_2d_backprop_filter,
    "Conv2DBackpropInput": _conv_2d_backprop_input,
    "DepthwiseConv2dNativeBackpropFilter": _depthwise_backprop_filter,
    "DepthwiseConv2dNativeBackpropInput": _depthwise_backprop_input,
    "EluGrad": _elu_grad,
    "Erf": _erf,
    "Erfc": _erfc,
    "LeakyReluGrad": _leaky_relu_grad,
    "MaxPoolGrad": _max_pool_grad,
    "Relu6Grad": _relu6_grad,
    "SeluGrad": _selu_grad,
    "SoftsignGrad": _softsign_grad,
    "SparseSoftmaxCrossEntropyWithLogits": _sparse_cross_entropy,
}

# The converter makes a TRANSPOSE_CONV also of one with groups, and TFLite computes nonsense for that.
MISCONVERTED = frozenset({"Conv2DBackpropInput"})
