import numpy as np
import pytest

from fedcompute.models.softmax_regression import accuracy, local_update, zero_weights


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 2, 3)).astype(np.float32)
    return x, (x.reshape(30, 6) @ generator.normal(size=(6, 4))).argmax(axis=1)


def test_one_step_is_the_slope_of_the_mean_cross_entropy(examples):
    x, y = examples
    weights = [np.random.default_rng(1).normal(size=shape) for shape in ((6, 4), (4,))]

    def loss(matrix, bias):
        logits = x.reshape(30, 6) @ matrix + bias
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(30), y])

    update = local_update(weights, x, y, learning_rate=1.0, steps=1)
    for leaf, place in ((0, (2, 1)), (0, (5, 3)), (1, (0,))):
        shifted = [[weight.copy() for weight in weights] for _ in range(2)]
        shifted[0][leaf][place] += 1e-5
        shifted[1][leaf][place] -= 1e-5
        slope = (loss(*shifted[0]) - loss(*shifted[1])) / 2e-5
        assert update[leaf][place] == pytest.approx(slope, rel=1e-6)


def test_steps_lead_to_the_classes_of_a_separable_set(examples):
    x, y = examples
    start = zero_weights(6, 4)
    moved = [weight - change for weight, change in zip(start, local_update(start, x, y, 1.0, 300), strict=True)]
    assert accuracy(moved, x, y) > 0.95 > accuracy(start, x, y)
    assert not any(weight.any() for weight in start), "the given weights stay as they were"
