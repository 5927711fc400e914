from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedcompute.builder.client_graph import ClientSettings
from fedcompute.builder.client_optimizers import ADAM, SGD
from fedcompute.fleet.simulation.client_data import ClientData
from fedcompute.fleet.simulation.local_training import LocalTraining
from fedcompute.learning.process import client_checkpoint
from fedcompute.learning.specification import initial_state, training_process
from fedcompute.models.functional_model import functional_model_from_keras
from fedcompute.models.zoo import SAMPLE_MODELS, build_seeded
from fedcompute.protos import learning_pb2
from fedcompute.tensors.tree import LeafSpec

FED_AVG, FED_SGD = learning_pb2.LearningProcess.FED_AVG, learning_pb2.LearningProcess.FED_SGD


def model_of(name):
    sample = SAMPLE_MODELS[name]
    return functional_model_from_keras(build_seeded(sample, 1), sample.loss_fn(), sample.input_spec())


@pytest.fixture(scope="module")
def linear():
    return model_of("digits-linear")


def process_of(model, algorithm=FED_AVG):
    return training_process(
        algorithm=algorithm,
        trainable=[LeafSpec(str(i), w.shape, w.dtype) for i, w in enumerate(model.trainable)],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.FixedGaussian(clip_norm=0.1, noise_multiplier=1.0, report_goal=3),
        metrics=["sparse_categorical_accuracy"],
    )


def data_of(counts):
    generator, total = np.random.default_rng(0), sum(counts)
    x = generator.random((total, 28, 28, 1), np.float32)
    return ClientData(x, generator.integers(0, 10, (total, 1)), np.cumsum([0, *counts]))


def training_of(model, counts, *, optimizer=SGD, algorithm=FED_AVG, max_batches=-1, compiled=None):
    process = process_of(model, algorithm)
    settings = ClientSettings("", 2, max_batches, optimizer, 0.3, b"")
    local = LocalTraining(process, model, settings, data_of(counts), width=3, compiled=compiled)
    return local, client_checkpoint(process, initial_state(process, model.trainable, ()))


@pytest.mark.parametrize(("algorithm", "optimizer"), [(FED_AVG, SGD), (FED_AVG, ADAM), (FED_SGD, SGD)])
def test_compiled_training_gives_the_same_updates(linear, algorithm, optimizer):
    found = []
    for compiled in (False, True):
        local, told = training_of(linear, (4, 2, 0, 6), algorithm=algorithm, optimizer=optimizer, compiled=compiled)
        # Fewer clients than it is made for, one of them with nothing, and the last one at the end of the data.
        found.append([*local.updates(told, [3, 1]), *local.updates(told, [0, 2])])
    for plain, compiled in zip(*found, strict=True):
        assert plain.keys() == compiled.keys()
        for name, value in plain.items():
            np.testing.assert_allclose(compiled[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert any(value.any() for value in found[1][0].values())
    assert not any(value.any() for value in found[1][3].values())


def test_it_compiles_where_every_client_has_whole_batches_and_the_kernels_are_fast(linear):
    assert training_of(linear, (4, 2, 6))[0].compiled
    assert not training_of(linear, (4, 3, 6))[0].compiled
    assert training_of(linear, (4, 5, 6), max_batches=2)[0].compiled
    assert not training_of(model_of("emnist-cnn"), (4, 2, 6))[0].compiled


def test_a_clients_update_depends_on_nobody_else(linear):
    counts = (5, 2, 3, 4, 1)
    local, told = training_of(linear, counts)
    local.prepare()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda clients: local.updates(told, clients), [[0, 1, 2], [3, 4], [2, 0, 4]]))
    alone = [local.updates(told, [client])[0] for client in range(len(counts))]
    for clients, updates in zip([[0, 1, 2], [3, 4], [2, 0, 4]], together, strict=True):
        for client, update in zip(clients, updates, strict=True):
            assert all((update[name] == alone[client][name]).all() for name in update)
