"""What a metric sees of a batch, and whether labels and predictions belong together."""

from dataclasses import dataclass

import tensorflow as tf


class Misfit(ValueError):
    """A metric that cannot be computed from a model's labels and predictions; the message says why."""


@dataclass(frozen=True)
class Batch:
    """A batch of n examples as the model left it."""

    label: tf.Tensor  # [n, ...]
    outputs: tuple[tf.Tensor, ...]  # [n, ...] each
    loss: tf.Tensor  # scalar, float32

    @property
    def size(self) -> tf.Tensor:
        """n, a float32 scalar."""
        return tf.cast(tf.shape(self.outputs[0])[0], tf.float32)

    @property
    def prediction(self) -> tf.Tensor:
        """The model's only output, or the third of three (spec/task-builder.md 4.2); float32 [n, ...].

        Raises Misfit for another number of outputs and for outputs of unknown shape.
        """
        if len(self.outputs) not in (1, 3):
            raise Misfit(f"the model has {len(self.outputs)} outputs; metrics take the only one, or the third of three")
        prediction = self.outputs[-1]
        rank = prediction.shape.rank
        if rank is None or rank < 1 or not prediction.shape[1:].is_fully_defined():
            raise Misfit("every dimension of the predictions behind the batch must be known")
        return _as_float(prediction, "predictions")

    @property
    def numbers(self) -> tf.Tensor:
        """The label as float32 [n, ...]; raises Misfit for labels that are no numbers."""
        return _as_float(self.label, "labels")


def pair(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """Label and prediction as float32 tensors of one shape [n, d, ...]; Misfit where one number has no partner.

    Plain vectors count as columns, and a last dimension of 1 that only one of the two has is dropped. Nothing is
    broadcast: comparing one label with every output would count nonsense.
    """
    label, prediction = _column(batch.numbers), _column(batch.prediction)
    if label.shape.rank == prediction.shape.rank + 1 and label.shape[-1] == 1:
        label = tf.squeeze(label, axis=-1)
    elif prediction.shape.rank == label.shape.rank + 1 and prediction.shape[-1] == 1:
        prediction = tf.squeeze(prediction, axis=-1)
    if not label.shape.is_compatible_with(prediction.shape):
        class_numbers = batch.label.dtype.is_integer and label.shape[-1] == 1
        hint = "; for class numbers take a sparse_categorical metric" if class_numbers else ""
        raise Misfit(f"one label per output is needed{hint}")
    return label, prediction


def classes(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """Class numbers, float32 [n, ...], and a score per class, float32 [n, ..., k]; Misfit unless they are that."""
    label, prediction = batch.numbers, batch.prediction
    if label.shape.rank == prediction.shape.rank and label.shape[-1] == 1:
        label = tf.squeeze(label, axis=-1)
    if prediction.shape.rank < 2:
        raise Misfit("one output per class is needed, not one number per example")
    if not label.shape.is_compatible_with(prediction.shape[:-1]):
        raise Misfit("one class number for all outputs of an example is needed")
    return label, prediction


def distributions(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """A weight and a score per class, float32 [n, ..., k] each, such as one-hot labels; Misfit unless they are that."""
    label, prediction = pair(batch)
    if batch.label.shape.rank < 2 or batch.prediction.shape.rank < 2:
        raise Misfit("a label and an output per class are needed, not one number per example")
    return label, prediction


def shape_of(tensor: tf.Tensor) -> str:
    """A shape as users write it: [?, 10]."""
    if tensor.shape.rank is None:
        return "unknown"
    return "[" + ", ".join("?" if size is None else str(size) for size in tensor.shape) + "]"


def _column(values: tf.Tensor) -> tf.Tensor:
    return values[:, tf.newaxis] if values.shape.rank == 1 else values


def _as_float(values: tf.Tensor, what: str) -> tf.Tensor:
    if not (values.dtype.is_floating or values.dtype.is_integer or values.dtype.is_bool):
        raise Misfit(f"{what} have type {values.dtype.name} and are no real numbers")
    return tf.cast(values, tf.float32)
