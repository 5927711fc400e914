"""Metric sums as a part of the budget, and sums that no batching changes."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcompute.learning.contribution import add, empty_sum, noised_metric_leaves, read_contribution
from fedcompute.learning.process import metrics_json, read_metrics, round_update
from fedcompute.learning.specification import evaluation_process, initial_state, training_process
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.noise import SeededNoise, SilentNoise
from fedcompute.protos import learning_pb2
from fedcompute.tensors.partial_sum import decode, encode, merge
from fedcompute.tensors.tree import LeafSpec

WEIGHTS = [LeafSpec("", (2, 2), np.dtype(np.float32))]
TREE = learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=0.5, report_goal=4, zeroing_norm=100.0)
FIXED = learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=0.5, report_goal=4)
CLIP = 50.0


def process_of(aggregator=FIXED, noise=1.0):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=WEIGHTS,
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=aggregator,
        metrics=["binary_accuracy"],
        metric_noise=learning_pb2.MetricNoise(clip_norm=CLIP, noise_multiplier=noise),
    )


def update_for(process, seed=0, examples=20.0, scale=0.1, zeroed=0):
    generator, made = np.random.default_rng(seed), {}
    for leaf in process.updates:
        shape = tuple(dim.size for dim in leaf.spec.shape.dim)
        match leaf.role:
            case learning_pb2.UpdateLeaf.METRIC:
                made[leaf.spec.name] = np.array(examples, np.float32)
            case learning_pb2.UpdateLeaf.ZEROED:
                made[leaf.spec.name] = np.array(zeroed, np.int32)
            case _:
                made[leaf.spec.name] = generator.normal(size=shape).astype(np.float32) * np.float32(scale)
    return made


def total_of(process, updates, clip_norm=1.0):
    total = empty_sum(process, b"", clip_norm)
    for update in updates:
        total = add(total, read_contribution(process, update, clip_norm))
    return total


def start(process):
    return initial_state(process, [np.zeros(spec.shape, np.float32) for spec in WEIGHTS], [])


@pytest.mark.parametrize("examples", [1.0, 20.0, 1e6, 3e30])
def test_one_device_moves_the_metric_sums_by_at_most_their_clip_norm(examples):
    process = process_of()
    one = total_of(process, [update_for(process, examples=examples)])
    step = one.steps[noised_metric_leaves(process)[0]]
    moved = [int(v) for name in noised_metric_leaves(process) for v in one.lattice[name].ravel()]
    norm = sum(Fraction(v) ** 2 for v in moved) * Fraction(step) ** 2
    assert norm <= Fraction(CLIP) ** 2
    assert examples < 2 or norm > 0


@pytest.mark.parametrize("aggregator", [FIXED, TREE])
def test_noised_metrics_are_a_release_of_their_own_with_its_event(aggregator):
    from fedcompute.learning.noise_state import begin_noise

    process = process_of(aggregator)
    state = begin_noise(process, start(process), SeededNoise(0))
    total = total_of(process, [update_for(process, seed, scale=0 if seed else 0.1) for seed in range(4)])
    result = round_update(process, state, total, SeededNoise(1))
    assert result.metric_events == (GaussianEvent(1.0),)
    assert len(result.events) == 1
    exact = round_update(process, state, total, SilentNoise())
    assert exact.metrics["server/client_work/train/binary_accuracy"] == pytest.approx(1.0)
    assert (
        result.metrics["server/client_work/train/binary_accuracy"]
        != exact.metrics["server/client_work/train/binary_accuracy"]
    )


def test_the_noise_on_metric_sums_has_the_stated_deviation():
    process = process_of()
    total = total_of(process, [update_for(process, examples=20.0)] * 4)
    counts = []
    source = SeededNoise(2)
    for _ in range(400):
        # binary_accuracy is total / count: their noise shows in the ratio's numerator for a fixed denominator.
        result = round_update(process, start(process), total, source)
        counts.append(result.metrics["server/client_work/train/loss"])
    assert np.std(counts) > 0.1
    silent = round_update(process, start(process), total, SilentNoise()).metrics["server/client_work/train/loss"]
    assert np.median(counts) == pytest.approx(silent, abs=0.3)


def test_an_evaluation_noises_its_metrics_too_and_leaves_the_model():
    training = process_of()
    process = evaluation_process(training, ["binary_accuracy"])
    assert process.HasField("metric_noise")
    total = total_of(process, [update_for(process)] * 4, clip_norm=None)
    assert set(total.lattice) == set(noised_metric_leaves(process))
    result = round_update(process, start(training), total, SeededNoise(1))
    assert result.metric_events == (GaussianEvent(1.0),)
    assert result.events == ()


def test_a_count_of_zeroed_devices_is_noised_with_the_metrics():
    process = process_of(TREE)
    assert any(name == "update/2" for name in noised_metric_leaves(process))
    total = total_of(process, [update_for(process, scale=0, zeroed=1)] * 3)
    assert "update/2" in total.lattice


def test_without_the_option_metric_sums_stay_as_they_are():
    process = process_of()
    process.ClearField("metric_noise")
    total = total_of(process, [update_for(process)] * 3)
    assert set(total.lattice) == {"update/1/0"}
    assert round_update(process, start(process), total, SeededNoise(1)).metric_events == ()


def test_a_metrics_file_is_read_as_it_was_written():
    written = {"server/eval/loss": float("nan"), "server/eval/binary_accuracy": 0.25}
    read = read_metrics(metrics_json(written))
    assert np.isnan(read["server/eval/loss"])
    assert read["server/eval/binary_accuracy"] == 0.25


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_no_order_and_no_batching_of_contributions_changes_a_bit_of_a_lattice_sum(random, sizes):
    process = process_of()
    updates = [update_for(process, seed, examples=float(seed)) for seed in range(sum(sizes))]
    straight = total_of(process, updates)
    random.shuffle(updates)
    batches, at = [], 0
    for size in sizes:
        # Through their stored form, as between jobs.
        batches.append(decode(encode(total_of(process, updates[at : at + size]))))
        at += size
    random.shuffle(batches)
    merged = batches[0]
    for batch in batches[1:]:
        merged = merge(merged, batch)
    assert merged.num_inputs == straight.num_inputs
    assert merged.lattice.keys() == straight.lattice.keys()
    for name, leaf in straight.lattice.items():
        assert merged.lattice[name].tobytes() == leaf.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 3), st.integers(0, 1000), st.floats(0, 1e9))
def test_a_neighbouring_sum_differs_by_at_most_the_sensitivity_whatever_the_device_sends(scale, seed, examples):
    from fedcompute.errors import UploadRejected

    process = process_of()
    base = [update_for(process, s) for s in range(3)]
    without = total_of(process, base)
    try:
        neighbour = total_of(process, [*base, update_for(process, seed, examples, scale)])
    except UploadRejected:
        return
    for names, bound in ((["update/1/0"], 1.0), (noised_metric_leaves(process), CLIP)):
        step = Fraction(without.steps[names[0]])
        moved = [neighbour.lattice[name] - without.lattice[name] for name in names]
        squared = sum(Fraction(int(v)) ** 2 for leaf in moved for v in leaf.ravel()) * step**2
        assert squared <= Fraction(bound) ** 2
