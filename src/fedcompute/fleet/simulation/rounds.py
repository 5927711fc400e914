"""Rounds of a task in memory, with the learning and privacy code of a server."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fedcompute.builder.preparation import PreparedTask
from fedcompute.fleet.simulation.client_data import ClientData
from fedcompute.fleet.simulation.cohorts import cohorts, slices
from fedcompute.fleet.simulation.local_training import LocalTraining
from fedcompute.fleet.simulation.slice_sums import SumSlices, slice_sum, width_of
from fedcompute.learning.contribution import clip_norm_told, empty_sum
from fedcompute.learning.noise_state import begin_noise
from fedcompute.learning.process import client_checkpoint, round_update
from fedcompute.learning.specification import evaluation_process, initial_state
from fedcompute.privacy.composition import TaskReleases, epsilon
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.noise import Draw, DrawnNoise, NoiseSource, RecordedNoise, SeededNoise, SilentNoise
from fedcompute.protos import learning_pb2
from fedcompute.server.rounds.spending import has_noise
from fedcompute.tensors.tree import Tensors

# Held-out examples are measured in batches of this size: no metric depends on it.
_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class SimulatedRound:
    """A round's outcome: metrics by released name, those of held-out examples among them where they were measured.

    `state`: the server state after it. `seconds`: of training, summing up and updating; measuring is not in it.
    """

    number: int
    seconds: float
    contributions: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, float]
    state: Tensors
    events: tuple[Event, ...]


class Measure:
    """Measures models on held-out examples, with the metrics of the task; traces with the first call."""

    def __init__(self, task: PreparedTask, data: ClientData) -> None:
        self._process = evaluation_process(task.process, task.metrics)
        # Nobody's data: exact, at no cost.
        self._process.ClearField("metric_noise")
        settings = replace(task.client, batch_size=_EVALUATION_BATCH, max_batches=-1)
        self._blocks = range(len(data.counts))
        self._training = LocalTraining(
            self._process, task.model, settings, data, width=len(self._blocks), compiled=False
        )

    def __call__(self, state: Tensors) -> dict[str, float]:
        """Released name -> value at `state`."""
        told = client_checkpoint(self._process, state)
        total = slice_sum(self._process, self._training, told, self._blocks).total
        return dict(round_update(self._process, state, total, SilentNoise()).metrics)


def simulate(
    task: PreparedTask,
    clients: ClientData,
    summed: SumSlices,
    *,
    rounds: int,
    seed: int = 0,
    measure: Measure | None = None,
    every: int = 1,
) -> Iterator[SimulatedRound]:
    """Runs rounds of the task, each with exactly `report_goal` of the clients, and yields them as they end.

    `seed` decides cohorts and noise, so that equal arguments give equal rounds. `measure` looks at the model of each
    `every`th round, the last one, and the untrained one, which comes as round 0. Raises OperationFailed
    (SETTINGS_INVALID) for too few clients.

    Formal guarantees: none about the clients, whose noise is seeded. The rounds are those of a server: the same
    bounds, the same mechanisms, the same events.
    """
    process = task.process
    policies = task.settings.config.policies
    chosen = cohorts(
        clients.counts,
        size=task.settings.report_goal,
        minimum_examples=policies.data_availability_policy.min_example_count,
        minimum_separation=policies.min_separation_policy.minimum_separation,
        seed=seed,
    )
    noise = SeededNoise(seed)
    state: Tensors = begin_noise(process, initial_state(process, task.model.trainable, task.model.non_trainable), noise)
    if measure is not None:
        yield SimulatedRound(0, 0.0, 0, {}, measure(state), state, ())
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        told, cohort = client_checkpoint(process, state), slices(next(chosen), width_of(process))
        with _drawn(process, state, noise) as draws:
            found = summed(told, cohort)
        result = round_update(process, state, found.total, DrawnNoise(draws, noise))
        state, metrics = result.state, dict(result.metrics)
        seconds = time.perf_counter() - start
        if measure is not None and (number % every == 0 or number == rounds):
            metrics |= measure(state)
        events = (*result.events, *result.metric_events)
        yield SimulatedRound(number, seconds, found.total.num_inputs, found.rejected, metrics, state, events)


@contextmanager
def _drawn(process: learning_pb2.LearningProcess, state: Tensors, noise: NoiseSource) -> Iterator[Sequence[Draw]]:
    """A round's noise, drawn while clients train, as a server does: it is there when the block ends.

    Formal guarantees: those of `noise`, whose draws come in the order of a round that draws them itself.
    """
    recorded = RecordedNoise(noise)
    if not has_noise(process):
        yield recorded.draws
        return
    nobody = empty_sum(process, b"", clip_norm_told(process, client_checkpoint(process, state)))
    with ThreadPoolExecutor(1) as ahead:
        drawing = ahead.submit(round_update, process, state, nobody, recorded)
        yield recorded.draws
        drawing.result()


def spent(task: PreparedTask, releases: Sequence[Sequence[Event]]) -> float | None:
    """Epsilon of rounds with these events, at the configuration's delta and under its assumption; None without DP.

    Formal guarantees: as `privacy.composition.epsilon`, for a task that runs so with noise that nobody knows.
    """
    if not any(releases):
        return None
    dp = task.accounting.parameters
    return epsilon([TaskReleases(releases, dp.assumption)], dp.delta)
