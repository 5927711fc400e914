import numpy as np
import pytest

from fedcompute.errors import Reason, UploadRejected
from fedcompute.learning.contribution import add, empty_sum, judge, read_contribution, rules_of
from fedcompute.learning.specification import training_process
from fedcompute.privacy.clipping import clip_factor, global_norm
from fedcompute.privacy.lattice import lattice_for
from fedcompute.protos import learning_pb2
from fedcompute.tensors.checkpoint import CheckpointLimits, write_checkpoint
from fedcompute.tensors.reader import CheckpointReader
from fedcompute.tensors.tree import LeafSpec

# Longer than the blocks in which leaves are looked at and added.
SHAPES = [(300, 301), (70_001,), (3,), ()]
CLIP_NORM = 1.5
LARGEST = np.finfo(np.float32).max


def process_of(clip_norm):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=[LeafSpec("", shape, np.dtype(np.float32)) for shape in SHAPES],
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=learning_pb2.UniformMean()
        if clip_norm is None
        else learning_pb2.FixedGaussian(clip_norm=clip_norm, noise_multiplier=1.0, report_goal=10),
        metrics=("sparse_categorical_accuracy",),
    )


def update_of(process, seed, norm=1.0):
    """An update whose deltas have a norm together, and the names of the deltas."""
    generator = np.random.default_rng(seed)
    update, deltas = {}, []
    for leaf in process.updates:
        shape = tuple(dim.size for dim in leaf.spec.shape.dim)
        if leaf.role == learning_pb2.UpdateLeaf.COUNT:
            update[leaf.spec.name] = np.array(1, np.int32)
        else:
            update[leaf.spec.name] = np.asarray(generator.standard_normal(shape), np.float32)
        if leaf.role == learning_pb2.UpdateLeaf.DELTA:
            deltas.append(leaf.spec.name)
    scale = np.float32(norm / global_norm({name: update[name] for name in deltas}))
    return update | {name: np.asarray(update[name] * scale) for name in deltas}, deltas


def sum_of(process, updates, clip_norm):
    """By rules that serve for all of them, from files, whose leaves lie at any byte."""
    rules, reader = rules_of(process, clip_norm), CheckpointReader(CheckpointLimits())
    total = empty_sum(process, b"digest", clip_norm)
    for update in updates:
        total = add(total, judge(rules, reader.read(write_checkpoint(update))))
    return total


def refusal_of(process, update, clip_norm):
    with pytest.raises(UploadRejected) as refusal:
        read_contribution(process, update, clip_norm)
    return refusal.value


def test_a_float_sum_is_bit_for_bit_that_of_whole_arrays():
    process = process_of(None)
    updates = [update_of(process, seed)[0] for seed in range(4)]
    total = sum_of(process, updates, None)
    assert not total.lattice
    for name, real in total.real.items():
        expected = np.zeros(real.shape)
        for update in updates:
            expected = expected + update[name].astype(np.float64)
        assert real.tobytes() == expected.tobytes()


@pytest.mark.parametrize("norm", [0.5, CLIP_NORM, CLIP_NORM * (1 + 5e-5)])
def test_a_lattice_sum_is_bit_for_bit_that_of_whole_arrays(norm):
    process = process_of(CLIP_NORM)
    made = [update_of(process, seed, norm) for seed in range(4)]
    total = sum_of(process, [update for update, _ in made], CLIP_NORM)
    step = lattice_for(CLIP_NORM).step
    for name in made[0][1]:
        expected = np.zeros(total.lattice[name].shape, np.int64)
        for update, deltas in made:
            leaves = {one: update[one] for one in deltas}
            factor = clip_factor(global_norm(leaves), sum(leaf.size for leaf in leaves.values()), CLIP_NORM)
            expected += np.trunc(update[name].astype(np.float64) * factor / step).astype(np.int64)
        assert total.lattice[name].tobytes() == expected.tobytes()
    for name, real in total.real.items():
        assert real == sum(float(update[name]) for update, _ in made)


@pytest.mark.parametrize("clip_norm", [None, CLIP_NORM])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 65_535, 65_536, 70_000])
def test_a_value_that_is_not_finite_is_found_wherever_it_lies(clip_norm, value, place):
    process = process_of(clip_norm)
    update, deltas = update_of(process, 0)
    leaf = update[deltas[1]].copy()
    leaf[place] = value
    refusal = refusal_of(process, update | {deltas[1]: leaf}, clip_norm)
    assert refusal.reason is Reason.NOT_FINITE
    assert deltas[1] in refusal.detail


def test_opposite_infinities_do_not_hide_each_other():
    process = process_of(None)
    update, deltas = update_of(process, 0)
    leaf = np.array([np.inf, -np.inf, 0], np.float32)
    assert refusal_of(process, update | {deltas[2]: leaf}, None).reason is Reason.NOT_FINITE


@pytest.mark.parametrize("clip_norm", [None, CLIP_NORM])
def test_the_largest_floats_are_finite_and_beyond_every_clip_norm(clip_norm):
    process = process_of(clip_norm)
    update, deltas = update_of(process, 0)
    update[deltas[2]] = np.array([LARGEST, -LARGEST, LARGEST], np.float32)
    if clip_norm is not None:
        assert refusal_of(process, update, clip_norm).reason is Reason.NORM_TOO_LARGE
        return
    total = add(empty_sum(process, b"", None), read_contribution(process, update, None))
    np.testing.assert_array_equal(total.real[deltas[2]], update[deltas[2]].astype(np.float64))


@pytest.mark.parametrize("clip_norm", [None, CLIP_NORM])
def test_of_two_faults_the_one_that_comes_first_in_the_file_is_named(clip_norm):
    process = process_of(clip_norm)
    update, deltas = update_of(process, 0)
    misshapen = np.zeros(5, np.float32)
    infinite = [np.full(shape, np.inf, np.float32) for shape in SHAPES]
    first = update | {deltas[0]: infinite[0], deltas[1]: misshapen}
    assert refusal_of(process, first, clip_norm).reason is Reason.NOT_FINITE
    second = update | {deltas[0]: misshapen, deltas[1]: infinite[1]}
    assert refusal_of(process, second, clip_norm).reason is Reason.WRONG_LEAF_SHAPE
