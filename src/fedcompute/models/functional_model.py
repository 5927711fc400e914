"""A model without state: weights are arguments, so the same functions run in any graph and on any device."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models import signature

Array = NDArray[Any]
Weights = tuple[Sequence[Any], Sequence[Any]]

_LABEL_SPEC = tf.TensorSpec([None, 1], tf.int64)
_SEED_STATE = "seed_generator_state"


class PredictOnBatch(Protocol):
    """The forward pass: weights (trainable, non_trainable) and a batch in, a tensor or a tuple of tensors out."""

    def __call__(self, weights: Weights, x: Any, training: bool) -> Any: ...


class Loss(Protocol):
    """The batch loss: the model's output and the label in, a float scalar out (the mean over the batch)."""

    def __call__(self, output: Any, label: Any) -> Any: ...


@dataclass(frozen=True)
class FunctionalModel:
    """Initial weights and the two functions that training needs (spec/artifacts.md 12).

    `x_spec` is a TensorSpec, or an OrderedDict of them by feature name; `y_spec` is a TensorSpec. The first dimension
    of each is the batch. Both functions capture nothing and may be called eagerly, inside any tf.Graph and inside the
    body of a dataset reduction under a gradient tape.
    """

    trainable: tuple[Array, ...]
    non_trainable: tuple[Array, ...]
    x_spec: Any
    y_spec: Any
    predict_on_batch: PredictOnBatch
    loss: Loss

    @property
    def weights(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The pair that `predict_on_batch` takes."""
        return self.trainable, self.non_trainable

    def with_weights(self, trainable: Sequence[Array], non_trainable: Sequence[Array] = ()) -> "FunctionalModel":
        """The same model with other weights; raises ArtifactInvalid(STATE_MISMATCH) unless number and shapes agree."""
        return dataclasses.replace(
            self,
            trainable=_fitting(trainable, self.trainable, "trainable"),
            non_trainable=_fitting(non_trainable, self.non_trainable, "non-trainable"),
        )


def functional_model_from_keras(
    keras_model: Any,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    input_spec: tuple[Any, Any] | Mapping[str, Any] | None = None,
) -> FunctionalModel:
    """Turns a Keras 3 model, or a function that makes one, into a FunctionalModel with the model's present weights.

    `loss_fn(label, output)` is a Keras loss or any function of that form; a result per example is averaged. Without it
    the loss that the model was compiled with is taken. `input_spec` is the pair (x, y): x a TensorSpec or a dictionary
    of them, y a TensorSpec, batch dimension None. Without it x follows from the model's inputs (a dictionary if there
    is more than one) and y from the loss: int64 [None, 1] for class labels, otherwise the output's shape in float32.

    Raises ArtifactInvalid(MODEL_UNSUPPORTED), with every reason, for a model whose training would lose something:
    non-trainable weights (batch normalisation, frozen layers), a variable that two layers share, regularisation, other
    state; and for one that does not fit its loss or input specification. The seeds of random layers such as dropout are
    no weights: each training batch draws fresh ones.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise _unsupported(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=tensorflow")
    if not isinstance(keras_model, keras.Model) and callable(keras_model):
        keras_model = keras_model()
    if not isinstance(keras_model, keras.Model):
        raise _unsupported(f"{type(keras_model).__name__} is no Keras 3 model")
    x_spec, y_spec = _checked_spec(input_spec) if input_spec is not None else (_derived_x_spec(keras_model), None)
    if not keras_model.built:
        _build(keras_model, x_spec)
    if reasons := _objections(keras_model):
        raise _unsupported("; ".join(reasons))
    loss = _loss(loss_fn if loss_fn is not None else _compiled_loss(keras_model))
    if y_spec is None:
        y_spec = _derived_y_spec(keras_model, loss_fn if loss_fn is not None else keras_model.loss)
    trainable = tuple(np.array(weight.numpy()) for weight in keras_model.trainable_weights)
    model = FunctionalModel(trainable, (), x_spec, y_spec, _stateless(keras_model), loss)
    signature.trace(model.predict_on_batch, model.loss, model.weights, x_spec, y_spec)
    return model


def assign_weights(keras_model: Any, trainable: Sequence[Array], non_trainable: Sequence[Array] = ()) -> None:
    """Puts trained weights, in the order of a checkpoint's leaves, back into the Keras model they came from.

    Raises ArtifactInvalid(STATE_MISMATCH) unless number and shapes agree; the model is unchanged then.
    """
    targets = (*keras_model.trainable_weights, *keras_model.non_trainable_weights)
    values = (
        *_fitting(trainable, keras_model.trainable_weights, "trainable"),
        *_fitting(non_trainable, keras_model.non_trainable_weights, "non-trainable"),
    )
    for target, value in zip(targets, values, strict=True):
        target.assign(value)


def _fitting(values: Sequence[Array], targets: Sequence[Any], kind: str) -> tuple[Array, ...]:
    if len(values) != len(targets):
        raise ArtifactInvalid(Reason.STATE_MISMATCH, f"{len(values)} {kind} weights for a model with {len(targets)}")
    fitting = []
    for index, (value, target) in enumerate(zip(values, targets, strict=True)):
        if tuple(value.shape) != tuple(target.shape):
            detail = f"{kind} weight {index} has shape {tuple(value.shape)}, the model {tuple(target.shape)}"
            raise ArtifactInvalid(Reason.STATE_MISMATCH, detail)
        fitting.append(np.asarray(value, target.dtype))
    return tuple(fitting)


def _objections(keras_model: Any) -> list[str]:
    reasons = []
    if frozen := [weight.path for weight in keras_model.non_trainable_weights]:
        reasons.append(
            f"{len(frozen)} non-trainable weights ({_some(frozen)}): batch normalisation and frozen layers are not "
            "trained by federated averaging; use group or layer normalisation, or make the layers trainable"
        )
    known = {id(weight) for weight in keras_model.weights}
    if other := [v.path for v in keras_model.variables if id(v) not in known and not v.path.endswith(_SEED_STATE)]:
        reasons.append(f"state that is no weight ({_some(other)}) would be lost")
    layers = _leaf_layers(keras_model)
    owners: dict[int, int] = {}
    for layer in layers:
        for weight in layer.weights:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    if shared := [weight.path for weight in keras_model.weights if owners.get(id(weight), 0) > 1]:
        reasons.append(f"layers share variables ({_some(shared)}); call one layer twice instead")
    if keras_model.losses or any(getattr(layer, "activity_regularizer", None) for layer in layers):
        reasons.append("regularisation losses are not part of the loss function and would be lost; remove them")
    if not keras_model.trainable_weights:
        reasons.append("no trainable weights")
    return reasons


def _leaf_layers(layer: Any) -> list[Any]:
    if not (children := getattr(layer, "layers", None)):
        return [layer]
    leaves = {id(leaf): leaf for child in children for leaf in _leaf_layers(child)}
    return list(leaves.values())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _stateless(keras_model: Any) -> PredictOnBatch:
    import keras

    weights_in_order = list(keras_model.trainable_weights)
    known = {id(weight) for weight in weights_in_order}
    seeds = [variable for variable in keras_model.variables if id(variable) not in known]

    def predict_on_batch(weights: Weights, x: Any, training: bool) -> Any:
        mapping = list(zip(weights_in_order, map(tf.convert_to_tensor, weights[0]), strict=True))
        mapping += [(seed, _seed_state(tuple(seed.shape), tf.as_dtype(seed.dtype), training)) for seed in seeds]
        features = {k: tf.convert_to_tensor(v) for k, v in x.items()} if isinstance(x, Mapping) else x
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            output = keras_model(features, training=training)
        if scope.losses:
            raise _unsupported("a loss that a layer adds is not part of the loss function and would be lost")
        return tuple(output) if isinstance(output, list) else output

    return predict_on_batch


def _seed_state(shape: tuple[int, ...], dtype: Any, training: bool) -> Any:
    if not training:
        return tf.zeros(shape, dtype)
    # A float draw, since it converts to a TFLite builtin where an integer draw does not.
    return tf.cast(tf.random.uniform(shape, maxval=2.0**31), dtype)


def _loss(loss_fn: Callable[[Any, Any], Any]) -> Loss:
    def loss(output: Any, label: Any) -> Any:
        value = loss_fn(label, output)
        return value if value.shape.rank == 0 else tf.reduce_mean(value)

    return loss


def _compiled_loss(keras_model: Any) -> Any:
    import keras

    loss = getattr(keras_model, "loss", None)
    if loss is None or isinstance(loss, (list, tuple, dict)):
        raise _unsupported("no single loss is known: pass loss_fn=, or compile the model with one loss")
    return keras.losses.get(loss)


def _checked_spec(input_spec: tuple[Any, Any] | Mapping[str, Any]) -> tuple[Any, Any]:
    if isinstance(input_spec, Mapping):
        if set(input_spec) != {"x", "y"}:
            raise _unsupported("an input specification given as a dictionary has the keys 'x' and 'y'")
        input_spec = (input_spec["x"], input_spec["y"])
    if not isinstance(input_spec, (tuple, list)) or len(input_spec) != 2:
        raise _unsupported("the input specification is the pair (x, y)")
    x_spec, y_spec = input_spec
    if isinstance(x_spec, Mapping):
        x_spec = OrderedDict(x_spec)
    parts = [*x_spec.values(), y_spec] if isinstance(x_spec, Mapping) else [x_spec, y_spec]
    for part in parts:
        if not isinstance(part, tf.TensorSpec):
            raise _unsupported(f"{type(part).__name__} in the input specification; x and y consist of tf.TensorSpec")
        if not part.shape.rank or part.shape[0] is not None:
            raise _unsupported(f"shape {part.shape} in the input specification; the first dimension is the batch, None")
    return x_spec, y_spec


def _derived_x_spec(keras_model: Any) -> Any:
    inputs = getattr(keras_model, "inputs", None)
    if not inputs:
        raise _unsupported("the model does not say what its inputs are: pass input_spec=")
    # A Sequential model that was never called has inputs but no attribute `input`.
    structure = getattr(keras_model, "input", None)
    if isinstance(structure, Mapping):
        named = {name: structure[name] for name in sorted(structure)}
    elif len(inputs) > 1:
        named = {tensor.name: tensor for tensor in sorted(inputs, key=lambda tensor: str(tensor.name))}
    else:
        return _batched(inputs[0])
    return OrderedDict((name, _batched(tensor)) for name, tensor in named.items())


def _batched(tensor: Any) -> Any:
    return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)


def _derived_y_spec(keras_model: Any, loss: Any) -> Any:
    name = loss if isinstance(loss, str) else str(getattr(loss, "name", getattr(loss, "__name__", "")))
    output = keras_model.outputs[0] if getattr(keras_model, "outputs", None) else None
    if "sparse" in name.lower() or "binary" in name.lower() or output is None:
        return _LABEL_SPEC
    return tf.TensorSpec([None, *output.shape[1:]], tf.float32)


def _build(keras_model: Any, x_spec: Any) -> None:
    import keras

    def symbolic(spec: Any) -> Any:
        return keras.Input(tuple(spec.shape[1:]), dtype=spec.dtype.name)

    try:
        keras_model({k: symbolic(v) for k, v in x_spec.items()} if isinstance(x_spec, Mapping) else symbolic(x_spec))
    # Model code is the user's and may raise anything.
    except Exception as error:
        raise _unsupported(f"the model cannot be built for its input specification: {type(error).__name__}") from error


def _unsupported(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.MODEL_UNSUPPORTED, detail)
