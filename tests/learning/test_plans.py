import math

import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.plans import read_plan
from fedcompute.learning.specification import training_process
from fedcompute.protos import learning_pb2, plan_pb2


def plan_with(aggregator, metric_noise=None):
    process = training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=aggregator,
        metrics=[],
        metric_noise=metric_noise,
    )
    return plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process).SerializeToString()


def banded(*coefficients):
    return learning_pb2.BandedMatrixFactorization(
        clip_norm=1.0, noise_multiplier=1.0, report_goal=2, coefficients=coefficients
    )


@pytest.mark.parametrize("coefficients", [(), (0.5,), (1.0, 0.1), (1.0, 3.0), (1.0, math.nan)])
def test_a_matrix_that_integers_cannot_hold_is_refused_when_the_plan_is_read(coefficients):
    with pytest.raises(ArtifactInvalid) as refusal:
        read_plan(plan_with(banded(*coefficients)))
    assert refusal.value.reason is Reason.PLAN_UNSUPPORTED


@pytest.mark.parametrize(("clip_norm", "noise"), [(0.0, 1.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, 1e9)])
def test_metric_noise_without_a_bound_is_refused_when_the_plan_is_read(clip_norm, noise):
    bound = learning_pb2.MetricNoise(clip_norm=clip_norm, noise_multiplier=noise)
    with pytest.raises(ArtifactInvalid) as refusal:
        read_plan(plan_with(learning_pb2.UniformMean(), bound))
    assert refusal.value.reason is Reason.PLAN_UNSUPPORTED


def test_a_plan_with_bands_and_metric_noise_is_read():
    bound = learning_pb2.MetricNoise(clip_norm=10.0, noise_multiplier=1.0)
    process = read_plan(plan_with(banded(1.0, 0.5), bound)).learning_process
    assert list(process.banded_mf.coefficients) == [1.0, 0.5]
    assert process.metric_noise.clip_norm == 10.0
