"""What a privacy report says beyond the ledger: read from the server, where there is one."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.learning.plans import parse_plan, read_plan
from fedcompute.monitoring.operator_api import OperatorApi
from fedcompute.monitoring.task_privacy import PlanFacts
from fedcompute.privacy.banded import column_norm
from fedcompute.protos import learning_pb2
from fedcompute.server.graph_plans.plan import carries_graphs

# Of how many other tasks the names of metrics are asked for.
_MOST_TASKS = 20


def plan_facts(api: OperatorApi, population: str, task_id: int, others: Iterable[int] = ()) -> PlanFacts:
    """The promise of a task's plan, how many devices a round may hold, and the metrics of it and of `others` by name.

    Raises OperationFailed as `OperatorApi`, NOT_FOUND for a task that is no more. A plan that cannot be read promises
    nothing.
    """
    view = api.task(population, task_id)
    names = {task_id: _metric_names(view)}
    for other in [number for number in others if number != task_id][:_MOST_TASKS]:
        names[other] = _metric_names_of(api, population, other)
    stored = api.plan(population, task_id)
    most = int(view["task"].get("max_aggregation_size") or 0) or None
    return facts_of(_process(stored), names, most, has_graphs=_has_graphs(stored))


def facts_of(
    process: learning_pb2.LearningProcess,
    metric_names: Mapping[int, tuple[str, ...]],
    most_devices: int | None,
    *,
    has_graphs: bool,
) -> PlanFacts:
    """What the plan of `process` promises, for a report."""
    claim, banded = process.privacy_claim, process.banded_mf
    promised = process.HasField("privacy_claim")
    return PlanFacts(
        known=True,
        promised_epsilon=claim.epsilon if promised else None,
        promised_rounds=claim.rounds if promised else None,
        column_norm=column_norm(banded.coefficients) if process.HasField("banded_mf") else None,
        metric_names=metric_names,
        most_devices=most_devices,
        has_graphs=has_graphs,
    )


def _process(plan: bytes) -> learning_pb2.LearningProcess:
    try:
        return read_plan(plan).learning_process
    except ArtifactInvalid:
        return learning_pb2.LearningProcess()


def _has_graphs(plan: bytes) -> bool:
    try:
        return carries_graphs(parse_plan(plan))
    except ArtifactInvalid:
        return False


def _metric_names_of(api: OperatorApi, population: str, task_id: int) -> tuple[str, ...]:
    try:
        return _metric_names(api.task(population, task_id))
    except OperationFailed as error:
        # Entries outlive their tasks.
        if error.reason is not Reason.NOT_FOUND:
            raise
        return ()


def _metric_names(view: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(metric["name"]) for metric in view["metrics"]))
