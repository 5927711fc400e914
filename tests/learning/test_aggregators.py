"""Aggregators over several rounds: what must hold between one release and the next."""

import math

import numpy as np
import pytest

from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.learning.contribution import add, clip_norm_told, empty_sum, read_contribution
from fedcompute.learning.noise_state import begin_noise, without_noise
from fedcompute.learning.process import client_checkpoint, read_state, round_update
from fedcompute.learning.specification import initial_state, state_specs, training_process, zero_state
from fedcompute.privacy.ledger import GaussianEvent, TreeEvent
from fedcompute.privacy.noise import SeededNoise, SilentNoise
from fedcompute.protos import learning_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import LeafSpec

WEIGHTS = [LeafSpec("", (3, 2), np.dtype(np.float32)), LeafSpec("", (2,), np.dtype(np.float32))]
GOAL = 4
TREE = learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=0.5, report_goal=GOAL, zeroing_norm=100.0)
ADAPTIVE_TREE = learning_pb2.AdaptiveTree(
    initial_clip_norm=1.0,
    noise_multiplier=0.3,
    report_goal=GOAL,
    zeroing_norm=100.0,
    target_quantile=0.5,
    learning_rate=0.2,
    restart_period=4,
    restart_offset=2,
)
ADAPTIVE = learning_pb2.AdaptiveGaussian(
    initial_clip_norm=1.0, noise_multiplier=0.3, report_goal=GOAL, target_quantile=0.5, learning_rate=0.2
)


def process_of(aggregator, algorithm=learning_pb2.LearningProcess.FED_AVG):
    return training_process(
        algorithm=algorithm,
        trainable=WEIGHTS,
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=aggregator,
        metrics=[],
    )


def start(process, noise=None):
    state = initial_state(process, [np.zeros(spec.shape, np.float32) for spec in WEIGHTS], [])
    return begin_noise(process, state, noise or SeededNoise(1))


def update_for(process, seed, norm=0.5, **scalars):
    generator = np.random.default_rng(seed)
    raw = [generator.normal(size=spec.shape) for spec in WEIGHTS]
    length = math.sqrt(sum(float((leaf * leaf).sum()) for leaf in raw))
    deltas = iter((leaf * norm / length).astype(np.float32) for leaf in raw)
    roles = learning_pb2.UpdateLeaf
    made = {}
    for leaf in process.updates:
        match leaf.role:
            case roles.DELTA:
                made[leaf.spec.name] = next(deltas)
            case roles.BELOW_ESTIMATE:
                made[leaf.spec.name] = np.array(scalars.get("bit", 0.5), np.float32)
            case roles.ZEROED:
                made[leaf.spec.name] = np.array(scalars.get("zeroed", 0), np.int32)
            case roles.WEIGHT:
                made[leaf.spec.name] = np.array(scalars.get("weight", 3.0), np.float32)
            case _:
                made[leaf.spec.name] = np.ones((), leaf_dtype(leaf))
    return made


def leaf_dtype(leaf):
    return np.int32 if leaf.role == learning_pb2.UpdateLeaf.COUNT else np.float32


def total_of(process, state, updates):
    clip_norm = clip_norm_told(process, client_checkpoint(process, state))
    total = empty_sum(process, b"", clip_norm)
    for update in updates:
        total = add(total, read_contribution(process, update, clip_norm))
    return total


def run(process, rounds, state=None, noise=None, through_files=True, **scalars):
    state, noise = state or start(process), noise or SeededNoise(2)
    results = []
    for number in range(rounds):
        total = total_of(process, state, [update_for(process, 10 * number + i, **scalars) for i in range(GOAL)])
        results.append((total, round_update(process, state, total, noise)))
        checkpoint = results[-1][1].checkpoint()
        state = read_state(process, read_checkpoint(write_checkpoint(checkpoint)) if through_files else checkpoint)
    return results, state


def test_prefix_sums_of_tree_releases_are_the_sums_with_rounded_prefix_noise_bit_for_bit():
    process = process_of(TREE)
    results, _ = run(process, 9)
    silent, _ = run(process, 9, state=start(process, SilentNoise()), noise=SilentNoise())
    leaf, weights = "update/1/0", "server/global_model_weights/trainable/0"
    step = results[0][0].steps[leaf]
    plain = np.cumsum([total.lattice[leaf] for total, _ in results], axis=0)
    for number, (_, result) in enumerate(results):
        added = result.state["server/fedcompute/tree/added/0"]
        # The model is minus the prefix sum over the goal, up to the float32 of its weights.
        expected = -(plain[number] + added) * step / GOAL
        np.testing.assert_allclose(result.state[weights], expected, atol=2e-6)
        assert result.events == (TreeEvent(0.5, number + 1),)
    np.testing.assert_allclose(silent[-1][1].state[weights], -plain[-1] * step / GOAL, atol=2e-6)
    assert any(np.abs(result.state["server/fedcompute/tree/added/0"]).max() > 0 for _, result in results)


def test_a_tree_state_without_our_own_leaves_is_read_by_rounding():
    process = process_of(TREE)
    _, state = run(process, 3)
    foreign = {name: value for name, value in state.items() if not name.startswith("server/fedcompute/")}
    total = total_of(process, state, [update_for(process, 99)])
    ours = round_update(process, state, total, SeededNoise(3)).state
    theirs = round_update(process, foreign, total, SeededNoise(3)).state
    for index in (0, 1):
        name = f"server/global_model_weights/trainable/{index}"
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


def test_an_adaptive_tree_restarts_with_the_estimate_of_its_clip_norm():
    process = process_of(ADAPTIVE_TREE)
    path = "server/aggregator/inner_agg/query_state/numerator_state"
    clip = f"{path}/inner_query_state/sum_state/clip_value"
    estimate = f"{path}/inner_query_state/quantile_estimator_state/current_estimate"
    results, _ = run(process, 7)
    clips = [float(result.state[clip]) for _, result in results]
    estimates = [float(result.state[estimate]) for _, result in results]
    assert clips[0] == 1.0
    # After rounds 2 and 6: counter modulo 4 is 2.
    assert clips[1:5] == [estimates[1]] * 4
    assert clips[5:] == [estimates[5]] * 2
    assert [result.events[0].step for _, result in results] == [1, 2, 1, 2, 3, 4, 1]
    assert [result.events[0].step for _, result in results] == [result.events[1].step for _, result in results]
    steps = {total.steps["update/1/sum_state/0"] for total, _ in results}
    assert all(math.frexp(step)[0] == 0.5 for step in steps)
    names = list(results[0][1].metrics)
    assert names == [
        "server/client_work/train/loss",
        "server/aggregator/zeroing/dp_query_metrics/current_clip",
        "server/aggregator/zeroing/dp_query_metrics/estimate_clip",
        "server/aggregator/zeroing_norm",
        "server/aggregator/zeroed_count",
        "server/finalizer/update_non_finite",
    ]


def test_an_adaptive_clip_norm_falls_while_devices_stay_below_it_and_rises_while_they_do_not():
    process = process_of(ADAPTIVE)
    clip = "server/aggregator/query_state/numerator_state/sum_state/l2_norm_clip"
    quiet = {"noise": SilentNoise(), "norm": 1e-3}
    below = [float(result.state[clip]) for _, result in run(process, 4, bit=0.5, **quiet)[0]]
    above = [float(result.state[clip]) for _, result in run(process, 4, bit=-0.5, **quiet)[0]]
    np.testing.assert_allclose(below, np.exp(-0.1 * np.arange(1, 5)), rtol=1e-6)
    np.testing.assert_allclose(above, np.exp(0.1 * np.arange(1, 5)), rtol=1e-6)
    (_, result), *_ = run(process, 1)[0]
    assert all(isinstance(event, GaussianEvent) for event in result.events)
    assert sum(event.noise_multiplier**-2 for event in result.events) == pytest.approx(0.3**-2, rel=1e-5)
    assert result.state["server/aggregator/query_state/numerator_state/sum_state/stddev"] > 0


def test_a_weighted_mean_weighs_devices_by_their_examples():
    process = process_of(learning_pb2.WeightedMean(), learning_pb2.LearningProcess.FED_SGD)
    updates = [update_for(process, 1, weight=1.0), update_for(process, 2, weight=5.0)]
    result = round_update(process, start(process), total_of(process, start(process), updates), SilentNoise())
    expected = -(updates[0]["update/1/0"] + updates[1]["update/1/0"]) / 6
    np.testing.assert_allclose(result.state["server/global_model_weights/trainable/0"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("aggregator", "scalars"),
    [
        (ADAPTIVE, {"bit": 0.3}),
        (ADAPTIVE_TREE, {"bit": -0.6}),
        (TREE, {"zeroed": 2}),
        (TREE, {"zeroed": 1}),
        (learning_pb2.WeightedMean(), {"weight": -1.0}),
    ],
)
def test_a_scalar_that_no_honest_device_sends_is_refused(aggregator, scalars):
    process = process_of(aggregator)
    clip_norm = clip_norm_told(process, client_checkpoint(process, start(process)))
    update = update_for(process, 1, **scalars)
    with pytest.raises(UploadRejected) as refusal:
        read_contribution(process, update, clip_norm)
    assert refusal.value.reason is Reason.WRONG_COUNT


@pytest.mark.parametrize("aggregator", [TREE, ADAPTIVE_TREE])
def test_an_exported_checkpoint_holds_no_noise_of_a_tree_and_the_zero_state_no_level(aggregator):
    process = process_of(aggregator)
    _, state = run(process, 3)
    public = without_noise(state)
    assert not any(name.startswith("server/fedcompute") for name in public)
    noisy = [name for name in public if "previous_tree_noise" in name or "level_buffer" in name]
    assert noisy
    assert not any(public[name].any() for name in noisy if "level_buffer_idx" not in name)
    empty = zero_state(process)
    assert all(value.shape[0] == 0 for name, value in empty.items() if "level_buffer" in name)
    assert read_state(process, empty).keys() == {spec.name for spec in state_specs(process)}


def test_told_without_a_positive_clip_norm_is_refused():
    process = process_of(TREE)
    told = client_checkpoint(process, start(process))
    for wrong in ({}, {**told, "client/2": np.array(0.0, np.float32)}, {**told, "client/2": np.array([1.0])}):
        with pytest.raises(ArtifactInvalid):
            clip_norm_told(process, wrong)
