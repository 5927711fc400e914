"""Federated sample data: images of handwriting, already divided among clients, with a held-out test set.

Every set comes as 28x28 grey images in 0..1 with integer labels, whatever its source: scikit-learn's digits (no
download), IDX files of MNIST or EMNIST, or the federated EMNIST HDF5 file. Nothing here imports TensorFlow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models import idx
from fedcompute.protos import tensorflow_pb2

IMAGE_SIDE = 28
DIGITS = "digits"

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

_TEST_FRACTION = 0.2
_LABEL_SKEW = 1.0
_MAX_EXAMPLES_PER_CLIENT = 1_000
_MAX_TEST_EXAMPLES = 10_000
_MAX_HDF5_CLIENTS = 10_000
_SAMPLES_REMEDY = "install the extra 'samples': pip install 'fedcompute[samples]'"


@dataclass(frozen=True)
class FederatedDataset:
    """Images by client, and a test set that no client holds.

    `clients` maps a client's name to its images, float32 [n, 28, 28, 1] in 0..1, and labels, int64 [n], n >= 1.
    `test_x`, `test_y` have the same form. Labels lie in 0..num_classes-1.
    """

    name: str
    clients: Mapping[str, tuple[Images, Labels]]
    test_x: Images
    test_y: Labels
    num_classes: int


def load_dataset(name_or_path: str, num_clients: int, seed: int) -> FederatedDataset:
    """Loads the set that the argument names and divides it among `num_clients`; equal arguments, equal result.

    "digits" is scikit-learn's set; a directory holds IDX files; a file ending in .h5 or .hdf5 is federated EMNIST,
    whose own writers become the clients. Raises ArtifactInvalid(DATASET_MALFORMED) for anything else, for a damaged
    file and for fewer examples (or writers) than clients.
    """
    if num_clients < 1:
        raise _malformed(f"a data set needs at least 1 client, not {num_clients}")
    if name_or_path == DIGITS:
        return digits(num_clients, seed)
    path = Path(name_or_path)
    if path.is_dir():
        return from_idx(path, num_clients, seed)
    if path.is_file() and path.suffix in (".h5", ".hdf5"):
        return from_hdf5(path, num_clients, seed)
    raise _malformed(f"{name_or_path!r} is neither '{DIGITS}', nor a directory of IDX files, nor an .h5 file")


def digits(num_clients: int, seed: int) -> FederatedDataset:
    """scikit-learn's 1,797 digits, scaled from 8x8 to 28x28 bilinearly; one fifth is held out."""
    source = _sample_library("sklearn.datasets").load_digits()
    x = enlarge(np.asarray(source.images, np.float32) / np.float32(16))
    y = np.asarray(source.target, np.int64)
    rng = np.random.default_rng(seed)
    return _divide(DIGITS, x, y, None, num_clients, rng)


def from_idx(directory: Path, num_clients: int, seed: int) -> FederatedDataset:
    """A directory of MNIST or EMNIST IDX files, plain or gzipped.

    The test set is the directory's own where both splits are there; with a single split one fifth is held out.
    """
    splits = idx.read_directory(directory)
    rng = np.random.default_rng(seed)
    train = splits.get("train") or splits["test"]
    test = splits["test"] if "train" in splits and "test" in splits else None
    for images, _ in filter(None, (train, test)):
        if images.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE):
            raise _malformed(
                f"images of {images.shape[1]}x{images.shape[2]} pixels; expected {IMAGE_SIDE}x{IMAGE_SIDE}"
            )
    # A sample of the bytes, before they grow fourfold as floats.
    keep = rng.permutation(len(train[1]))[: num_clients * _MAX_EXAMPLES_PER_CLIENT]
    held_out = None
    if test is not None:
        chosen = rng.permutation(len(test[1]))[:_MAX_TEST_EXAMPLES]
        held_out = (_scaled(test[0][chosen]), test[1][chosen].astype(np.int64))
    return _divide(directory.name, _scaled(train[0][keep]), train[1][keep].astype(np.int64), held_out, num_clients, rng)


def from_hdf5(path: Path, num_clients: int, seed: int) -> FederatedDataset:
    """Federated EMNIST: `examples/<writer>/pixels` [n, 28, 28] in 0..1 and `examples/<writer>/label` [n].

    `num_clients` writers are chosen by `seed`. One fifth of each writer's images is held out. Pixels stay as stored
    (this source draws dark on light, MNIST light on dark).
    """
    h5py = _sample_library("h5py")
    rng = np.random.default_rng(seed)
    clients: dict[str, tuple[Images, Labels]] = {}
    held_out: list[tuple[Images, Labels]] = []
    try:
        with h5py.File(path, "r") as file:
            examples_group = file["examples"]
            writers = sorted(examples_group)[:_MAX_HDF5_CLIENTS]
            if len(writers) < num_clients:
                raise _malformed(f"{path.name} has {len(writers)} writers, fewer than {num_clients} clients")
            for index in sorted(rng.permutation(len(writers))[:num_clients]):
                writer = writers[index]
                x, y = _read_writer(examples_group[writer], writer)
                order = rng.permutation(len(y))
                test_count = int(len(y) * _TEST_FRACTION)
                held_out.append((x[order[:test_count]], y[order[:test_count]]))
                clients[writer] = (x[order[test_count:]], y[order[test_count:]])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise _malformed(f"{path.name} is no federated EMNIST file: {type(error).__name__}") from error
    test_x = np.concatenate([x for x, _ in held_out])[:_MAX_TEST_EXAMPLES]
    test_y = np.concatenate([y for _, y in held_out])[:_MAX_TEST_EXAMPLES]
    return FederatedDataset(path.stem, clients, test_x, test_y, _num_classes([y for _, y in clients.values()], test_y))


def examples(x: Images, y: Labels) -> list[bytes]:
    """Each image and its label as a serialized tf.train.Example: `x` 784 floats, `y` one int64."""
    serialized = []
    for image, label in zip(x.reshape(len(x), -1).astype(np.float32), y, strict=True):
        example = tensorflow_pb2.Example()
        example.features.feature["x"].float_list.value.extend(image.tolist())
        example.features.feature["y"].int64_list.value.append(int(label))
        serialized.append(example.SerializeToString(deterministic=True))
    return serialized


def enlarge(images: Images, side: int = IMAGE_SIDE) -> Images:
    """Scales square images [n, s, s] to [n, side, side, 1] bilinearly, pixel centres at half integers."""
    small = images.shape[1]
    position = np.clip((np.arange(side) + 0.5) * small / side - 0.5, 0, small - 1)
    left = np.minimum(position.astype(np.int64), small - 2)
    weights = np.zeros((side, small))
    weights[np.arange(side), left] = 1 - (position - left)
    weights[np.arange(side), left + 1] = position - left
    large: NDArray[np.float64] = np.einsum("ai,nij,bj->nab", weights, images, weights)
    return large[..., np.newaxis].astype(np.float32)


def partition(labels: Labels, num_clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Divides the examples with `labels` [n] among clients: disjoint index arrays that cover 0..n-1, none empty.

    Each class is spread over the clients in proportions drawn from a symmetric Dirichlet distribution (label skew as
    in arXiv 1909.06335). Raises ArtifactInvalid(DATASET_MALFORMED) if there are fewer examples than clients.
    """
    if len(labels) < num_clients:
        raise _malformed(f"{len(labels)} examples are too few for {num_clients} clients")
    shares: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(num_clients, _LABEL_SKEW)))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, np.rint(cuts).astype(np.int64)), strict=True):
            share.extend(part.tolist())
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [np.sort(np.array(share, np.int64)) for share in shares]


def _divide(
    name: str,
    x: Images,
    y: Labels,
    held_out: tuple[Images, Labels] | None,
    num_clients: int,
    rng: np.random.Generator,
) -> FederatedDataset:
    if held_out is None:
        order = rng.permutation(len(y))
        test_count = int(len(y) * _TEST_FRACTION)
        held_out = (x[order[:test_count]], y[order[:test_count]])
        x, y = x[order[test_count:]], y[order[test_count:]]
    width = max(4, math.ceil(math.log10(num_clients + 1)))
    clients = {
        f"client-{number:0{width}d}": (x[share], y[share])
        for number, share in enumerate(partition(y, num_clients, rng))
    }
    return FederatedDataset(name, clients, *held_out, _num_classes([y], held_out[1]))


def _read_writer(group: Mapping[str, NDArray[np.generic]], writer: str) -> tuple[Images, Labels]:
    pixels, label = group["pixels"], group["label"]
    count = label.shape[0]
    if label.shape != (count,) or pixels.shape != (count, IMAGE_SIDE, IMAGE_SIDE):
        raise _malformed(f"writer {writer!r} has pixels {tuple(pixels.shape)} and labels {tuple(label.shape)}")
    if count < 2:
        raise _malformed(f"writer {writer!r} has {count} images; at least 2 are needed")
    take = min(count, _MAX_EXAMPLES_PER_CLIENT)
    x = np.asarray(pixels[:take], np.float32)[..., np.newaxis]
    y = np.asarray(label[:take], np.int64)
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1 and y.min() >= 0):
        raise _malformed(f"writer {writer!r} has pixels outside 0..1 or negative labels")
    return x, y


def _scaled(images: NDArray[np.uint8]) -> Images:
    return (images.astype(np.float32) / np.float32(255))[..., np.newaxis]


def _num_classes(client_labels: Sequence[Labels], test_labels: Labels) -> int:
    return 1 + max(int(labels.max()) for labels in (*client_labels, test_labels) if len(labels))


def _sample_library(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ArtifactInvalid(
            Reason.DATASET_MALFORMED, f"this data set needs {name.split('.')[0]}", remedy=_SAMPLES_REMEDY
        ) from error


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.DATASET_MALFORMED, detail)
