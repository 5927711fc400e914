"""Noise that outlives a round: where it begins, how it rests, and who sees it."""

import secrets

import numpy as np
import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.noise_state import SEALED, begin_noise, open_noise, seal_noise, without_noise
from fedcompute.learning.process import client_checkpoint, read_state, round_update
from fedcompute.learning.specification import OWN, initial_state, training_process
from fedcompute.privacy.noise import SeededNoise, SystemNoise
from fedcompute.protos import learning_pb2
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import LeafSpec

WEIGHTS = [LeafSpec("", (3, 2), np.dtype(np.float32)), LeafSpec("", (2,), np.dtype(np.float32))]
KEY = secrets.token_bytes(32)
LIMIT = 1 << 20
TREE = learning_pb2.TreeAggregation(clip_norm=1.0, noise_multiplier=0.5, report_goal=4, zeroing_norm=100.0)
ADAPTIVE_TREE = learning_pb2.AdaptiveTree(
    initial_clip_norm=1.0,
    noise_multiplier=0.3,
    report_goal=4,
    zeroing_norm=100.0,
    target_quantile=0.5,
    learning_rate=0.2,
    restart_period=4,
    restart_offset=2,
)
BANDED = learning_pb2.BandedMatrixFactorization(
    clip_norm=1.0, noise_multiplier=0.5, report_goal=4, coefficients=[1.0, 0.5, 0.25]
)
FIXED = learning_pb2.FixedGaussian(clip_norm=1.0, noise_multiplier=0.5, report_goal=4)
LASTING = pytest.mark.parametrize("aggregator", [TREE, ADAPTIVE_TREE, BANDED])


def process_of(aggregator):
    return training_process(
        algorithm=learning_pb2.LearningProcess.FED_AVG,
        trainable=WEIGHTS,
        non_trainable=[],
        server_optimizer=learning_pb2.Sgd(learning_rate=1.0),
        aggregator=aggregator,
        metrics=[],
    )


def initial(process):
    return initial_state(process, [np.zeros(spec.shape, np.float32) for spec in WEIGHTS], [])


def empty_total(process, state):
    from fedcompute.learning.contribution import clip_norm_told, empty_sum

    return empty_sum(process, b"", clip_norm_told(process, client_checkpoint(process, state)))


def after(process, rounds, noise):
    state = begin_noise(process, initial(process), noise)
    for _ in range(rounds):
        state = round_update(process, state, empty_total(process, state), noise).state
    return state


@LASTING
def test_what_is_stored_shows_no_noise_and_opens_to_every_bit_of_it(aggregator):
    process = process_of(aggregator)
    first, second = after(process, 3, SeededNoise(1)), after(process, 3, SeededNoise(2))
    stored = seal_noise(first, KEY, "a/1/s/0/checkpoint")
    assert [name for name in stored if name.startswith(OWN)] == [SEALED]
    # Beside released weights and the sealed leaf, stored states of different noise are equal.
    other = seal_noise(second, KEY, "a/1/s/0/checkpoint")
    differing = {name for name in stored if stored[name].tobytes() != other[name].tobytes()}
    assert differing <= {SEALED, *(name for name in stored if "global_model_weights" in name)} | {
        name for name in stored if name.endswith(("clip_value", "current_estimate", "stddev"))
    }
    opened = open_noise(read_checkpoint(write_checkpoint(stored)), KEY, "a/1/s/0/checkpoint", LIMIT)
    assert opened.keys() == first.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(opened[name], value)
        assert opened[name].dtype == value.dtype
    ours = round_update(process, read_state(process, opened), empty_total(process, opened), SeededNoise(3))
    theirs = round_update(process, first, empty_total(process, first), SeededNoise(3))
    for name, value in theirs.state.items():
        np.testing.assert_array_equal(ours.state[name], value)


@LASTING
def test_sealed_noise_opens_neither_with_another_key_nor_at_another_place_nor_when_changed(aggregator):
    process = process_of(aggregator)
    stored = seal_noise(after(process, 2, SystemNoise()), KEY, "here")
    changed = bytearray(stored[SEALED].item())
    changed[-1] ^= 1
    for key, place, leaf in [
        (secrets.token_bytes(32), "here", stored[SEALED]),
        (KEY, "there", stored[SEALED]),
        (KEY, "here", np.array(bytes(changed), object)),
        (KEY, "here", np.array(b"", object)),
        (KEY, "here", np.array(b"\x01short", object)),
    ]:
        with pytest.raises(ArtifactInvalid) as refusal:
            open_noise({**stored, SEALED: leaf}, key, place, LIMIT)
        assert refusal.value.reason is Reason.SECRET_UNREADABLE
    with pytest.raises(ArtifactInvalid):
        open_noise({**stored, SEALED: np.zeros(3, np.float32)}, KEY, "here", LIMIT)


@LASTING
def test_noise_that_a_checkpoint_brings_along_protects_nobody_and_is_replaced(aggregator):
    process = process_of(aggregator)
    foreign = after(process, 3, SeededNoise(1))
    begun = begin_noise(process, foreign, SeededNoise(9))
    result = round_update(process, begun, empty_total(process, begun), SeededNoise(4))
    assert {event.step for event in result.events} == {1}
    noisy = [name for name in begun if name.startswith(OWN) and begun[name].ndim]
    assert noisy
    for name in noisy:
        assert not np.array_equal(begun[name], foreign[name])


@LASTING
def test_a_state_that_was_stripped_of_its_noise_takes_part_in_no_round(aggregator):
    process = process_of(aggregator)
    stripped = without_noise(after(process, 3, SystemNoise()))
    with pytest.raises(ArtifactInvalid) as refusal:
        round_update(process, stripped, empty_total(process, stripped), SystemNoise())
    assert refusal.value.reason is Reason.STATE_MISMATCH


def test_a_mechanism_whose_noise_ends_with_the_round_has_nothing_to_seal():
    process = process_of(FIXED)
    state = after(process, 1, SystemNoise())
    assert seal_noise(state, KEY, "here").keys() == state.keys()
    assert begin_noise(process, state, SystemNoise()).keys() == state.keys()
    assert isinstance(empty_total(process, state), PartialSum)


def test_a_builders_state_holds_no_noise():
    for aggregator in (TREE, ADAPTIVE_TREE, BANDED):
        state = initial(process_of(aggregator))
        assert not any(name.startswith(OWN) for name in state)
        noise = [v for k, v in state.items() if "level_buffer/" in k or k.endswith("level_buffer") or "previous" in k]
        assert not any(value.any() for value in noise)
