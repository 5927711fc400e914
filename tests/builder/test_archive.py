import io
import stat
import zipfile

import pytest

from fedcompute.builder import archive
from fedcompute.builder.archive import MAX_CONFIG_BYTES, config_in_archive, is_archive, pack_directory, unpack
from fedcompute.errors import ArtifactInvalid


def zipped(entries) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in entries:
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    (directory / "variables").mkdir(parents=True)
    (directory / "saved_model.pb").write_bytes(b"graph")
    (directory / "variables" / "variables.index").write_bytes(b"index")
    return directory


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "unpacked"
    path.mkdir()
    return path


def test_a_packed_directory_unpacks_to_the_same_files(model, target):
    data = pack_directory(model)
    assert data == pack_directory(model)
    unpacked = unpack(data, target)
    assert (unpacked / "saved_model.pb").read_bytes() == b"graph"
    assert (unpacked / "variables/variables.index").read_bytes() == b"index"


def test_a_model_in_the_one_directory_of_an_archive_is_found(target):
    data = zipped([("saved_model/saved_model.pb", b""), ("__MACOSX/x", b"")])
    assert unpack(data, target) == target / "saved_model"


def test_an_archive_or_directory_without_a_model_is_refused(tmp_path, target):
    with pytest.raises(ArtifactInvalid, match=r"saved_model\.pb"):
        unpack(zipped([("a", b"")]), target)
    with pytest.raises(ArtifactInvalid, match=r"saved_model\.pb"):
        pack_directory(tmp_path)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a\\..\\x", "C:/x", "a/" * 20 + "x"])
def test_an_entry_that_leaves_its_place_is_refused(target, name):
    with pytest.raises(ArtifactInvalid, match="unsafe entry"):
        unpack(zipped([("saved_model.pb", b""), (name, b"")]), target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_link_is_refused(target):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ArtifactInvalid, match="unsafe entry"):
        unpack(zipped([("saved_model.pb", b""), (link, b"/etc/passwd")]), target)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_comes_twice_is_refused(target):
    with pytest.raises(ArtifactInvalid):
        unpack(zipped([("saved_model.pb", b"a"), ("saved_model.pb", b"b")]), target)


def test_an_archive_that_unpacks_too_large_is_stopped_whatever_it_claims(target, monkeypatch):
    # A smaller limit, since a gigabyte of zeros would take a test too long.
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(ArtifactInvalid, match="more than 1000 bytes"):
        unpack(zipped([("saved_model.pb", b"\0" * 600), ("b", b"\0" * 600)]), target)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"no zip at all" * 100])
def test_what_is_no_archive_is_refused(target, data):
    with pytest.raises(ArtifactInvalid, match="cannot be read"):
        unpack(data, target)


def test_a_damaged_archive_is_refused(model, target):
    data = bytearray(pack_directory(model))
    data[45] ^= 0xFF
    with pytest.raises(ArtifactInvalid, match="cannot be read"):
        unpack(bytes(data), target)


@pytest.mark.parametrize("name", ["task.pbtxt", "fcp_server_config.json", "bundle/config.textproto", "a.TXT"])
def test_the_configuration_beside_a_model_is_found(name, tmp_path):
    data = zipped([("model/saved_model.pb", b"graph"), ("model/assets/words.txt", b""), (name, b"mode: EVAL_ONLY")])
    bundle = io.BytesIO(data)
    assert is_archive(bundle)
    assert config_in_archive(bundle) == b"mode: EVAL_ONLY"
    if "/" not in name:
        assert unpack(data, tmp_path).name == "model"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["saved_model.pb", "variables/a.txt", ".hidden.json"], "found: none"),
        (["a.pbtxt", "b.json"], "found: a.pbtxt, b.json"),
    ],
)
def test_none_or_several_configurations_are_refused_by_name(files, words):
    with pytest.raises(ArtifactInvalid, match=words):
        config_in_archive(io.BytesIO(zipped([(name, b"") for name in files])))


def test_a_damaged_or_oversized_configuration_does_no_harm():
    data = zipped([("a.pbtxt", b"#" * (MAX_CONFIG_BYTES + 10))])
    assert len(config_in_archive(io.BytesIO(data))) == MAX_CONFIG_BYTES + 1
    with pytest.raises(ArtifactInvalid, match="cannot be read"):
        config_in_archive(io.BytesIO(b"PK\x03\x04 and no more"))
    assert not is_archive(io.BytesIO(b"mode: EVAL_ONLY"))


def test_an_archive_with_too_many_files_is_refused_before_any_is_written(target):
    entries = [("saved_model.pb", b""), *((f"assets/{number}", b"") for number in range(archive.MAX_ENTRIES))]
    with pytest.raises(ArtifactInvalid, match="at most 1000"):
        unpack(zipped(entries), target)
    assert not list(target.iterdir())


def test_a_bomb_of_a_thousandfold_is_stopped_at_the_limit(target, monkeypatch):
    # A smaller limit, since a gigabyte of zeros would take a test too long.
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1 << 20)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("saved_model.pb", bytes(32 << 20))
    assert len(buffer.getvalue()) < 1 << 16
    with pytest.raises(ArtifactInvalid, match="more than 1048576 bytes"):
        unpack(buffer.getvalue(), target)
    assert sum(path.stat().st_size for path in target.rglob("*")) <= 1 << 20
