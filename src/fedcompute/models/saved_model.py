"""The SavedModel form of a functional model: written as TensorFlow Federated writes it, read from either source."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models import signature
from fedcompute.models.functional_model import FunctionalModel, Loss, PredictOnBatch, Weights
from fedcompute.protos.computation_types_pb2 import Type

_MAX_GRAPH_BYTES = 1 << 30
_MAX_VARIABLE_BYTES = 1 << 32
_FUNCTIONS = ("predict_on_batch_training", "predict_on_batch_inference", "loss")
_SPECS = (*(f"{name}_type_spec" for name in _FUNCTIONS), "serialized_input_spec")


class _Module(tf.Module):  # type: ignore[misc]  # TensorFlow has no type stubs
    """The root object of spec/artifacts.md 12; its attribute names are the format."""

    def __init__(self, model: FunctionalModel) -> None:
        super().__init__()
        self._weights = tuple(tuple(tf.Variable(array) for array in group) for group in model.weights)
        traced = signature.trace(model.predict_on_batch, model.loss, model.weights, model.x_spec, model.y_spec)
        self.predict_on_batch_training = traced.training
        self.predict_on_batch_inference = traced.inference
        self.loss = traced.loss
        self.predict_on_batch_training_type_spec = _stored(traced.output_type)
        self.predict_on_batch_inference_type_spec = _stored(traced.output_type)
        self.loss_type_spec = _stored(traced.loss_type)
        self.serialized_input_spec = _stored(signature.type_of((model.x_spec, model.y_spec)))

    @tf.function(input_signature=[], autograph=False)  # type: ignore[untyped-decorator]
    def __call__(self) -> Any:
        return tuple(tuple(variable.read_value() for variable in group) for group in self._weights)


def save_functional_model(functional_model: FunctionalModel, path: str | Path) -> None:
    """Writes the model as a SavedModel directory with the layout of spec/artifacts.md 12.

    Raises ArtifactInvalid(MODEL_UNSUPPORTED) if its functions cannot be traced for its own specification.
    """
    _check_eager()
    module = _Module(functional_model)
    # Autograph would leave a file of rewritten code behind if this process is killed.
    tf.autograph.experimental.do_not_convert(tf.saved_model.save)(
        module, str(path), signatures=module.predict_on_batch_inference
    )


def load_functional_model(path: str | Path) -> FunctionalModel:
    """Reads a functional model saved here or by TensorFlow Federated, which need not be installed.

    Raises ArtifactInvalid(SAVED_MODEL_INVALID) for a directory that is no SavedModel, is damaged or oversized (more
    than 1 GiB of graph or 4 GiB of variables), or holds something other than a functional model. TensorFlow runs the
    restore operations of the model that is loaded: load what is not trusted in a process that may be lost.
    """
    _check_eager()
    directory = Path(path)
    _check_files(directory)
    try:
        loaded = tf.saved_model.load(str(directory))
    # Damaged files surface as any of a dozen exception types.
    except Exception as error:
        raise _invalid(f"{directory.name} cannot be loaded as a SavedModel: {type(error).__name__}") from error
    if missing := [name for name in ("_weights", *_FUNCTIONS, *_SPECS) if not hasattr(loaded, name)]:
        raise _invalid(f"{directory.name} is a SavedModel but no functional model: it lacks {', '.join(missing)}")
    try:
        types = {name: signature.parse_type(getattr(loaded, name).numpy()) for name in _SPECS}
        # Called, since the attribute `_weights` comes back without its empty groups.
        trainable, non_trainable = (tuple(np.array(weight.numpy()) for weight in group) for group in loaded())
    except (AttributeError, TypeError, ValueError, tf.errors.OpError) as error:
        raise _invalid(f"{directory.name} has weights or type specifications of another form") from error
    x_spec, y_spec = _input_spec(types["serialized_input_spec"])
    model = FunctionalModel(
        trainable,
        non_trainable,
        x_spec,
        y_spec,
        _predict_on_batch(loaded, types["predict_on_batch_training_type_spec"]),
        _loss(loaded),
    )
    try:
        signature.trace(model.predict_on_batch, model.loss, model.weights, x_spec, y_spec)
    except ArtifactInvalid as error:
        raise _invalid(f"{directory.name}: {error.detail}") from error
    return model


def _check_eager() -> None:
    if not tf.executing_eagerly():
        raise RuntimeError("save and load functional models outside of graphs; their functions work inside")


def _check_files(directory: Path) -> None:
    graph = directory / "saved_model.pb"
    if not graph.is_file():
        raise _invalid(f"{directory.name} is no SavedModel: it has no saved_model.pb")
    if graph.stat().st_size > _MAX_GRAPH_BYTES:
        raise _invalid(f"saved_model.pb has {graph.stat().st_size} bytes; the limit is {_MAX_GRAPH_BYTES}")
    size = sum(file.stat().st_size for file in (directory / "variables").glob("*"))
    if size > _MAX_VARIABLE_BYTES:
        raise _invalid(f"the variables have {size} bytes; the limit is {_MAX_VARIABLE_BYTES}")


def _input_spec(message: Type) -> tuple[Any, Any]:
    spec = signature.spec_of(message)
    if isinstance(spec, dict) and set(spec) == {"x", "y"}:
        spec = (spec["x"], spec["y"])
    if not isinstance(spec, tuple) or len(spec) != 2 or not isinstance(spec[1], tf.TensorSpec):
        raise _invalid("Input spec must be a tuple (x, y) with a tensor as y")
    x_parts = list(spec[0].values()) if isinstance(spec[0], dict) else [spec[0]]
    if not all(isinstance(part, tf.TensorSpec) for part in x_parts):
        raise _invalid("x is neither a tensor nor a dictionary of tensors")
    return spec


def _predict_on_batch(loaded: Any, output_type: Type) -> PredictOnBatch:
    def predict_on_batch(weights: Weights, x: Any, training: bool) -> Any:
        function = loaded.predict_on_batch_training if training else loaded.predict_on_batch_inference
        tensors = tuple(tuple(tf.convert_to_tensor(weight) for weight in group) for group in weights)
        features = (
            {k: tf.convert_to_tensor(v) for k, v in x.items()} if isinstance(x, dict) else tf.convert_to_tensor(x)
        )
        # The literal is part of the saved signature and must be given with the value it was traced with.
        return signature.pack(function(model_weights=tensors, x=features, training=training), output_type)

    return predict_on_batch


def _loss(loaded: Any) -> Loss:
    def loss(output: Any, label: Any) -> Any:
        return loaded.loss(output, label, None)[0]

    return loss


def _stored(message: Type) -> Any:
    return tf.Variable(message.SerializeToString(deterministic=True), trainable=False)


def _invalid(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.SAVED_MODEL_INVALID, detail)
