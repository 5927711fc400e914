"""The device's examples inside the client graph: the ExternalDataset op, batching and parsing (spec/artifacts.md 4)."""

import ctypes
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops
from tensorflow.python.framework import op_def_registry

from fedcompute.errors import ArtifactInvalid, BuildFailed, Reason

OP_NAME = "ExternalDataset"
TENSOR_FEATURE = "x"
TENSOR_LABEL = "y"
# What tf.train.Example can hold, and how a spec of each type is stored in it.
_STORED = {tf.float32: tf.float32, tf.int64: tf.int64, tf.string: tf.string, tf.int32: tf.int64}

_registration = Lock()


@dataclass(frozen=True)
class ExampleFormat:
    """What one example holds: feature name to batched spec, in the order that the model declares, and the label.

    `single` says that the model takes the one feature as a bare tensor and not in a dictionary.
    """

    features: OrderedDict[str, tf.TensorSpec]
    label_name: str
    label: tf.TensorSpec
    single: bool


def example_format(x_spec: Any, y_spec: Any, label_name: str) -> ExampleFormat:
    """The format of a model's examples (spec/task-builder.md 5.1).

    `x_spec` is a `tf.TensorSpec` (feature `x`, label `y`; `label_name` is ignored) or a mapping of them (label
    `label_name`). Raises ArtifactInvalid (MODEL_UNSUPPORTED) naming the feature that cannot be stored.
    """
    single = not isinstance(x_spec, dict)
    features = OrderedDict([(TENSOR_FEATURE, x_spec)]) if single else OrderedDict(x_spec)
    label = TENSOR_LABEL if single else label_name
    if not label:
        raise ArtifactInvalid(
            Reason.MODEL_UNSUPPORTED,
            "Label name cannot be empty.",
            remedy="set label_name in the task configuration; the model takes a dictionary of features",
        )
    if label in features:
        raise ArtifactInvalid(Reason.MODEL_UNSUPPORTED, f"label {label!r} is also the name of a feature")
    for name, spec in [*features.items(), (label, y_spec)]:
        _check_storable(name, spec)
    return ExampleFormat(features, label, y_spec, single)


def _check_storable(name: str, spec: Any) -> None:
    if not isinstance(spec, tf.TensorSpec):
        kind = type(spec).__name__
        raise ArtifactInvalid(
            Reason.MODEL_UNSUPPORTED, f"feature {name!r} is a {kind}; only dense tensors can be read from examples"
        )
    if spec.dtype not in _STORED:
        raise ArtifactInvalid(
            Reason.MODEL_UNSUPPORTED,
            f"feature {name!r} has type {spec.dtype.name}; an example holds float32, int64, int32 or string",
        )
    if spec.shape.rank is None or spec.shape.rank < 1 or not spec.shape[1:].is_fully_defined():
        raise ArtifactInvalid(
            Reason.MODEL_UNSUPPORTED,
            f"feature {name!r} has shape {spec.shape}; every dimension behind the batch must be known",
        )


def external_examples(token: tf.Tensor, selector: bytes) -> tf.data.Dataset:
    """The data set of serialized examples that the device's runtime supplies; only inside a `tf.Graph`.

    `token` is the string scalar that names the registered example source, `selector` a serialized ExampleSelector.
    """
    _register_op()
    graph = tf.compat.v1.get_default_graph()
    op = graph.create_op(OP_NAME, [token, tf.constant(selector)], [tf.variant], name="external_dataset")
    handle = op.outputs[0]
    handle.set_shape([])
    return dataset_ops._VariantDataset(handle, tf.TensorSpec([], tf.string))


def parse_batch(serialized: tf.Tensor, layout: ExampleFormat) -> tuple[Any, tf.Tensor]:
    """Parses a batch of examples, string [batch], into (features, label) as the model takes them.

    A missing feature fails on the device; int32 is stored as int64. Features come in the model's order.
    """
    specs = {**layout.features, layout.label_name: layout.label}
    stored = {name: tf.io.FixedLenFeature(spec.shape[1:], _STORED[spec.dtype]) for name, spec in specs.items()}
    parsed = tf.io.parse_example(serialized, stored)
    columns = {
        name: parsed[name] if spec.dtype is _STORED[spec.dtype] else tf.cast(parsed[name], spec.dtype)
        for name, spec in specs.items()
    }
    label = columns[layout.label_name]
    if layout.single:
        return columns[TENSOR_FEATURE], label
    return OrderedDict((name, columns[name]) for name in layout.features), label


def batched_examples(
    token: tf.Tensor, selector: bytes, layout: ExampleFormat, *, batch_size: int, max_batches: int
) -> tf.data.Dataset:
    """Batches of at most `batch_size` parsed examples, `max_batches` of them (-1: all)."""
    examples = external_examples(token, selector).batch(batch_size, drop_remainder=False)
    # Autograph would leave files of rewritten code behind if this process is killed.
    parse = tf.autograph.experimental.do_not_convert(lambda serialized: parse_batch(serialized, layout))
    return examples.map(parse).take(max_batches)


def _register_op() -> None:
    """Makes the op's definition known to TensorFlow, once per process; the kernel lives in the device's runtime."""
    with _registration:
        if op_def_registry.get(OP_NAME) is not None:
            return
        library = _tensorflow_library()
        library.TF_NewOpDefinitionBuilder.restype = ctypes.c_void_p
        library.TF_NewStatus.restype = ctypes.c_void_p
        library.TF_Message.restype = ctypes.c_char_p
        builder = ctypes.c_void_p(library.TF_NewOpDefinitionBuilder(OP_NAME.encode()))
        for declaration in (b"token: string", b"selector: string"):
            library.TF_OpDefinitionBuilderAddInput(builder, declaration)
        library.TF_OpDefinitionBuilderAddOutput(builder, b"handle: variant")
        library.TF_OpDefinitionBuilderSetIsStateful(builder, True)
        status = ctypes.c_void_p(library.TF_NewStatus())
        library.TF_RegisterOpDefinition(builder, status)
        code, message = library.TF_GetCode(status), library.TF_Message(status)
        library.TF_DeleteStatus(status)
        if code != 0:
            raise BuildFailed(Reason.BUILD_FAILED, f"TensorFlow refuses the op {OP_NAME}: {message.decode()}")


def _tensorflow_library() -> ctypes.CDLL:
    root = Path(tf.sysconfig.get_lib())
    names = ("libtensorflow_cc.*", "libtensorflow_framework.*", "python/_pywrap_tensorflow_internal.*")
    for path in (path for name in names for path in sorted(root.glob(name))):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "TF_NewOpDefinitionBuilder") and hasattr(library, "TF_RegisterOpDefinition"):
            return library
    raise BuildFailed(
        Reason.BUILD_FAILED,
        f"no library of TensorFlow {tf.__version__} exports the C functions that define an op",
        remedy="install a TensorFlow wheel between 2.18 and 2.21",
    )
