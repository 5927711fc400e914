import gzip
import struct
import time

import numpy as np
import pytest

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.models.datasets import enlarge, examples, load_dataset, partition
from fedcompute.protos import tensorflow_pb2


def malformed(*arguments):
    with pytest.raises(ArtifactInvalid) as refusal:
        load_dataset(*arguments)
    assert refusal.value.reason == Reason.DATASET_MALFORMED
    return refusal.value.detail


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (30, 28, 28))


@pytest.fixture
def labels():
    return np.arange(30) % 10


def test_digits_have_clients_with_data_and_a_test_set_that_is_nobodys():
    dataset = load_dataset("digits", 40, 7)
    assert len(dataset.clients) == 40
    assert min(len(y) for _, y in dataset.clients.values()) >= 1
    assert sum(len(y) for _, y in dataset.clients.values()) + len(dataset.test_y) == 1797
    assert dataset.num_classes == 10
    x, y = dataset.clients["client-0000"]
    assert x.shape == (len(y), 28, 28, 1)
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert 0 <= x.min() < x.max() <= 1
    trained = {image.tobytes() for images, _ in dataset.clients.values() for image in images}
    assert not trained & {image.tobytes() for image in dataset.test_x}


def test_the_same_seed_gives_the_same_clients_and_another_seed_gives_others():
    first, again, other = (load_dataset("digits", 10, seed) for seed in (1, 1, 2))
    for name, (x, y) in first.clients.items():
        np.testing.assert_array_equal(x, again.clients[name][0])
        np.testing.assert_array_equal(y, again.clients[name][1])
    assert any(not np.array_equal(y, other.clients[name][1]) for name, (_, y) in first.clients.items())


def test_clients_see_different_mixtures_of_labels():
    dataset = load_dataset("digits", 10, 1)
    shares = [np.bincount(y, minlength=10) / len(y) for _, y in dataset.clients.values()]
    assert np.abs(np.array(shares) - 0.1).max() > 0.15


@pytest.mark.parametrize("num_clients", [1, 7, 100])
def test_a_partition_covers_every_example_once_and_leaves_no_client_empty(num_clients):
    parts = partition(np.arange(100) % 3, num_clients, np.random.default_rng(0))
    assert len(parts) == num_clients
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(100))


def test_enlarging_keeps_constants_and_range_and_interpolates_between_pixel_centres():
    ramp = np.tile(np.arange(8, dtype=np.float32), (1, 8, 1))
    large = enlarge(ramp)[0, :, :, 0]
    np.testing.assert_allclose(large[0], np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7), rtol=1e-5)
    np.testing.assert_allclose(enlarge(np.full((1, 8, 8), 0.25, np.float32)), 0.25)


def test_examples_carry_pixels_and_label(images, labels):
    x = (images[..., None] / 255).astype(np.float32)
    serialized = examples(x, labels)
    example = tensorflow_pb2.Example.FromString(serialized[3])
    np.testing.assert_array_equal(np.float32(example.features.feature["x"].float_list.value), x[3].ravel())
    assert list(example.features.feature["y"].int64_list.value) == [3]


def test_examples_parse_in_tensorflow(images, labels):
    tf = pytest.importorskip("tensorflow")
    x = (images[..., None] / 255).astype(np.float32)
    features = {"x": tf.io.FixedLenFeature([28, 28, 1], tf.float32), "y": tf.io.FixedLenFeature([1], tf.int64)}
    parsed = tf.io.parse_example(examples(x, labels), features)
    np.testing.assert_array_equal(parsed["x"], x)
    np.testing.assert_array_equal(parsed["y"][:, 0], labels)


def test_too_many_or_no_clients_are_refused():
    assert "too few" in malformed("digits", 5000, 0)
    assert "at least 1" in malformed("digits", 0, 0)


def test_a_name_that_is_no_data_set_is_refused(tmp_path):
    malformed("digit", 2, 0)
    malformed(str(tmp_path), 2, 0)


def test_the_mnist_test_images_load_as_a_set_of_their_own(mnist_path):
    dataset = load_dataset(str(mnist_path), 20, 0)
    assert len(dataset.test_y) == 2000
    assert sum(len(y) for _, y in dataset.clients.values()) == 8000


def test_both_splits_are_used_plain_or_gzipped(tmp_path, images, labels):
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images[:5])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels[:5])
    dataset = load_dataset(str(tmp_path), 3, 0)
    assert sum(len(y) for _, y in dataset.clients.values()) == 30
    assert len(dataset.test_y) == 5
    originals = {(image / np.float32(255)).astype(np.float32).tobytes() for image in images}
    assert {image.tobytes() for image in dataset.test_x} <= originals


def test_emnist_images_are_turned_upright(tmp_path, images, labels):
    write_idx(tmp_path / "emnist-digits-train-images-idx3-ubyte", images)
    write_idx(tmp_path / "emnist-digits-train-labels-idx1-ubyte", labels)
    x, _ = load_dataset(str(tmp_path), 1, 0).clients["client-0000"]
    upright = {(image.T / np.float32(255)).astype(np.float32).tobytes() for image in images}
    assert {image.tobytes() for image in x} <= upright


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:3], lambda data: b"", lambda data: b"x" + data]
)
def test_a_truncated_or_foreign_idx_file_is_refused(tmp_path, images, labels, suffix, damage):
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write_idx(path, images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    path.write_bytes(damage(path.read_bytes()))
    malformed(str(tmp_path), 2, 0)


def test_an_idx_file_that_announces_too_much_is_refused_without_reading_it(tmp_path, images):
    header = bytes((0, 0, 8, 1)) + struct.pack(">I", 0xFFFFFFFF)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(100_000_000), 1))
    start = time.monotonic()
    assert "the limit is" in malformed(str(tmp_path), 2, 0)
    assert time.monotonic() - start < 2


def test_incomplete_and_unequal_splits_are_refused(tmp_path, images, labels):
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    assert "lacks" in malformed(str(tmp_path), 2, 0)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels[:-1])
    assert "30 images and 29 labels" in malformed(str(tmp_path), 2, 0)


@pytest.fixture
def emnist(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "fed_emnist.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for writer in range(6):
            group = file.create_group(f"examples/f{writer:04d}_01")
            group["pixels"] = rng.random((10, 28, 28), np.float32)
            group["label"] = rng.integers(0, 10, 10).astype(np.int32)
    return path


def test_federated_emnist_keeps_its_writers_as_clients(emnist):
    dataset = load_dataset(str(emnist), 4, 0)
    assert len(dataset.clients) == 4
    assert all(name.startswith("f000") for name in dataset.clients)
    assert all(len(y) == 8 for _, y in dataset.clients.values())
    assert dataset.test_x.shape == (8, 28, 28, 1)
    trained = {image.tobytes() for images, _ in dataset.clients.values() for image in images}
    assert not trained & {image.tobytes() for image in dataset.test_x}


def test_too_few_writers_and_damaged_hdf5_files_are_refused(emnist):
    import h5py

    assert "6 writers" in malformed(str(emnist), 7, 0)
    with h5py.File(emnist, "a") as file:
        del file["examples/f0000_01/label"]
    malformed(str(emnist), 6, 0)
    emnist.write_bytes(emnist.read_bytes()[:1000])
    malformed(str(emnist), 6, 0)
    emnist.write_bytes(b"no HDF5")
    malformed(str(emnist), 6, 0)
