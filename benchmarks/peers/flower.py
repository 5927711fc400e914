"""Flower: its simulation on Ray with FedAvg, 1,000 virtual nodes of which 50 are sampled in a round, no evaluation.

One process is one actor with every core, several are actors of one core each. A round lasts from the strategy's
`configure_train` to the end of its `aggregate_train`. The sampled nodes train the clients that the workload names.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

import torch
from flower_client import app as client_app
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation
from pytorch_models import accuracy, model_of
from workload import CLIENTS, CLIP_NORM, COHORT, NOISE_MULTIPLIER, Array, answer, load, read_arguments


class NamedClients(FedAvg):
    """Federated averaging whose sampled nodes are told which client's examples to train."""

    def __init__(self, cohorts: Array, **options: Any) -> None:
        super().__init__(**options)
        self._cohorts = cohorts

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sampled = super().configure_train(server_round, arrays, config, grid)
        for message, client in zip(sampled, self._cohorts[server_round - 1].tolist(), strict=True):
            named = ConfigRecord({**config, "client": client})
            content = RecordDict({"arrays": arrays, "config": named})
            yield Message(content, message.metadata.dst_node_id, message.metadata.message_type)


def main() -> None:
    begun = time.perf_counter()
    arguments = read_arguments()
    workload = load(arguments.data, arguments.model)
    module = model_of(workload)
    cores = os.cpu_count() or 1
    each = cores if arguments.processes == 1 else 1
    averaging = NamedClients(
        workload.cohorts,
        fraction_train=COHORT / CLIENTS,
        fraction_evaluate=0.0,
        min_train_nodes=COHORT,
        min_available_nodes=CLIENTS,
    )
    strategy: Any = averaging
    if arguments.private:
        strategy = DifferentialPrivacyServerSideFixedClipping(averaging, NOISE_MULTIPLIER, CLIP_NORM, COHORT)
    starts: list[float] = []
    seconds: list[float] = []
    configure, aggregate = strategy.configure_train, strategy.aggregate_train

    def configure_train(*told: Any) -> Iterable[Message]:
        starts.append(time.perf_counter())
        return configure(*told)

    def aggregate_train(*told: Any) -> Any:
        result = aggregate(*told)
        seconds.append(time.perf_counter() - starts[-1])
        return result

    strategy.configure_train, strategy.aggregate_train = configure_train, aggregate_train
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Any) -> None:
        config = {"data": str(arguments.data.resolve()), "model": arguments.model, "threads": each}
        result = strategy.start(
            grid, ArrayRecord(module.state_dict()), arguments.rounds, train_config=ConfigRecord(config)
        )
        module.load_state_dict(result.arrays.to_torch_state_dict())

    with tempfile.TemporaryDirectory(prefix="flower-", ignore_cleanup_errors=True) as directory:
        ray = {"num_cpus": max(cores, arguments.processes), "object_store_memory": 512 << 20, "_temp_dir": directory}
        resources = {"num_cpus": each, "num_gpus": 0.0}
        backend: Any = {"init_args": ray, "client_resources": resources}
        run_simulation(server_app, client_app, CLIENTS, backend_config=backend)
    versions = {name: version(name) for name in ("flwr", "ray")} | {"torch": torch.__version__}
    answer(seconds, starts[0] - begun, accuracy(module, workload), versions)


if __name__ == "__main__":
    main()
