"""The table of builtin operations against TensorFlow's own TFLite interpreter, on converted functions."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from fedcompute.device.plans.builtin_ops import BUILTINS
from fedcompute.device.plans.flatbuffer import read_flatbuffer
from fedcompute.device.plans.translator import translate

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 6, 6, 4)).astype(np.float32)
MATRIX = RNG.normal(size=(4, 5)).astype(np.float32)
POSITIVE = np.abs(MATRIX) + 0.1
INTEGERS = RNG.integers(-9, 9, (4, 5)).astype(np.int32)
FLAGS = MATRIX > 0


def constant(*shape):
    return tf.constant(RNG.normal(size=shape).astype(np.float32))


CASES = {
    "arithmetic": (
        lambda a, b: (a + b, a - b, a * b, a / b, a**b, tf.maximum(a, b), tf.minimum(a, b)),
        POSITIVE,
        POSITIVE,
    ),
    "broadcasting": (lambda a: (a + a[0], tf.broadcast_to(a, [3, 4, 5]), a[:, :1] * a), MATRIX),
    "unary": (
        lambda a: (tf.exp(a), tf.math.log(a), tf.sqrt(a), tf.math.rsqrt(a), tf.sin(a), tf.cos(a), -a, tf.square(a)),
        POSITIVE,
    ),
    "rounding": (lambda a: (tf.floor(a), tf.math.ceil(a), tf.round(a), tf.abs(a), tf.sign(a)), 3 * MATRIX),
    "integers": (lambda a: (a // 3, tf.math.floormod(a, 3), a * a, tf.cast(a, tf.float32), tf.abs(a)), INTEGERS),
    "bits": (
        lambda a: (tf.bitwise.bitwise_xor(a, 5), tf.bitwise.right_shift(a, tf.ones_like(a)), tf.bitcast(a, tf.float32)),
        INTEGERS,
    ),
    "complex numbers": (
        lambda a: (tf.math.real(tf.signal.rfft2d(a)), tf.math.imag(tf.signal.rfft2d(a)), tf.abs(tf.signal.rfft2d(a))),
        RNG.normal(size=(4, 8)).astype(np.float32),
    ),
    "buckets": (lambda a: tf.raw_ops.Bucketize(input=a, boundaries=[-0.5, 0.0, 1.0]), MATRIX),
    "comparison": (
        lambda a, b: (a > b, a >= b, a < b, a <= b, tf.equal(a, b), tf.not_equal(a, b)),
        MATRIX,
        MATRIX.T.reshape(4, 5).copy(),
    ),
    "logic": (lambda a: (tf.logical_and(a, a[:1]), tf.logical_or(a, a[:1]), tf.logical_not(a), tf.where(a)), FLAGS),
    "selection": (lambda a, f: (tf.where(f, a, -a), tf.where(f, a, 0.0)), MATRIX, FLAGS),
    "reduction": (
        lambda a: (
            tf.reduce_sum(a, 0),
            tf.reduce_mean(a, 1, keepdims=True),
            tf.reduce_max(a),
            tf.reduce_min(a, 1),
            tf.reduce_prod(a, 0),
        ),
        MATRIX,
    ),
    "all and any": (lambda f: (tf.reduce_all(f, 0), tf.reduce_any(f, 1)), FLAGS),
    "arg": (lambda a: (tf.argmax(a, 1), tf.argmin(a, 0, output_type=tf.int32)), MATRIX),
    "shapes": (
        lambda a: (
            tf.reshape(a, [2, -1]),
            tf.transpose(a),
            tf.expand_dims(a, 1),
            tf.squeeze(a[:1], 0),
            tf.tile(a, [2, 1]),
            tf.reverse(a, [1]),
        ),
        MATRIX,
    ),
    "joining": (
        lambda a: (
            tf.concat([a, a * 2], 1),
            tf.stack([a, a * 2], 1),
            *tf.unstack(a, axis=0),
            *tf.split(a, [2, 3], 1),
            *tf.split(a, 2, 0),
        ),
        MATRIX,
    ),
    "slicing": (lambda a: (a[1:3, ::2], a[..., -1], a[:, tf.newaxis, 1:], tf.slice(a, [1, 1], [2, 3])), MATRIX),
    "gathering": (
        lambda a: (
            tf.gather(a, [2, 0]),
            tf.gather(a, [1, 3], axis=1),
            tf.gather_nd(a, [[0, 1], [3, 4]]),
            tf.scatter_nd([[1], [3]], a[:2], [6, 5]),
        ),
        MATRIX,
    ),
    "padding": (
        lambda a: (
            tf.pad(a, [[1, 0], [0, 2]]),
            tf.pad(a, [[1, 1], [0, 0]], constant_values=3.0),
            tf.pad(a, [[1, 1], [2, 2]], "REFLECT"),
            tf.pad(a, [[1, 1], [2, 2]], "SYMMETRIC"),
        ),
        MATRIX,
    ),
    "making": (
        lambda a: (
            tf.fill(tf.shape(a), 2.0),
            tf.zeros_like(a),
            tf.one_hot(tf.cast(a[0], tf.int32), 3),
            tf.range(tf.shape(a)[1]),
        ),
        MATRIX,
    ),
    "sorting": (
        lambda a: (*tf.math.top_k(a, 2), tf.cumsum(a, 1, reverse=True), tf.cumsum(a, 0, exclusive=True)),
        MATRIX,
    ),
    "matrices": (
        lambda a: (tf.matmul(a, constant(5, 3)), tf.matmul(a, a, transpose_b=True), tf.matmul(a, a, transpose_a=True)),
        MATRIX,
    ),
    "fully connected": (
        lambda a: tf.nn.relu(tf.matmul(a, tf.constant(MATRIX.T)) + tf.constant([1.0, 2.0, 3.0, 4.0])),
        MATRIX,
    ),
    "batch matmul": (lambda a: (tf.matmul(a[..., :2], a[:, :, :2]), tf.matmul(a, a, adjoint_b=True)), IMAGES),
    "activations": (
        lambda a: (
            tf.nn.relu(a),
            tf.nn.relu6(a * 9),
            tf.tanh(a),
            tf.sigmoid(a),
            tf.nn.elu(a),
            tf.nn.leaky_relu(a, 0.3),
            tf.nn.gelu(a),
            tf.nn.softmax(a),
            tf.nn.log_softmax(a),
        ),
        MATRIX,
    ),
    "convolution": (
        lambda a: (
            tf.nn.conv2d(a, constant(3, 3, 4, 5), 1, "SAME"),
            tf.nn.relu(tf.nn.conv2d(a, constant(3, 3, 4, 5), 2, "VALID") + 0.5),
        ),
        IMAGES,
    ),
    "convolution of volumes": (
        lambda a: (
            tf.nn.conv3d(a, constant(2, 2, 2, 3, 5), [1, 1, 2, 1, 1], "SAME") + 0.5,
            tf.nn.conv3d_transpose(a, constant(2, 2, 2, 4, 3), [1, 4, 8, 8, 4], 2, "SAME"),
        ),
        RNG.normal(size=(1, 2, 4, 4, 3)).astype(np.float32),
    ),
    "dilated convolution": (lambda a: tf.nn.conv2d(a, constant(3, 3, 4, 2), 1, "SAME", dilations=2), IMAGES),
    "depthwise convolution": (lambda a: tf.nn.depthwise_conv2d(a, constant(3, 3, 4, 2), [1, 1, 1, 1], "SAME"), IMAGES),
    "transposed convolution": (
        lambda a: tf.nn.conv2d_transpose(a, constant(3, 3, 2, 4), [2, 12, 12, 2], 2, "SAME"),
        IMAGES,
    ),
    "pooling": (lambda a: (tf.nn.max_pool2d(a, 2, 2, "VALID"), tf.nn.avg_pool2d(a, 3, 2, "SAME")), IMAGES),
    "depth and space": (lambda a: (tf.nn.space_to_depth(a, 2), tf.nn.depth_to_space(a, 2)), IMAGES),
    "resizing": (lambda a: (tf.image.resize(a, [9, 9]), tf.image.resize(a, [3, 3], "nearest")), IMAGES),
    "segments": (
        lambda a: (tf.math.segment_sum(a, [0, 0, 1, 2]), tf.math.unsorted_segment_sum(a, [2, 0, 1, 0], 3)),
        MATRIX,
    ),
    "conditional": (lambda a: tf.cond(tf.reduce_sum(a) > 0, lambda: a * 2, lambda: a - 1), MATRIX),
    "loop": (
        lambda a: tf.while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, x * 0.5 + 1.0), (tf.constant(0), a))[1],
        MATRIX,
    ),
    "sums of several": (
        lambda a, b: (tf.add_n([a, b, a * b]), tf.atan2(a, b), tf.math.squared_difference(a, b)),
        MATRIX,
        POSITIVE,
    ),
    "space and batch": (
        lambda a: (tf.space_to_batch(a, [2, 2], [[0, 0], [1, 1]]), tf.batch_to_space(a, [2, 1], [[1, 0], [0, 2]])),
        IMAGES,
    ),
    "rare activations": (
        lambda a: (
            a * tf.nn.relu6(a + 3) * (1 / 6),
            tf.minimum(tf.maximum(a, -1.0), 1.0),
            tf.nn.relu6(a),
            tf.nn.relu(a) + tf.fill([1, 1, 4], -0.3) * tf.nn.relu(-a),
            tf.math.l2_normalize(a, -1),
            tf.nn.local_response_normalization(a, 2, 1.5, 0.7, 0.4),
        ),
        IMAGES,
    ),
    "diagonals": (lambda a: (tf.linalg.diag(a), tf.linalg.set_diag(a, a[:, 0])), MATRIX),
    "reversed sequences": (lambda a: tf.reverse_sequence(a, [1, 2, 3, 5], seq_axis=1, batch_axis=0), MATRIX),
    "sparse values": (
        lambda a: tf.raw_ops.SparseToDense(
            sparse_indices=[[0, 1], [2, 3]], output_shape=[4, 5], sparse_values=a[0, :2], default_value=0.5
        ),
        MATRIX,
    ),
    "unique values": (tf.unique, np.array([3, 1, 3, 2, 1], np.int32)),
    "unsorted segments": (
        lambda a: (
            tf.math.unsorted_segment_max(a, [2, 0, 1, 0], 3),
            tf.math.unsorted_segment_min(a, [2, 0, 1, 0], 3),
            tf.math.unsorted_segment_prod(a, [2, 0, 1, 0], 3),
        ),
        MATRIX,
    ),
    "embeddings": (lambda a: tf.gather(a, [3, 0, 0]), MATRIX),
    "cut off at one": (tf.nn.relu6, MATRIX),
}
# Cases of unknown shapes; with known ones the converter would compute these operations itself.
SHAPELESS = {
    "shapes of shapes": (
        lambda a, b: (
            tf.shape(a),
            tf.rank(a),
            tf.fill(tf.shape(a), 2.0),
            tf.zeros_like(a),
            tf.range(tf.shape(a)[0]),
            tf.broadcast_dynamic_shape(tf.shape(a), tf.shape(b)),
            tf.expand_dims(a, 1),
        ),
        MATRIX,
        MATRIX[:1],
    ),
    "squeezing": (lambda a: tf.squeeze(tf.reshape(a, tf.concat([tf.shape(a), [1]], 0)), [2]), MATRIX),
}
# Operations that this converter no longer makes: case, the builtin in it, the one that is put in its place.
PUT_IN_PLACE = {
    "embeddings": ("GATHER", "EMBEDDING_LOOKUP"),
    "cut off at one": ("RELU6", "RELU_0_TO_1"),
}
# They draw numbers, so only moments can be compared: function of a shape, mean, deviation.
RANDOM = {
    "MULTINOMIAL": (lambda shape: tf.random.categorical(tf.math.log([[0.5, 0.25, 0.25]]), shape[0]), 0.75, 0.6875**0.5),
    "RANDOM_STANDARD_NORMAL": (tf.random.normal, 0.0, 1.0),
    "RANDOM_UNIFORM": (tf.random.uniform, 0.5, 12**-0.5),
}


def converted(name):
    """The flatbuffer of a case, and the arrays to feed it with."""
    function, *arrays = CASES[name] if name in CASES else SHAPELESS[name]
    shapes = [array.shape if name in CASES else None for array in arrays]
    specs = [tf.TensorSpec(shape, array.dtype) for shape, array in zip(shapes, arrays, strict=True)]
    concrete = tf.function(function).get_concrete_function(*specs)
    flatbuffer = tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert()
    if name in PUT_IN_PLACE:
        flatbuffer = put_in_place(flatbuffer, *PUT_IN_PLACE[name])
    return flatbuffer, arrays


def put_in_place(flatbuffer, old, new):
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(flatbuffer))
    numbers = vars(schema.BuiltinOperator)
    (index,) = [i for i, code in enumerate(model.operatorCodes) if code.builtinCode == numbers[old]]
    model.operatorCodes[index].builtinCode = numbers[new]
    model.operatorCodes[index].deprecatedBuiltinCode = min(127, numbers[new])
    model.operatorCodes[index].version = 1
    for operator in model.subgraphs[0].operators:
        if operator.opcodeIndex == index and old == "GATHER":
            operator.inputs = operator.inputs[::-1]
            operator.builtinOptions, operator.builtinOptionsType = None, 0
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("name", [*CASES, *SHAPELESS])
def test_a_translated_function_computes_what_the_interpreter_computes(name):
    flatbuffer, arrays = converted(name)
    translated = translate(flatbuffer)
    feed = dict(zip(translated.inputs.values(), arrays, strict=True))
    with tf.compat.v1.Session(graph=translated.graph) as session:
        values = session.run(translated.outputs, feed)

    interpreter = tf.lite.Interpreter(model_content=flatbuffer)
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.resize_tensor_input(detail["index"], array.shape)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    expected = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
    assert read_flatbuffer(flatbuffer)[0].operators
    assert len(values) == len(expected) > 0
    for value, reference in zip(values, expected, strict=True):
        assert value.dtype == reference.dtype
        np.testing.assert_allclose(value, reference, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_have_the_moments_of_their_distribution(name):
    function, mean, deviation = RANDOM[name]
    concrete = tf.function(function).get_concrete_function(tf.TensorSpec([1], tf.int32))
    flatbuffer = tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert()
    assert name in [operator.name for operator in read_flatbuffer(flatbuffer)[0].operators]
    translated = translate(flatbuffer)
    with tf.compat.v1.Session(graph=translated.graph) as session:
        (drawn,) = session.run(translated.outputs, {translated.inputs.popitem()[1]: [100_000]})
    assert drawn.size == 100_000
    # Five standard errors; that of a deviation is smaller than that of a mean.
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [mean, deviation], atol=5 * deviation / 100_000**0.5)


def test_every_builtin_of_the_table_is_compared():
    compared = set(RANDOM)
    for name in [*CASES, *SHAPELESS]:
        compared |= {operator.name for graph in read_flatbuffer(converted(name)[0]) for operator in graph.operators}
    assert set(BUILTINS) - compared == set()
