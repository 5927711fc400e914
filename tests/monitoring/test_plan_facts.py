"""What a privacy report reads from a task's plan and metrics."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from fedcompute.learning.specification import training_process
from fedcompute.monitoring.plan_facts import plan_facts
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.tensors.tree import LeafSpec


def api(process, metrics=("loss",)):
    """Answers as a server would; a real one would need a model to build and rounds to pass."""
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()])
    if process is not None:
        plan.learning_process.CopyFrom(process)
    rows = [{"name": name, "iteration_id": number, "value": 0.5} for number in (1, 2) for name in metrics]
    view = {"task": {"max_aggregation_size": 13}, "metrics": rows}
    return SimpleNamespace(
        task=lambda population, task_id: view, plan=lambda population, task_id: plan.SerializeToString()
    )


def process_of(claim=None, **aggregator):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", (2,), np.dtype(np.float32))],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.BandedMatrixFactorization(**aggregator) if aggregator else learning_pb2.UniformMean(),
        metrics=[],
        privacy_claim=claim,
    )


def test_the_promise_and_the_matrix_come_from_the_plan():
    claim = learning_pb2.PrivacyClaim(epsilon=7.5, rounds=40, delta=1e-6)
    process = process_of(claim, clip_norm=1, noise_multiplier=2, report_goal=10, coefficients=[1.0, -0.5])
    facts = plan_facts(api(process), "digits", 1, [1, 2])
    assert facts.known
    assert (facts.promised_epsilon, facts.promised_rounds, facts.most_devices) == (7.5, 40, 13)
    assert facts.column_norm == pytest.approx(math.sqrt(1.25))
    assert facts.metric_names == {1: ("loss",), 2: ("loss",)}


@pytest.mark.parametrize(("phase", "expected"), [("server_phase", True), ("server_phase_v2", True), (None, False)])
def test_a_server_half_of_graphs_is_a_fact(phase, expected):
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()])
    if phase is not None:
        getattr(plan.phase[0], phase).name = "any"
    asked = api(None)
    asked.plan = lambda population, task_id: plan.SerializeToString()
    assert plan_facts(asked, "digits", 1).has_graphs is expected


@pytest.mark.parametrize("process", [None, process_of()], ids=["a plan of the reference", "a task without noise"])
def test_a_plan_without_a_claim_promises_nothing(process):
    facts = plan_facts(api(process), "digits", 1)
    assert facts.known
    assert facts.promised_epsilon is None
    assert facts.column_norm is None
