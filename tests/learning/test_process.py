import json
import math

import numpy as np
import pytest

from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.learning import plans
from fedcompute.learning.contribution import add, clip_norm_told, empty_sum, read_contribution
from fedcompute.learning.process import (
    client_checkpoint,
    metrics_json,
    metrics_of_checkpoint,
    read_metrics,
    read_state,
    round_update,
)
from fedcompute.learning.specification import (
    evaluation_process,
    initial_state,
    state_specs,
    training_process,
    zero_state,
)
from fedcompute.privacy.noise import SeededNoise, SystemNoise
from fedcompute.protos import learning_pb2, plan_pb2
from fedcompute.tensors.tree import LeafSpec

FLOAT = np.dtype(np.float32)
WEIGHTS = [LeafSpec("", (3, 2), FLOAT), LeafSpec("", (2,), FLOAT)]
GAUSSIAN = learning_pb2.FixedGaussian(clip_norm=0.1, noise_multiplier=0.5, report_goal=2)
ADAM = learning_pb2.Adam(learning_rate=0.5, beta_1=0.9, beta_2=0.999, epsilon=1e-7)


def process_with(aggregator=None, optimizer=None, metrics=("sparse_categorical_accuracy",)):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=WEIGHTS,
        non_trainable=[],
        server_optimizer=optimizer or learning_pb2.Sgd(learning_rate=1.0),
        aggregator=aggregator or learning_pb2.UniformMean(),
        metrics=metrics,
    )


def state_of(process):
    generator = np.random.default_rng(0)
    return initial_state(process, [generator.normal(size=spec.shape).astype(np.float32) for spec in WEIGHTS], [])


def update_for(process, scale=0.01, seed=1):
    generator = np.random.default_rng(seed)
    update = {}
    for leaf in process.updates:
        shape = tuple(dim.size for dim in leaf.spec.shape.dim)
        if leaf.role == learning_pb2.UpdateLeaf.COUNT:
            update[leaf.spec.name] = np.array(1, np.int32)
        elif leaf.role == learning_pb2.UpdateLeaf.METRIC:
            update[leaf.spec.name] = np.array(2.0 if leaf.spec.name.endswith("0") else 4.0, np.float32)
        else:
            update[leaf.spec.name] = (generator.normal(size=shape) * scale).astype(np.float32)
    return update


def total_of(process, updates):
    clip_norm = bound_of(process)
    total = empty_sum(process, b"digest", clip_norm)
    for update in updates:
        total = add(total, read_contribution(process, update, clip_norm))
    return total


def bound_of(process):
    return clip_norm_told(process, client_checkpoint(process, state_of(process)))


def names(leaves):
    return [leaf.client_name for leaf in leaves]


def test_leaf_names_without_dp_are_those_of_the_reference():
    process = process_with()
    assert names(process.broadcasts) == ["client/0/trainable/0", "client/0/trainable/1"]
    assert [leaf.spec.name for leaf in process.updates] == [
        "update/0",
        "update/1/sparse_categorical_accuracy/0",
        "update/1/sparse_categorical_accuracy/1",
        "update/1/loss/0",
        "update/1/loss/1",
        "update/2/0",
        "update/2/1",
    ]
    assert set(state_of(process)) == {
        "server/global_model_weights/trainable/0",
        "server/global_model_weights/trainable/1",
        "server/finalizer/learning_rate",
    }


def test_leaf_names_with_a_fixed_gaussian_are_those_of_the_reference():
    process = process_with(GAUSSIAN)
    assert names(process.broadcasts)[-1] == "client/1"
    assert [leaf.spec.name for leaf in process.updates][-3:] == ["update/0/loss/1", "update/1/0", "update/1/1"]
    state = state_of(process)
    assert {name.removeprefix("server/aggregator/") for name in state if "aggregator" in name} == {
        "query_state/numerator_state/l2_norm_clip",
        "query_state/numerator_state/stddev",
        "query_state/denominator",
        "dp_event/module_name",
        "dp_event/class_name",
        "dp_event/noise_multiplier",
        "is_init_state",
    }
    assert client_checkpoint(process, state)["client/1"] == np.float32(0.1)


def test_an_adam_finalizer_has_the_leaves_of_the_reference():
    leaves = {spec.name for spec in state_specs(process_with(optimizer=ADAM)) if "finalizer" in spec.name}
    scalars = {"learning_rate", "beta_1", "beta_2", "epsilon", "step"}
    slots = {f"{slot}/{index}" for slot in ("accumulator", "preconditioner") for index in (0, 1)}
    assert leaves == {f"server/finalizer/{name}" for name in scalars | slots}


def test_an_evaluation_reads_training_state_and_changes_nothing():
    training = process_with(GAUSSIAN)
    process = evaluation_process(training, ["binary_accuracy"])
    assert [(leaf.client_name, leaf.state_name) for leaf in process.broadcasts] == [
        ("client/0/0/0", "server/global_model_weights/trainable/0"),
        ("client/0/0/1", "server/global_model_weights/trainable/1"),
    ]
    state = read_state(process, state_of(training))
    total = total_of(process, [update_for(process)] * 2)
    assert total.steps == {}
    result = round_update(process, state, total, SystemNoise())
    assert all(result.state[name] is value for name, value in state.items())
    assert result.metrics == {"server/eval/binary_accuracy": 0.5, "server/eval/loss": 0.5}
    assert result.events == ()
    assert all(not np.asarray(value).any() for value in zero_state(process).values() if value.dtype != object)


def test_three_devices_move_the_weights_by_the_mean_of_their_deltas():
    process = process_with()
    state = state_of(process)
    updates = [update_for(process, seed=seed) for seed in range(3)]
    result = round_update(process, state, total_of(process, updates), SystemNoise())
    for index in (0, 1):
        mean = sum(update[f"update/2/{index}"].astype(np.float64) for update in updates) / 3
        name = f"server/global_model_weights/trainable/{index}"
        np.testing.assert_allclose(result.state[name], state[name] - mean, atol=1e-7)
    assert result.metrics["server/finalizer/update_non_finite"] == 0.0
    assert result.metrics["server/client_work/train/sparse_categorical_accuracy"] == 0.5


def test_adam_follows_its_formulas_over_two_rounds():
    process = process_with(optimizer=ADAM)
    state = state_of(process)
    accumulator, preconditioner = np.zeros((3, 2)), np.zeros((3, 2))
    weight = state["server/global_model_weights/trainable/0"].astype(np.float64)
    for step in (1, 2):
        update = update_for(process, seed=step)
        state = round_update(process, state, total_of(process, [update]), SystemNoise()).state
        g = update["update/2/0"].astype(np.float64)
        accumulator = 0.9 * accumulator + 0.1 * g
        preconditioner = 0.999 * preconditioner + 0.001 * g * g
        rate = 0.5 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weight = weight - rate * accumulator / (np.sqrt(preconditioner) + 1e-7)
    np.testing.assert_allclose(state["server/global_model_weights/trainable/0"], weight, atol=1e-5)
    assert state["server/finalizer/step"] == 2


def test_a_gaussian_round_divides_by_the_report_goal_adds_noise_and_says_so():
    process = process_with(GAUSSIAN)
    state = state_of(process)
    updates = [update_for(process, seed=seed) for seed in range(3)]
    total = total_of(process, updates)
    noise = SeededNoise(5)
    result = round_update(process, state, total, SeededNoise(5))
    step = total.steps["update/1/0"]
    assert [event.noise_multiplier for event in result.events] == [pytest.approx(0.5, rel=1e-6)]
    for index, shape in enumerate([(3, 2), (2,)]):
        name = f"server/global_model_weights/trainable/{index}"
        draws = noise.gaussian(0.05 / step, math.prod(shape)).reshape(shape) * step
        exact = sum(update[f"update/1/{index}"].astype(np.float64) for update in updates)
        np.testing.assert_allclose(result.state[name], state[name] - (exact + draws) / 2, atol=1e-6)
    assert not result.state["server/aggregator/is_init_state"]


def test_the_order_of_contributions_changes_no_bit_of_a_lattice_sum():
    process = process_with(GAUSSIAN)
    updates = [update_for(process, seed=seed) for seed in range(7)]
    forward, backward = total_of(process, updates), total_of(process, updates[::-1])
    for name, leaf in forward.lattice.items():
        assert leaf.tobytes() == backward.lattice[name].tobytes()


def test_no_contribution_leaves_the_weights_and_reports_a_non_finite_update():
    process = process_with()
    state = state_of(process)
    result = round_update(process, state, empty_sum(process, b"", None), SystemNoise())
    name = "server/global_model_weights/trainable/0"
    np.testing.assert_array_equal(result.state[name], state[name])
    assert result.metrics["server/finalizer/update_non_finite"] == 1.0
    assert json.loads(metrics_json(result.metrics))["server/client_work/train/loss"] is None


def test_a_metrics_file_is_json_whatever_a_metric_is_called_and_whatever_its_value():
    names = ['say "loss"', "back\\slash", "line\nend", "umlaut ü", "}, {"]
    values = dict(zip(names, [1.5, math.nan, math.inf, -math.inf, 0.0], strict=True))
    written = metrics_json(values)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(written, parse_constant=refuse) == {
        name: value if math.isfinite(value) else None for name, value in values.items()
    }
    assert read_metrics(written).keys() == values.keys()


def test_the_round_checkpoint_carries_state_and_metrics_and_reads_back():
    process = process_with(GAUSSIAN)
    result = round_update(process, state_of(process), total_of(process, [update_for(process)]), SystemNoise())
    checkpoint = result.checkpoint()
    assert checkpoint["metrics/client_work/train/loss"] == np.float32(0.5)
    assert metrics_of_checkpoint(process, checkpoint) == dict(result.metrics)
    assert read_state(process, checkpoint).keys() == result.state.keys()


def broken(change):
    process = process_with(GAUSSIAN if change != "count" else None)
    update = update_for(process)
    match change:
        case "missing":
            del update["update/1/1"]
        case "unknown":
            update["update/9"] = np.zeros(1, np.float32)
        case "shape":
            update["update/1/1"] = np.zeros((3,), np.float32)
        case "type":
            update["update/1/1"] = np.zeros((2,), np.float64)
        case "nan":
            update["update/1/1"] = np.array([0, np.nan], np.float32)
        case "metric":
            update["update/0/loss/0"] = np.array(np.inf, np.float32)
        case "norm":
            update["update/1/1"] = np.array([0.2, 0], np.float32)
        case "count":
            update["update/0"] = np.array(5, np.int32)
    return process, update


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("missing", Reason.WRONG_LEAF_NAMES),
        ("unknown", Reason.WRONG_LEAF_NAMES),
        ("shape", Reason.WRONG_LEAF_SHAPE),
        ("type", Reason.WRONG_LEAF_TYPE),
        ("nan", Reason.NOT_FINITE),
        ("metric", Reason.NOT_FINITE),
        ("norm", Reason.NORM_TOO_LARGE),
        ("count", Reason.WRONG_COUNT),
    ],
)
def test_a_wrong_update_is_rejected_with_its_reason(change, reason):
    process, update = broken(change)
    bound = bound_of(process)
    with pytest.raises(UploadRejected) as refusal:
        read_contribution(process, update, bound)
    assert refusal.value.reason is reason


def test_a_norm_over_the_bound_by_float32_rounding_is_clipped_not_rejected():
    process = process_with(GAUSSIAN)
    update = update_for(process, scale=0)
    update["update/1/1"] = np.array([0.1 * (1 + 5e-5), 0], np.float32)
    step = total_of(process, [update]).lattice["update/1/1"][0]
    assert (
        step * 2.0 ** (math.floor(math.log2(process.fixed_gaussian.clip_norm)) - 30) <= process.fixed_gaussian.clip_norm
    )


def test_a_state_of_another_model_is_refused_by_name():
    state = state_of(process_with())
    state["server/global_model_weights/trainable/1"] = np.zeros(7, np.float32)
    with pytest.raises(ArtifactInvalid, match="trainable/1") as refusal:
        read_state(process_with(), state)
    assert refusal.value.reason is Reason.STATE_MISMATCH


def test_plans_without_a_known_learning_process_are_refused():
    plan = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()], learning_process=process_with(GAUSSIAN))
    assert plans.read_plan(plan.SerializeToString()) == plan
    later = plan_pb2.Plan()
    later.CopyFrom(plan)
    later.learning_process.version = 2
    unknown = plan_pb2.Plan()
    unknown.CopyFrom(plan)
    unknown.learning_process.metrics[0].name = "charm"
    empty = plan_pb2.Plan(phase=[plan_pb2.Plan.Phase()])
    for data, reason in [
        (b"\xff", Reason.PLAN_MALFORMED),
        (b"", Reason.PLAN_MALFORMED),
        (empty.SerializeToString(), Reason.PLAN_UNSUPPORTED),
        (later.SerializeToString(), Reason.PLAN_UNSUPPORTED),
        (unknown.SerializeToString(), Reason.PLAN_UNSUPPORTED),
    ]:
        with pytest.raises(ArtifactInvalid) as refusal:
            plans.read_plan(data)
        assert refusal.value.reason is reason
