"""Task rows of a build (spec/task-builder.md 7.1, 7.2)."""

import uuid

from fedcompute.builder.rules import aggregation_size
from fedcompute.builder.validation import BuildSettings
from fedcompute.protos import task_builder_pb2, task_pb2

TRAINING_TRAFFIC_WEIGHT = 100
MAX_TRAFFIC_WEIGHT = 10_000
MAX_CLIENT_VERSION = "999999999"


def traffic_weight(share: float) -> int:
    """The weight that sends `share` of the devices to evaluation beside a training task of weight 100."""
    if share >= 1:
        return MAX_TRAFFIC_WEIGHT
    return min(MAX_TRAFFIC_WEIGHT, int(share * TRAINING_TRAFFIC_WEIGHT / (1 - share)))


def correlation_id() -> str:
    """A fresh id that the tasks of one group share."""
    return str(uuid.uuid4())


def training_task(settings: BuildSettings, min_client_version: str, correlation: str) -> task_pb2.Task:
    """The training task's row, without what task management assigns."""
    task = _task(settings, settings.report_goal, settings.over_selection_rate, min_client_version, correlation)
    task.info.traffic_weight = TRAINING_TRAFFIC_WEIGHT
    policies = task.info.training_info.eligibility_task_info.eligibility_policies
    configured = settings.config.policies
    # Both are always present, in this order; devices and servers address them by index.
    policies.add().min_sep_policy.minimum_separation = configured.min_separation_policy.minimum_separation
    policies.add().data_availability_policy.min_example_count = configured.data_availability_policy.min_example_count
    return task


def evaluation_task(settings: BuildSettings, min_client_version: str, correlation: str) -> task_pb2.Task:
    """The evaluation task's row; `settings.evaluation` must be set."""
    evaluation = settings.evaluation
    assert evaluation is not None, "mode TRAINING_ONLY has no evaluation task"
    task = _task(settings, evaluation.report_goal, evaluation.over_selection_rate, min_client_version, correlation)
    task.info.traffic_weight = traffic_weight(evaluation.traffic)
    info = task.info.evaluation_info
    info.training_population_name = evaluation.source_population
    info.training_task_id = evaluation.source_task_id
    size, unit = evaluation.selector
    if unit == "hour":
        info.check_point_selector.duration_selector.hours = size
    else:
        info.check_point_selector.iteration_selector.size = size
    return task


def artifact_only_task(urls: task_builder_pb2.ArtifactBuilding, min_client_version: str) -> task_pb2.Task:
    """The row of an artifact-only build: where its three artifacts lie, and nothing else."""
    return task_pb2.Task(
        client_only_plan_url=[urls.client_plan_url],
        server_phase_url=[urls.plan_url],
        init_checkpoint_url=[urls.checkpoint_url],
        min_client_version=min_client_version,
    )


def _task(
    settings: BuildSettings, report_goal: int, over_selection_rate: float, min_client_version: str, correlation: str
) -> task_pb2.Task:
    return task_pb2.Task(
        population_name=settings.population,
        total_iteration=settings.rounds,
        min_aggregation_size=report_goal,
        max_aggregation_size=aggregation_size(report_goal, over_selection_rate),
        min_client_version=min_client_version,
        max_client_version=MAX_CLIENT_VERSION,
        correlation_id=correlation,
    )
