"""One simulated task from its first round to its last, with what it spent."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fedcompute.errors import OperationFailed, Reason
from fedcompute.fleet.simulation.jobs import RoundFacts, RunJob, RunResult
from fedcompute.fleet.simulation.rounds import Measure, SimulatedRound, simulate, spent
from fedcompute.fleet.simulation.setup import Loaded, load
from fedcompute.fleet.simulation.slice_sums import SumSlices, in_threads, in_workers, local_training
from fedcompute.privacy.ledger import Event
from fedcompute.server.executors import Executor


def run(job: RunJob, on_round: Callable[[RoundFacts], None], executor: Executor | None = None) -> RunResult:
    """Runs a job on the threads of this process, or its clients on the workers of `executor`.

    Raises what `setup.load` and `rounds.simulate` do, and OperationFailed (SETTINGS_INVALID) for more rounds than the
    task has, whose noise is not made for them.
    """
    loaded = load(job.setup)
    rounds = _rounds(loaded, job.rounds)
    measure = None if loaded.held_out is None else Measure(loaded.task, loaded.held_out)
    facts, releases = [], list[tuple[Event, ...]]()
    with ThreadPoolExecutor(job.threads or os.cpu_count() or 1) as pool:
        summed: SumSlices = (
            in_threads(loaded.task.process, local_training(job.setup), pool)
            if executor is None
            else in_workers(job.setup, executor)
        )
        for one in simulate(
            *(loaded.task, loaded.clients, summed),
            rounds=rounds,
            seed=job.setup.seed,
            measure=measure,
            every=job.every,
        ):
            facts.append(_facts(one))
            releases.extend([one.events] if one.number else [])
            on_round(facts[-1])
    epsilon = spent(loaded.task, releases)
    return RunResult(tuple(facts), epsilon, loaded.task.accounting.parameters.delta, loaded.warnings)


def _rounds(loaded: Loaded, wanted: int | None) -> int:
    configured = loaded.task.settings.rounds
    if wanted is not None and wanted > configured:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"{wanted} rounds of a task that has {configured}",
            remedy="raise num_max_training_rounds in the configuration: the noise is made for that many",
        )
    return configured if wanted is None else wanted


def _facts(one: SimulatedRound) -> RoundFacts:
    return RoundFacts(one.number, one.seconds, one.contributions, dict(one.rejected), dict(one.metrics))
