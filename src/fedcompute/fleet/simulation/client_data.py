"""Examples of many clients, in the arrays that a model takes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.datasets import FederatedDataset, Images, Labels
from fedcompute.models.functional_model import FunctionalModel

# Examples that are measured together where no client's batches matter.
_BLOCK = 256


@dataclass(frozen=True)
class ClientData:
    """Client i holds the examples `starts[i]` to `starts[i + 1]`.

    `x`: an array [examples, ...], or a dictionary of them by feature, as the model's `x_spec`; `y`: [examples, ...] as
    its `y_spec`; `starts`: int64 [clients + 1].
    """

    x: Any
    y: NDArray[Any]
    starts: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Examples by client."""
        return np.diff(self.starts)


def clients_of(dataset: FederatedDataset, model: FunctionalModel) -> ClientData:
    """The clients of a sample data set, in its order. Raises ArtifactInvalid (DATASET_MALFORMED) if they do not fit."""
    counts = [len(labels) for _, labels in dataset.clients.values()]
    return _fitted(dataset.name, dataset.clients.values(), np.concatenate([[0], np.cumsum(counts)]), model)


def held_out(dataset: FederatedDataset, model: FunctionalModel) -> ClientData | None:
    """The test set in blocks, as if each were a client's; None if there is none."""
    count = len(dataset.test_y)
    if count == 0:
        return None
    starts = np.append(np.arange(0, count, _BLOCK), count)
    return _fitted(dataset.name, [(dataset.test_x, dataset.test_y)], starts, model)


def _fitted(
    name: str, parts: Iterable[tuple[Images, Labels]], starts: NDArray[Any], model: FunctionalModel
) -> ClientData:
    images, labels = zip(*parts, strict=True)
    single = not isinstance(model.x_spec, dict)
    specs = {"x": model.x_spec} if single else model.x_spec
    if len(specs) != 1:
        raise _misfit(f"{name!r} has images alone, the model takes {', '.join(map(repr, specs))}")
    columns = {feature: _column(name, feature, images, spec) for feature, spec in specs.items()}
    (x,) = columns.values()
    return ClientData(x if single else columns, _column(name, "label", labels, model.y_spec), starts.astype(np.int64))


def _column(name: str, feature: str, parts: Sequence[NDArray[Any]], spec: Any) -> NDArray[Any]:
    joined = np.concatenate(parts)
    shape = tuple(spec.shape[1:])
    if joined[:1].size != np.prod(shape, dtype=int):
        raise _misfit(f"{name!r} has {list(joined.shape[1:])} per example, the model takes {list(shape)} as {feature}")
    return joined.reshape(len(joined), *shape).astype(spec.dtype.as_numpy_dtype, copy=False)


def _misfit(detail: str) -> ArtifactInvalid:
    return ArtifactInvalid(Reason.DATASET_MALFORMED, detail, remedy="take a model whose inputs the data set has")
