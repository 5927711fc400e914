"""What a simulation is made of, loaded."""

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedcompute.builder.archive import MAX_ARCHIVE_BYTES, unpack
from fedcompute.builder.model_safety import check_saved_model
from fedcompute.builder.preparation import PreparedTask, prepare_task
from fedcompute.errors import ArtifactInvalid, ConfigInvalid, Reason
from fedcompute.fleet.simulation.client_data import ClientData, clients_of, held_out
from fedcompute.fleet.simulation.client_records import has_records, read_clients
from fedcompute.fleet.simulation.jobs import Setup
from fedcompute.models.datasets import FederatedDataset, load_dataset
from fedcompute.models.functional_model import FunctionalModel, functional_model_from_keras
from fedcompute.models.saved_model import load_functional_model
from fedcompute.models.zoo import SAMPLE_MODELS, build_seeded
from fedcompute.protos import task_builder_pb2


@dataclass(frozen=True)
class Loaded:
    """A setup's task, its clients' examples and, if there are any, held-out ones."""

    task: PreparedTask
    clients: ClientData
    held_out: ClientData | None
    warnings: tuple[str, ...]


@lru_cache(maxsize=1)
def load(setup: Setup) -> Loaded:
    """Loads model and data, checks and completes the configuration.

    Raises ConfigInvalid, also for a configuration that trains nothing, and ArtifactInvalid.
    """
    model = _model(setup.model, setup.seed)
    task, warnings = _prepared(setup.config, setup.flags, model)
    directory = Path(setup.data)
    if has_records(directory):
        label_name = task.settings.config.label_name
        return Loaded(task, *read_clients(directory, setup.clients, model, label_name), warnings)
    dataset = _dataset(setup.data, setup.clients, setup.seed)
    return Loaded(task, clients_of(dataset, model), held_out(dataset, model), warnings)


def prepared(config: bytes, flags: bytes, model: FunctionalModel, dataset: FederatedDataset) -> Loaded:
    """As `load`, of a model and a data set in memory."""
    task, warnings = _prepared(config, flags, model)
    return Loaded(task, clients_of(dataset, model), held_out(dataset, model), warnings)


def _prepared(config: bytes, flags: bytes, model: FunctionalModel) -> tuple[PreparedTask, tuple[str, ...]]:
    report = task_builder_pb2.TaskReport()
    task = prepare_task(
        lambda: model,
        task_builder_pb2.TaskConfig.FromString(config),
        task_builder_pb2.ExperimentFlags.FromString(flags),
        report,
    )
    if not task.settings.trains:
        raise ConfigInvalid(
            Reason.CONFIG_INVALID, "the configuration only evaluates", remedy="simulate one with a training task"
        )
    return task, tuple(report.warnings)


@lru_cache(maxsize=1)
def _dataset(data: str, clients: int, seed: int) -> FederatedDataset:
    return load_dataset(data, clients, seed)


@lru_cache(maxsize=1)
def _model(model: str, seed: int) -> FunctionalModel:
    if model in SAMPLE_MODELS:
        sample = SAMPLE_MODELS[model]
        return functional_model_from_keras(build_seeded(sample, seed), sample.loss_fn(), sample.input_spec())
    path = Path(model)
    if not path.exists():
        raise ArtifactInvalid(
            Reason.SAVED_MODEL_INVALID,
            f"there is no saved model at {model}",
            remedy=f"name a SavedModel directory, a zip archive of one, or {', '.join(SAMPLE_MODELS)}",
        )
    if path.is_dir():
        return _saved_model(path)
    with tempfile.TemporaryDirectory(prefix="fedcompute-model-") as scratch, path.open("rb") as archive:
        return _saved_model(unpack(archive.read(MAX_ARCHIVE_BYTES + 1), Path(scratch)))


def _saved_model(directory: Path) -> FunctionalModel:
    check_saved_model(directory)
    return load_functional_model(directory)
