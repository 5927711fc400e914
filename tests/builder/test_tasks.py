import pytest

from fedcompute.builder.tasks import evaluation_task, traffic_weight, training_task
from fedcompute.builder.validation import validate
from fedcompute.protos import task_builder_pb2

NO_FLAGS = task_builder_pb2.ExperimentFlags()


def test_a_training_task_carries_sizes_versions_and_both_policies_in_order(config):
    task = training_task(validate(config, NO_FLAGS), "341912000", "group")
    assert (task.population_name, task.total_iteration, task.correlation_id) == ("digits", 20, "group")
    assert (task.min_aggregation_size, task.max_aggregation_size) == (50, 75)
    assert (task.min_client_version, task.max_client_version) == ("341912000", "999999999")
    assert task.info.traffic_weight == 100
    separation, availability = task.info.training_info.eligibility_task_info.eligibility_policies
    assert separation.min_sep_policy.minimum_separation == 3
    assert availability.data_availability_policy.min_example_count == 5


def test_policies_are_present_even_when_nothing_is_configured(config):
    config.policies.ClearField("min_separation_policy")
    config.policies.ClearField("data_availability_policy")
    task = training_task(validate(config, NO_FLAGS), "0", "group")
    kinds = [p.WhichOneof("policy_type") for p in task.info.training_info.eligibility_task_info.eligibility_policies]
    assert kinds == ["min_sep_policy", "data_availability_policy"]


def test_an_evaluation_task_points_at_its_training_task(config):
    task = evaluation_task(validate(config, NO_FLAGS), "0", "group")
    info = task.info.evaluation_info
    assert (info.training_population_name, info.training_task_id) == ("digits", 1)
    assert info.check_point_selector.duration_selector.hours == 2
    assert (task.min_aggregation_size, task.max_aggregation_size, task.total_iteration) == (4, 5, 20)
    assert task.info.traffic_weight == 25


@pytest.mark.parametrize(
    ("share", "weight"), [(0, 0), (0.1, 11), (0.5, 100), (0.9, 900), (0.995, 10_000), (0.99999, 10_000), (1, 10_000)]
)
def test_the_traffic_weight_is_the_share_beside_a_weight_of_100(share, weight):
    assert traffic_weight(share) == weight


@pytest.mark.parametrize(("goal", "rate", "largest"), [(50, 0.5, 75), (1, 0, 1), (10, 0, 13)])
def test_over_selection_truncates(config, goal, rate, largest):
    runtime = config.federated_learning.learning_process.runtime_config
    runtime.report_goal, runtime.over_selection_rate = goal, rate
    assert training_task(validate(config, NO_FLAGS), "0", "group").max_aggregation_size == largest
