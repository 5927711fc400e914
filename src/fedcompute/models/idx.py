"""IDX files, the format of MNIST and EMNIST: a big-endian header, then one unsigned byte per value."""

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason

Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_UNSIGNED_BYTE = 0x08
_MAX_BYTES = 1 << 30
_MAX_FILES = 10_000
_NAME = re.compile(
    r"(?P<set>emnist-[a-z]+-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?"
)


def read_directory(directory: Path) -> dict[str, Split]:
    """The splits in a directory under their usual names: "train" and "test", at least one of them.

    A split is images uint8 [n, rows, columns] and labels uint8 [n]. EMNIST images, stored column by column, are
    turned upright. Raises ArtifactInvalid(DATASET_MALFORMED) for damaged files, for a split without its labels or
    images, and for a directory with more than one set.
    """
    files: dict[tuple[str, str], Path] = {}
    sets: set[str] = set()
    for number, path in enumerate(sorted(directory.iterdir())):
        if number >= _MAX_FILES:
            raise _malformed(f"{directory.name} holds more than {_MAX_FILES} files")
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            sets.add(match["set"] or "")
            files.setdefault(("train" if match["split"] == "train" else "test", match["kind"]), path)
    if not files:
        raise _malformed(f"{directory.name} holds no IDX files under the names of MNIST or EMNIST")
    if len(sets) > 1:
        raise _malformed(f"{directory.name} holds several sets; give each a directory of its own")
    splits = {}
    for split in sorted({split for split, _ in files}):
        if (split, "images") not in files or (split, "labels") not in files:
            raise _malformed(f"{directory.name} lacks the images or the labels of its {split} split")
        images, labels = read(files[split, "images"], rank=3), read(files[split, "labels"], rank=1)
        if len(images) != len(labels) or not len(labels):
            raise _malformed(f"{len(images)} images and {len(labels)} labels in the {split} split")
        splits[split] = (images.transpose(0, 2, 1) if sets != {""} else images, labels)
    return splits


def read(path: Path, rank: int) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes with `rank` dimensions, plain or .gz, at most 1 GiB of values.

    Raises ArtifactInvalid(DATASET_MALFORMED) for another format, too few or too many bytes, or too large a size.
    """
    try:
        # gzip.open reads lazily, so a small file that unpacks to a huge one costs no more than was asked for.
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(cast(BinaryIO, file), path.name, rank)
    except (OSError, EOFError, zlib.error) as error:
        raise _malformed(f"{path.name} cannot be read to its end: {type(error).__name__}") from error


def _read(file: BinaryIO, name: str, rank: int) -> NDArray[np.uint8]:
    header = file.read(4 + 4 * rank)
    if len(header) != 4 + 4 * rank or header[:4] != bytes((0, 0, _UNSIGNED_BYTE, rank)):
        raise _malformed(f"{name} has no IDX header of {rank} dimensions of unsigned bytes")
    shape = struct.unpack(f">{rank}I", header[4:])
    size = 1
    for dimension in shape:
        size *= dimension
    if size > _MAX_BYTES:
        raise _malformed(f"{name} announces {size} values; the limit is {_MAX_BYTES}")
    values = file.read(size)
    if len(values) != size or file.read(1):
        raise _malformed(f"{name} announces {size} values and holds {'more' if len(values) == size else len(values)}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _malformed(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.DATASET_MALFORMED, detail)
