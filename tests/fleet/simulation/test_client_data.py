from collections import OrderedDict

import numpy as np
import pytest

from fedcompute.device.developer.examples import training_example
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.fleet.simulation.client_data import clients_of, held_out
from fedcompute.fleet.simulation.client_records import has_records, read_clients
from fedcompute.models.datasets import FederatedDataset
from fedcompute.models.functional_model import FunctionalModel


def model_with(x_spec, y_spec):
    return FunctionalModel((), (), x_spec, y_spec, lambda *_: None, lambda *_: None)


@pytest.fixture(scope="module")
def tf():
    import tensorflow

    return tensorflow


def dataset_of(counts, tests=0):
    def part(count):
        return np.full((count, 28, 28, 1), count, np.float32), np.arange(count)

    clients = {str(number): part(count) for number, count in enumerate(counts)}
    return FederatedDataset("images", clients, *part(tests), 10)


def write_records(tf, path, examples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example if isinstance(example, bytes) else training_example(example))


def test_images_come_in_the_shape_and_type_that_the_model_takes(tf):
    flat = model_with(tf.TensorSpec([None, 784]), tf.TensorSpec([None, 1], tf.int32))
    found = clients_of(dataset_of([2, 3]), flat)
    assert (found.x.shape, found.x.dtype, found.y.shape, found.y.dtype) == ((5, 784), np.float32, (5, 1), np.int32)
    assert found.starts.tolist() == [0, 2, 5]
    assert found.counts.tolist() == [2, 3]
    assert (found.x[2:] == 3).all()
    assert found.y[:, 0].tolist() == [0, 1, 0, 1, 2]


def test_held_out_examples_come_in_blocks_that_cover_them(tf):
    model = model_with(tf.TensorSpec([None, 28, 28, 1]), tf.TensorSpec([None, 1], tf.int64))
    found = held_out(dataset_of([1], tests=600), model)
    assert found.counts.sum() == 600
    assert found.counts.max() <= 256
    assert held_out(dataset_of([1]), model) is None


def test_a_model_of_other_inputs_is_refused_with_both_shapes(tf):
    model = model_with(tf.TensorSpec([None, 100]), tf.TensorSpec([None, 1], tf.int64))
    with pytest.raises(ArtifactInvalid, match=r"\[28, 28, 1\].*\[100\]"):
        clients_of(dataset_of([1]), model)
    several = OrderedDict(age=tf.TensorSpec([None, 1]), pixels=tf.TensorSpec([None, 784]))
    with pytest.raises(ArtifactInvalid, match="'age', 'pixels'"):
        clients_of(dataset_of([1]), model_with(several, model.y_spec))


def test_clients_are_read_from_the_records_that_devices_would_hold(tf, tmp_path):
    features = OrderedDict(age=tf.TensorSpec([None, 1]), codes=tf.TensorSpec([None, 2], tf.int32))
    model = model_with(features, tf.TensorSpec([None, 1], tf.float32))
    for client, count in (("b", 2), ("a", 1), ("c", 3)):
        rows = [{"age": [float(row)], "codes": [row, count], "clicked": [1.0]} for row in range(count)]
        write_records(tf, tmp_path / f"{client}.tfrecord", rows)
    write_records(tf, tmp_path / "held_out/x.tfrecord", [{"age": [9.0], "codes": [7, 8], "clicked": [0.0]}])
    assert has_records(tmp_path)
    assert not has_records(tmp_path / "nowhere")

    clients, test = read_clients(tmp_path, 2, model, "clicked")
    assert clients.counts.tolist() == [1, 2]
    assert list(clients.x) == ["age", "codes"]
    assert clients.x["codes"].tolist() == [[0, 1], [0, 2], [1, 2]]
    assert clients.x["codes"].dtype == np.int32
    assert (test.x["age"].tolist(), test.y.tolist()) == ([[9.0]], [[0.0]])


@pytest.mark.parametrize("damage", ["missing feature", "no example", "no record", "too few"])
def test_bad_records_are_refused_by_the_name_of_their_file(damage, tf, tmp_path):
    model = model_with(tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1], tf.int64))
    file = tmp_path / "client.tfrecord"
    bad = {"missing feature": {"x": [1.0, 2.0]}, "no example": b"secret words"}.get(damage, {"x": [1.0, 2.0], "y": 1})
    write_records(tf, file, [{"x": [1.0, 2.0], "y": 1}, bad])
    if damage == "no record":
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactInvalid) as caught:
        read_clients(tmp_path, 2 if damage == "too few" else 1, model, "")
    assert caught.value.reason is Reason.DATASET_MALFORMED
    assert ("1 files" if damage == "too few" else "client.tfrecord") in caught.value.detail
    assert "secret" not in caught.value.detail
