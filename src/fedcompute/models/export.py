"""Trained weights into a model file: a copy of the user's own model, with other weights."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.functional_model import assign_weights
from fedcompute.models.saved_model import load_functional_model, save_functional_model

KERAS_SUFFIX = ".keras"
_MAX_KERAS_BYTES = 1 << 32


def export_weights(
    model: Path, trainable: Sequence[NDArray[Any]], non_trainable: Sequence[NDArray[Any]], out: Path
) -> None:
    """Writes a copy of `model` with the given weights, in the order of a checkpoint's leaves, to `out`.

    `model` is a `.keras` file or the SavedModel directory of a functional model; `out` becomes the same kind.
    Raises ArtifactInvalid: SAVED_MODEL_INVALID for a file that is neither or for an `out` of the other kind,
    STATE_MISMATCH if number or shapes of the weights differ. Nothing is written then.
    """
    if (out.suffix == KERAS_SUFFIX) != model.is_file():
        kind = f"a file ending in {KERAS_SUFFIX}" if model.is_file() else "a directory, as a SavedModel is"
        raise ArtifactInvalid(
            Reason.SAVED_MODEL_INVALID, f"{out.name} cannot take a copy of {model.name}", remedy=f"export it to {kind}"
        )
    if model.is_dir():
        functional_model = load_functional_model(model)
        save_functional_model(functional_model.with_weights(trainable, non_trainable), out)
        return
    keras_model = load_keras_file(model)
    assign_weights(keras_model, trainable, non_trainable)
    out.parent.mkdir(parents=True, exist_ok=True)
    keras_model.save(out)


def load_keras_file(path: Path) -> Any:
    """Reads a `.keras` file in Keras' safe mode, which runs no code from the file.

    Raises ArtifactInvalid(SAVED_MODEL_INVALID).
    """
    import keras

    if path.suffix != KERAS_SUFFIX or not zipfile.is_zipfile(path):
        raise _invalid(f"{path.name} is no {KERAS_SUFFIX} file")
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MAX_KERAS_BYTES:
        raise _invalid(f"{path.name} unpacks to {size} bytes; the limit is {_MAX_KERAS_BYTES}")
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    # Damaged files and layers that Keras does not know surface as many exception types.
    except Exception as error:
        raise _invalid(f"{path.name} cannot be loaded by Keras: {type(error).__name__}") from error


def _invalid(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(
        Reason.SAVED_MODEL_INVALID,
        detail,
        remedy="give a FunctionalModel SavedModel, or what model.save('model.keras') writes without custom layers",
    )
