"""Clients from TFRecord files: one for each, with the serialized `tf.train.Example`s that its device would hold."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from fedcompute.builder.example_source import ExampleFormat, example_format, parse_batch
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.fleet.simulation.client_data import ClientData
from fedcompute.models.functional_model import FunctionalModel

PATTERN = "*.tfrecord"
HELD_OUT = "held_out"
MAX_FILE_BYTES = 1 << 30


def has_records(directory: Path) -> bool:
    """Whether a directory holds such files."""
    return directory.is_dir() and any(directory.glob(PATTERN))


def read_clients(
    directory: Path, clients: int, model: FunctionalModel, label_name: str
) -> tuple[ClientData, ClientData | None]:
    """The first `clients` files of a directory by name, and those of its folder `held_out` if it has one.

    Raises ArtifactInvalid (DATASET_MALFORMED) for too few files and for one that is too large, damaged, or lacks what
    the model takes.
    """
    layout = example_format(model.x_spec, model.y_spec, label_name)
    files = sorted(directory.glob(PATTERN))
    if len(files) < clients:
        raise _malformed(f"{directory.name} has {len(files)} files {PATTERN}, fewer than {clients} clients")
    held_out = sorted((directory / HELD_OUT).glob(PATTERN))
    return _read(files[:clients], layout), _read(held_out, layout) if held_out else None


def _read(files: list[Path], layout: ExampleFormat) -> ClientData:
    parsed = [_parse(file, layout) for file in files]
    x, y = tf.nest.map_structure(lambda *parts: np.concatenate(parts), *(columns for columns, _ in parsed))
    return ClientData(x, y, np.cumsum([0, *(count for _, count in parsed)], dtype=np.int64))


def _parse(file: Path, layout: ExampleFormat) -> tuple[Any, int]:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise _malformed(f"{file.name} has {size} bytes, over {MAX_FILE_BYTES}")
    try:
        records = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
        columns = parse_batch(tf.constant(records, tf.string, [len(records)]), layout)
    except tf.errors.OpError as error:
        # What it says of an example may quote it.
        raise _malformed(
            f"{file.name} is no file of examples with {', '.join([*layout.features, layout.label_name])} in the "
            f"model's types and shapes ({type(error).__name__})"
        ) from error
    return tf.nest.map_structure(lambda column: column.numpy(), columns), len(records)


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.DATASET_MALFORMED, detail)
