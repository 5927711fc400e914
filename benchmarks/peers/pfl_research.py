"""pfl-research: its FederatedAveraging, PyTorchModel, FederatedDataset and SimulatedBackend, evaluation switched off.

The users' data rest in PyTorch tensors, one Dataset kept per user, so that its batches are split once. Several
processes are launched by torchrun, which it supports natively (gloo).
"""

import contextlib
import itertools
import logging
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism
from pytorch_models import accuracy, images, model_of
from torch.nn import functional
from workload import (
    BATCH,
    CLIP_NORM,
    COHORT,
    LEARNING_RATE,
    NOISE_MULTIPLIER,
    answer,
    load,
    read_arguments,
)


class Clock(TrainingProcessCallback):
    """Seconds between the ends of iterations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._last = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return False, Metrics()


def main() -> None:
    begun = time.perf_counter()
    logging.disable()
    arguments = read_arguments()
    workload = load(arguments.data, arguments.model)
    module = model_of(workload)
    module.loss = lambda x, y: functional.cross_entropy(module(x), y)
    module.metrics = lambda x, y: {}
    x, y = images(workload.x), torch.from_numpy(workload.y)
    users = [Dataset((x[user], y[user]), user_id=str(user)) for user in range(len(x))]
    order = itertools.chain.from_iterable(workload.cohorts.tolist())
    training = FederatedDataset(users.__getitem__, lambda: next(order))
    private = CentrallyAppliedPrivacyMechanism(GaussianMechanism(CLIP_NORM, NOISE_MULTIPLIER))
    backend = SimulatedBackend(training, training, postprocessors=[private] if arguments.private else [])
    model = PyTorchModel(
        module, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(module.parameters(), 1.0)
    )
    # Iteration 0 is always evaluated; the first iteration that is run is number 1.
    algorithm = FederatedAveraging()
    algorithm._current_central_iteration = 1
    clock = Clock()
    startup = time.perf_counter() - begun
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        algorithm.run(
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=arguments.rounds + 1,
                evaluation_frequency=arguments.rounds + 1,
                train_cohort_size=COHORT,
                val_cohort_size=None,
            ),
            backend=backend,
            model=model,
            model_train_params=NNTrainHyperParams(
                local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH
            ),
            callbacks=[clock],
            send_metrics_to_platform=False,
        )
    if int(os.environ.get("RANK", "0")) == 0:
        versions = {"python": platform.python_version(), "pfl": version("pfl"), "torch": torch.__version__}
        answer(clock.seconds, startup, accuracy(module, workload), versions)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
