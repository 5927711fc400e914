import asyncio
import os
import resource

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage.blobs import open_blob_store
from fedcompute.storage.staged_files import PART_BYTES, _StagedFile, write_staged

DATA = bytes(range(256)) * (5 * PART_BYTES // 512)


def pieces(size):
    return [DATA[start : start + size] for start in range(0, len(DATA), size)]


async def stream(chunks):
    for chunk in chunks:
        yield chunk


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("size", [997, 65_536, PART_BYTES, PART_BYTES + 1, len(DATA)])
def test_bytes_lie_in_the_file_as_they_came_whatever_their_pieces(tmp_path, size):
    place = tmp_path / "new" / "folder" / "object"
    asyncio.run(write_staged(place, stream([b"", *pieces(size), b""]), patience=1.0))
    assert place.read_bytes() == DATA
    assert names(tmp_path) == ["object"]


def test_an_older_file_is_read_whole_until_the_new_one_is(tmp_path):
    place = tmp_path / "object"
    place.write_bytes(b"old")
    seen = []

    async def chunks():
        for piece in pieces(PART_BYTES):
            seen.append((place.read_bytes(), len(names(tmp_path))))
            yield piece

    with place.open("rb") as reader:
        asyncio.run(write_staged(place, chunks(), patience=1.0))
        assert reader.read() == b"old"
    assert {content for content, _ in seen} == {b"old"}
    assert max(files for _, files in seen) == 2
    assert place.read_bytes() == DATA


def test_parts_are_on_the_disk_before_the_last_one_comes(tmp_path):
    staged = []

    async def chunks():
        for piece in pieces(PART_BYTES):
            yield piece
        staged.extend(path.stat().st_size for path in tmp_path.iterdir())

    asyncio.run(write_staged(tmp_path / "object", chunks(), patience=1.0))
    assert staged
    assert len(DATA) - staged[0] < PART_BYTES


def test_what_is_written_after_a_file_was_given_up_is_dropped(tmp_path):
    staged = _StagedFile(tmp_path / "object")
    staged.write(bytearray(b"x"))
    staged.discard()
    staged.write(bytearray(b"y"))
    staged.finish(bytearray(b"z"))
    staged.discard()
    assert names(tmp_path) == []


def test_a_folder_that_is_removed_meanwhile_costs_that_file_only(tmp_path):
    place = tmp_path / "folder" / "object"

    async def chunks():
        yield DATA
        (path,) = place.parent.iterdir()
        path.unlink()
        place.parent.rmdir()
        yield DATA

    with pytest.raises(FileNotFoundError):
        asyncio.run(write_staged(place, chunks(), patience=1.0))
    asyncio.run(write_staged(place, stream([b"x"]), patience=1.0))
    assert place.read_bytes() == b"x"


def test_a_disk_that_takes_no_more_is_a_typed_error_and_leaves_nothing(tmp_path):
    blobs = open_blob_store(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PART_BYTES, hard))
    try:
        with pytest.raises(OperationFailed) as caught:
            asyncio.run(blobs.put_stream("gradient", "a/b", stream(pieces(65_536)), len(DATA)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert names(tmp_path) == []
    assert not blobs.exists("gradient", "a/b")


def test_files_are_as_readable_as_those_that_the_library_writes(tmp_path):
    blobs = open_blob_store(str(tmp_path))
    mask = os.umask(0o027)
    try:
        blobs.put("gradient", "a/put", b"x")
        asyncio.run(blobs.put_stream("gradient", "b/streamed", stream([b"x"]), 1))
    finally:
        os.umask(mask)
    for first, second in (("a/put", "b/streamed"), ("a", "b")):
        put, streamed = (tmp_path / "gradient" / one for one in (first, second))
        assert streamed.stat().st_mode == put.stat().st_mode
