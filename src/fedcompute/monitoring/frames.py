"""Metrics of a task, round by round, read from where they lie (spec/task-builder.md 9.4)."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedcompute.crypto.envelope import gunzip
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason, UploadRejected
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.storage.blobs import BlobStore, content_encoding, open_blob_store
from fedcompute.storage.paths import MODEL

METRICS_LIMIT = 1 << 20
# A server's data directory, the root of its buckets, the model bucket itself.
_FOLDERS = (f"blobs/{MODEL}", MODEL, "")
_METRICS_FILE = re.compile(r"(?P<round>[1-9]\d{0,8})/s/0/metrics")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class MetricSeries:
    """One metric over the rounds that have it: `rounds` ascending, `values` of the same length.

    A value is None where the round's result was not a finite number. A round without a metrics file is absent.
    """

    name: str
    rounds: tuple[int, ...]
    values: tuple[float | None, ...]

    def at(self, rounds: Mapping[int, int]) -> "MetricSeries":
        """The same values at other rounds, such as an evaluation at the training rounds it measured.

        Rounds that the mapping lacks are left out; of two that fall together the later one stays.
        """
        moved = {rounds[old]: value for old, value in zip(self.rounds, self.values, strict=True) if old in rounds}
        ordered = sorted(moved)
        return replace(self, rounds=tuple(ordered), values=tuple(moved[number] for number in ordered))

    @property
    def last(self) -> float | None:
        """The newest finite value, None if there is none."""
        return next((value for value in reversed(self.values) if value is not None), None)


def read_series(
    source: str | Path, population: str, task_id: int = 1, *, rounds: int | None = None, api_key: str | None = None
) -> dict[str, MetricSeries]:
    """Every metric of a task by name, in the order of the newest round's file.

    `source` is a server's URL (`http://`, `https://`), a server's data directory, a directory or bucket URL that holds
    the layout `{population}/{task}/{round}/s/0/metrics` (with or without the bucket's name repeated in front), or the
    plain name of a Google Cloud Storage bucket. `rounds` leaves out later rounds. `api_key` is for a server alone.

    Raises OperationFailed (NOT_FOUND if the task has no metrics there, SERVER_UNREACHABLE, STORAGE_FAILED) and
    ArtifactInvalid(METRICS_MALFORMED) for a file that is no flat JSON object of numbers.
    """
    if str(source).startswith(("http://", "https://")):
        found = OperatorApi(str(source), api_key).metrics(population, task_id)
    else:
        store, name = _open(source)
        found = dict(_stored_metrics(store, name, population, task_id))
    found = {number: values for number, values in found.items() if rounds is None or number <= rounds}
    if not found:
        raise OperationFailed(
            Reason.NOT_FOUND,
            f"no metrics of population {population!r}, task {task_id}"
            + (f", rounds 1 to {rounds}" if rounds is not None else ""),
            remedy="check the population, the task id and the storage; a round's metrics appear when it completes",
        )
    return series(found)


def series(metrics: Mapping[int, Mapping[str, float | None]]) -> dict[str, MetricSeries]:
    """Turns metrics by round into one series per name, in the order of the newest round."""
    ordered = sorted(metrics)
    names = dict.fromkeys(name for number in reversed(ordered) for name in metrics[number])
    return {
        name: MetricSeries(
            name,
            tuple(number for number in ordered if name in metrics[number]),
            tuple(metrics[number][name] for number in ordered if name in metrics[number]),
        )
        for name in names
    }


def read_metrics(data: bytes, where: str) -> dict[str, float | None]:
    """Parses one metrics file, plain or gzip; non-finite numbers become None.

    Raises ArtifactInvalid(METRICS_MALFORMED) naming `where`.
    """
    try:
        plain = gunzip(data, METRICS_LIMIT) if content_encoding(data[:3]) == "gzip" else data
        document = json.loads(plain)
    except UploadRejected as error:
        raise _malformed(where, error.detail) from error
    except (ValueError, RecursionError) as error:
        raise _malformed(where, "it is no JSON text") from error
    if not isinstance(document, dict):
        raise _malformed(where, "it is no JSON object")
    return {name: _number(name, value, where) for name, value in document.items()}


def _number(name: str, value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _malformed(where, f"the value of {name!r} is no number")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _open(source: str | Path) -> tuple[BlobStore, str]:
    """The store at a root, and the name by which a doubled key would repeat it."""
    text = str(source).rstrip("/")
    if "://" in text and not text.startswith("file://"):
        return open_blob_store(text), text.rpartition("/")[2]
    directory = Path(text.removeprefix("file://"))
    if directory.is_dir():
        return open_blob_store(str(directory)), directory.resolve().name
    if "/" not in text and "." not in text[:1] and _BUCKET_NAME.fullmatch(text):
        return open_blob_store(f"gs://{text}"), text
    raise OperationFailed(
        Reason.NOT_FOUND,
        f"{text!r} is no directory",
        remedy="give a server's URL, a data directory, or a bucket as gs://name, s3://name or az://name",
    )


def _stored_metrics(
    store: BlobStore, name: str, population: str, task_id: int
) -> Iterator[tuple[int, dict[str, float | None]]]:
    for folder in _layouts(name):
        bucket, _, below = f"{folder}/{population}/{task_id}".lstrip("/").partition("/")
        for number in sorted(_rounds(store.list(bucket, below), below)):
            path = f"{below}/{number}/s/0/metrics"
            yield number, read_metrics(store.get(bucket, path, METRICS_LIMIT), f"{population}/{task_id}/{number}")


def _layouts(name: str) -> Iterator[str]:
    # The doubled key of the published page comes first, so that a round found twice is taken from its usual place.
    for folder in _FOLDERS:
        if folder or _BUCKET_NAME.fullmatch(name):
            yield f"{folder}/{MODEL if folder else name}"
    yield from _FOLDERS


def _rounds(paths: Iterable[str], folder: str) -> Iterator[int]:
    for path in paths:
        if found := _METRICS_FILE.fullmatch(path.removeprefix(f"{folder}/")):
            yield int(found["round"])


def _malformed(where: str, what: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.METRICS_MALFORMED, f"the metrics of {where} cannot be read: {what}")
