import asyncio
import gzip
import html
import json
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.storage import paths
from fedcompute.storage.blobs import BlobMissing, BlobTooLarge, content_encoding, local_folder, open_blob_store
from fedcompute.storage.keys import TaskKey

TASK = TaskKey("digits:v1.0", 7)


@pytest.fixture(params=["directory", "s3"])
def url(request, tmp_path):
    """A store that nothing was ever put in."""
    if request.param == "directory":
        return str(tmp_path / "blobs")
    return f"s3://{request.getfixturevalue('s3').bucket()}/prefix"


@pytest.fixture
def blobs(url):
    return open_blob_store(url)


@pytest.fixture
def files(url, request):
    """Returns everything that lies in the store, whole or not, by its own account."""

    def directory():
        root = Path(url)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def bucket():
        store = request.getfixturevalue("s3")
        name = url.split("/")[2]
        begun = httpx.get(f"{store.url}/{name}?uploads").text
        assert "<Upload>" not in begun, "a multipart upload was left behind"
        keys = re.findall("<Key>prefix/(.*?)</Key>", httpx.get(f"{store.url}/{name}?list-type=2").text)
        return sorted(html.unescape(key) for key in keys)

    return bucket if url.startswith("s3://") else directory


async def stream(*chunks, fail=None):
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk
    if fail is not None:
        raise fail


def test_the_layout_is_the_one_of_the_protocol():
    assert paths.client_only_plan_path(TASK) == "digits:v1.0/7/0/s/0/client_only_plan"
    assert paths.server_plan_path(TASK) == "digits:v1.0/7/0/s/0/server_phase"
    assert paths.initial_checkpoint_path(TASK) == "digits:v1.0/7/0/s/0/checkpoint"
    assert paths.server_checkpoint_path(TASK, 3) == "digits:v1.0/7/3/s/0/checkpoint"
    assert paths.client_checkpoint_path(TASK, 3) == "digits:v1.0/7/3/d/0/client_checkpoint"
    assert paths.metrics_path(TASK, 3) == "digits:v1.0/7/3/s/0/metrics"
    assert paths.update_path(TASK, 3, "s1") == "digits:v1.0/7/3/d/s1/gradient"
    assert paths.aggregate_path(TASK, 3, "b1") == "digits:v1.0/7/3/s/0/0/b1/gradient"
    assert paths.update_path(TASK, 3, "s1").startswith(paths.updates_prefix(TASK, 3))


def test_an_object_lies_in_its_bucket_and_comes_back(blobs, files, url):
    path = paths.update_path(TASK, 1, "session")
    assert blobs.put("gradient", path, b"update")
    assert files() == [f"gradient/{path}"]
    assert blobs.get("gradient", path, 6) == b"update"
    assert blobs.size("gradient", path) == 6
    assert blobs.exists("gradient", path)
    assert not blobs.exists("model", path)
    assert blobs.put("gradient", path, b"")
    assert blobs.get("gradient", path, 0) == b""
    assert blobs.delete("gradient", path)
    # S3 does not say whether there was anything to delete.
    assert blobs.delete("gradient", path) is url.startswith("s3://")


def test_reading_has_a_limit_and_typed_errors(blobs):
    blobs.put("model", "a/b", b"12345")
    with pytest.raises(BlobTooLarge) as caught:
        blobs.get("model", "a/b", 4)
    assert caught.value.status == 413
    for read in (
        lambda: blobs.get("model", "a/c", 9),
        lambda: blobs.size("model", "a"),
        lambda: blobs.get("model", "a", 9),
    ):
        with pytest.raises(BlobMissing) as missing:
            read()
        assert missing.value.status == 404
    with pytest.raises(BlobMissing):
        asyncio.run(blobs.open_stream("model", "a/c"))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        "./a",
        "a/./b",
        "a\\b",
        "a\0b",
        "a%2e%2e/b",
        "a b",
        "a#1",
        "a?b",
        "é",
        "a/" + "b" * 256,
        "/".join(["a"] * 600),
    ],
)
def test_a_path_that_could_leave_its_bucket_is_refused_everywhere(blobs, files, path):
    operations = [
        lambda: blobs.put("model", path, b"x"),
        lambda: blobs.get("model", path, 1),
        lambda: blobs.exists("model", path),
        lambda: blobs.delete("model", path),
        lambda: asyncio.run(blobs.put_stream("model", path, stream(b"x"), 1)),
        lambda: asyncio.run(blobs.open_stream("model", path)),
        *([lambda: blobs.list("model", path)] if path else []),
    ]
    for operation in operations:
        with pytest.raises(RequestRejected) as caught:
            operation()
        assert caught.value.reason is Reason.MALFORMED_REQUEST
    assert files() == []


@pytest.mark.parametrize("bucket", ["", "..", "a/b", "."])
def test_a_bucket_that_is_no_name_is_refused(blobs, bucket):
    with pytest.raises(RequestRejected):
        blobs.get(bucket, "x", 1)
    with pytest.raises(RequestRejected):
        blobs.list(bucket, "")


def test_of_racers_to_create_an_object_one_wins_and_its_bytes_stay(blobs):
    start = threading.Barrier(8)
    answers = {}

    def race(index):
        start.wait()
        answers[index] = blobs.put("model", "p/1/1/s/0/checkpoint", bytes([index]) * 1000, if_absent=True)

    threads = [threading.Thread(target=race, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [index for index, won in answers.items() if won]
    assert len(winners) == 1
    assert blobs.get("model", "p/1/1/s/0/checkpoint", 1000) == bytes(winners * 1000)


def test_a_folder_is_listed_whole_and_without_its_namesakes(blobs):
    for path in ("p/1/1/d/b/gradient", "p/1/1/d/a/gradient", "p/1/11/d/c/gradient", "p/1/1/dx/gradient"):
        blobs.put("gradient", path, b"x")
    assert blobs.list("gradient", "p/1/1/d") == ["p/1/1/d/a/gradient", "p/1/1/d/b/gradient"]
    assert len(blobs.list("gradient", "")) == 4
    assert blobs.list("gradient", "nobody") == []
    assert blobs.list("model", "") == []
    with pytest.raises(BlobTooLarge):
        blobs.list("gradient", "p", limit=3)


def test_a_streamed_object_comes_back_in_chunks_with_its_encoding(blobs):
    data = gzip.compress(bytes(range(256)) * 40_000, compresslevel=0)

    async def run():
        pieces = [data[start : start + 700_001] for start in range(0, len(data), 700_001)]
        assert await blobs.put_stream("gradient", "a/b", stream(b"", *pieces), len(data)) == len(data)
        opened = await blobs.open_stream("gradient", "a/b", chunk_bytes=1 << 16)
        chunks = [chunk async for chunk in opened.chunks]
        return opened, chunks

    opened, chunks = asyncio.run(run())
    assert (opened.size, opened.content_encoding) == (len(data), "gzip")
    assert b"".join(chunks) == data
    assert len(chunks) > 10


def test_an_empty_stream_is_an_empty_object(blobs):
    async def run():
        assert await blobs.put_stream("gradient", "a/b", stream(), 5) == 0
        opened = await blobs.open_stream("gradient", "a/b")
        return opened.content_encoding, [chunk async for chunk in opened.chunks]

    assert asyncio.run(run()) == (None, [])


@pytest.mark.parametrize("count", [1, 12])
def test_a_stream_beyond_its_limit_leaves_nothing(blobs, files, count):
    chunks = [b"x" * 1_000_000] * count
    with pytest.raises(BlobTooLarge):
        asyncio.run(blobs.put_stream("gradient", "a/b", stream(*chunks), 1_000_000 * count - 1))
    assert files() == []


@pytest.mark.parametrize("error", [RuntimeError("gone"), ConnectionResetError("gone"), OSError("gone")])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_stream_that_breaks_off_leaves_nothing_and_says_why(blobs, files, error, count):
    chunks = [b"x" * 1_000_000] * count
    with pytest.raises(type(error), match="gone"):
        asyncio.run(blobs.put_stream("gradient", "a/b", stream(*chunks, fail=error), 1 << 30))
    assert files() == []


def test_a_canceled_stream_leaves_nothing_and_the_old_object_stays(blobs, files):
    blobs.put("gradient", "a/b", b"old")

    async def forever():
        while True:
            yield b"x" * 1_000_000
            await asyncio.sleep(0.001)

    async def run():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(blobs.put_stream("gradient", "a/b", forever(), 1 << 40), 0.3)
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert files() == ["gradient/a/b"]
    assert blobs.get("gradient", "a/b", 3) == b"old"


def test_a_process_killed_while_it_streams_leaves_no_object(blobs, url):
    program = textwrap.dedent("""
        import asyncio, os, signal, sys
        from fedcompute.storage.blobs import open_blob_store
        async def chunks():
            for _ in range(12):
                yield b"x" * 1_000_000
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(open_blob_store(sys.argv[1]).put_stream("gradient", "a/b", chunks(), 1 << 30))
    """)
    assert subprocess.run([sys.executable, "-c", program, url]).returncode == -9
    assert blobs.list("gradient", "") == []
    assert not blobs.exists("gradient", "a/b")
    assert asyncio.run(blobs.put_stream("gradient", "a/b", stream(b"new"), 3)) == 3
    assert blobs.list("gradient", "") == ["a/b"]
    assert blobs.get("gradient", "a/b", 3) == b"new"


def test_gzip_is_known_by_its_first_three_bytes():
    assert content_encoding(gzip.compress(b"")) == "gzip"
    assert content_encoding(b"\x1f\x8b\x08") == "gzip"
    assert content_encoding(b"\x1f\x8b") is None
    assert content_encoding(b"\x1f\x8b\x00") is None
    assert content_encoding(b"") is None


def test_a_store_that_cannot_be_opened_is_a_settings_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for url in (str(tmp_path / "file"), "ftp://host/x"):
        with pytest.raises(OperationFailed) as caught:
            open_blob_store(url)
        assert caught.value.reason is Reason.SETTINGS_INVALID
        assert str(tmp_path) not in caught.value.detail


def test_a_folder_is_removed_in_slices_and_its_neighbours_stay(blobs, files):
    for name in ("a", "b", "c"):
        blobs.put("gradient", f"p/1/1/d/{name}/gradient", b"x")
    blobs.put("gradient", "p/1/11/d/c/gradient", b"x")
    assert blobs.delete_folder("gradient", "p/1/1", limit=2) == 2
    assert blobs.delete_folder("gradient", "p/1/1", limit=2) == 1
    assert blobs.delete_folder("gradient", "p/1/1", limit=2) == 0
    assert blobs.delete_folder("model", "nobody") == 0
    assert files() == ["gradient/p/1/11/d/c/gradient"]


def test_removed_folders_of_a_directory_leave_no_empty_ones(tmp_path):
    blobs = open_blob_store(str(tmp_path))
    blobs.put("gradient", "p/1/1/d/a/gradient", b"x")
    blobs.put("gradient", "p/1/2/d/a/gradient", b"x")
    blobs.delete_folder("gradient", "p/1/1")
    assert sorted(path.name for path in (tmp_path / "gradient" / "p" / "1").iterdir()) == ["2"]


def test_whoever_fetches_gzip_from_s3_is_told_that_it_is_gzip(s3):
    name = s3.bucket()
    blobs = open_blob_store(f"s3://{name}")
    data = gzip.compress(b"plan")
    blobs.put("model", "whole", data)
    asyncio.run(blobs.put_stream("model", "streamed", stream(data), 100))
    blobs.put("model", "plain", b"plan")
    for path, encoding in (("whole", "gzip"), ("streamed", "gzip"), ("plain", None)):
        answer = httpx.get(blobs.signed_url("GET", "model", path, 60))
        assert (answer.headers.get("content-encoding"), answer.content) == (encoding, b"plan")


def test_a_store_that_creates_only_what_is_absent_passes_its_probe_and_keeps_nothing_of_it(blobs, files):
    blobs.check_writes_once()
    assert files() == []


def test_a_store_that_overwrites_is_refused(s3):
    s3.ignores_conditions = True
    with pytest.raises(OperationFailed) as caught:
        open_blob_store(f"s3://{s3.bucket()}").check_writes_once()
    assert caught.value.reason is Reason.BLOB_STORE_UNSUITABLE


def test_a_store_that_stumbles_is_asked_again(s3):
    blobs = open_blob_store(f"s3://{s3.bucket()}")
    s3.outages = 2
    assert blobs.put("model", "a", b"1")
    s3.outages = 2
    assert blobs.get("model", "a", 1) == b"1"


def test_a_store_without_its_bucket_is_a_typed_error_that_tells_no_secret(s3):
    with pytest.raises(OperationFailed) as caught:
        open_blob_store("s3://nobody").check_writes_once()
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert s3.key not in str(caught.value)
    assert s3.secret not in str(caught.value)


def test_a_signed_url_of_the_store_is_for_its_object_and_its_time(s3):
    blobs = open_blob_store(f"s3://{s3.bucket()}/prefix")
    url = blobs.signed_url("PUT", "gradient", "digits:v1.0/1/1/d/a/gradient", 900)
    assert url.startswith(f"{s3.url}/")
    assert "X-Amz-Expires=900" in url
    assert s3.secret not in url
    headers = {"content-type": "application/octet-stream", "content-encoding": "gzip"}
    assert httpx.put(url, content=gzip.compress(b"update"), headers=headers).status_code == 200
    assert blobs.list("gradient", "digits:v1.0/1/1/d") == ["digits:v1.0/1/1/d/a/gradient"]
    assert httpx.get(blobs.signed_url("GET", "gradient", "digits:v1.0/1/1/d/a/gradient", 9)).content == b"update"
    with pytest.raises(RequestRejected):
        blobs.signed_url("GET", "gradient", "../x", 9)


def test_a_store_whose_urls_devices_refuse_signs_none(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", s3.url.replace("localhost", "127.0.0.1"))
    for store in (open_blob_store(f"s3://{s3.bucket()}"), open_blob_store(str(tmp_path))):
        with pytest.raises(OperationFailed) as caught:
            store.signed_url("GET", "model", "a", 9)
        assert caught.value.reason is Reason.SETTINGS_INVALID


def test_google_and_azure_sign_urls_too_and_azure_wants_a_header(tmp_path, monkeypatch):
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {
        "type": "service_account", "project_id": "p", "private_key_id": "k", "private_key": pem,
        "client_email": "server@p.example", "client_id": "1", "token_uri": "https://localhost/token",
    }  # fmt: skip
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    google, azure = open_blob_store("gs://bucket/prefix"), open_blob_store("az://container/prefix")
    url = google.signed_url("PUT", "gradient", "digits:v1.0/1/1/d/a/gradient", 900)
    assert url.startswith("https://storage.googleapis.com/bucket/prefix/gradient/digits:v1.0/1/1/d/a/gradient?")
    assert "X-Goog-Expires=900" in url
    assert azure.signed_url("PUT", "gradient", "a", 900).startswith("https://account.blob.core.windows.net/container/")
    assert (google.put_headers, azure.put_headers) == ({}, {"x-ms-blob-type": "BlockBlob"})


def test_the_folder_of_a_store_is_known_by_its_url():
    assert local_folder("/srv/blobs") == local_folder("file:///srv/blobs") == Path("/srv/blobs")
    assert local_folder("file:///srv/my%20blobs") == Path("/srv/my blobs")
    assert local_folder("s3://bucket/blobs") is None
