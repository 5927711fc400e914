"""The blob store: plans, checkpoints, updates and sums as objects in buckets (spec/server.md 2.5, 8).

Objects hold the bytes that were put, gzip included; their encoding is recognised by the first bytes, so a local
directory needs no metadata beside its files. An object becomes visible whole or not at all. A bucket is the first
segment of the path: `{root}/{bucket}/{path}`.
"""

import asyncio
import contextlib
import os
import re
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store, from_url

from fedcompute.errors import OperationFailed, Reason, RequestRejected
from fedcompute.storage.staged_files import write_staged

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import ClientConfig, RetryConfig

    _Signer = S3Store | GCSStore | AzureStore

PATH_LIMIT = 1024
CHUNK_BYTES = 1 << 20
DELETE_LIMIT = 1000
_ABORT_SECONDS = 10.0
_PART_BYTES = 5 << 20  # the smallest part that S3 takes
# A store that is down is told of within half a minute: whoever waits tries again by its own rules.
_RETRY: "RetryConfig" = {"max_retries": 5, "retry_timeout": timedelta(seconds=20)}
_CLIENT: "ClientConfig" = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=120)}
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
_PROBE = "probe"
_SEGMENT = re.compile(r"[A-Za-z0-9._~:@!$&'()*+,;=-]{1,255}")


class BlobMissing(OperationFailed):
    """There is no such object."""


class BlobTooLarge(OperationFailed):
    """An object, or what a caller wants to make one, is larger than the caller's limit."""


@dataclass(frozen=True)
class BlobStream:
    """An object being read: its size in bytes, its content encoding ("gzip" or None), and its raw bytes."""

    size: int
    content_encoding: str | None
    chunks: AsyncIterator[bytes]


class Scratch:
    """Memory that one object after the other is read into: what is in the processor's cache stays there."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """The first `size` bytes, which are free to write to."""
        if len(self._memory) < size:
            self._memory = memoryview(bytearray(size))
        return self._memory[:size]


def open_blob_store(url: str) -> "BlobStore":
    """Opens a directory (a path or `file://`) or a bucket prefix (`s3://`, `gs://`, `az://`); makes the directory.

    Object stores take credentials, region and endpoint from the variables of their makers (`AWS_ACCESS_KEY_ID`,
    `AWS_REGION`, `AWS_ENDPOINT` and so on); an `http://` endpoint needs `AWS_ALLOW_HTTP=true`.

    Raises OperationFailed(SETTINGS_INVALID) if the URL names no supported store.
    """
    try:
        if "://" not in url:
            return BlobStore(LocalStore(prefix=Path(url).absolute(), mkdir=True))
        if url.startswith("file://"):
            return BlobStore(LocalStore.from_url(url, mkdir=True))
        # What is set here would hide the variables.
        allow_http = any(os.environ.get(name, "").lower() in ("true", "1", "yes") for name in _ALLOW_HTTP)
        store = from_url(url, client_options={**_CLIENT, "allow_http": allow_http}, retry_config=_RETRY)
    except (BaseError, ValueError, OSError) as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID, f"the blob store cannot be opened: {type(error).__name__}"
        ) from None
    # The library also reads plain HTTP, which neither writes nor lists as a store must, and memory.
    if not isinstance(store, S3Store | GCSStore | AzureStore):
        raise OperationFailed(
            Reason.SETTINGS_INVALID, "the blob store's URL names none of s3://, gs://, az://, file:// or a directory"
        )
    return BlobStore(store)


def local_folder(url: str) -> Path | None:
    """The directory that a blob store's URL names, there or not; None for an object store."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if "://" not in url or parts.scheme == "file" else None


class BlobStore:
    """Objects in buckets. Safe for threads; the synchronous methods block on I/O.

    Every method raises RequestRejected(MALFORMED_REQUEST) for a bucket or path that is not safe (absolute, with an
    empty segment, `.` or `..`, or characters that a URL path would encode) and OperationFailed(STORAGE_FAILED) if the
    store does not do its work.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keeps_attributes = not isinstance(store, LocalStore)
        self._folder = Path(store.prefix or "/") if isinstance(store, LocalStore) else None

    def check_writes_once(self) -> None:
        """Makes sure that the store creates an object only if it is absent: what a round releases rests on it.

        A directory does so by itself; an object store is asked, with an object of its own that goes afterwards. Raises
        OperationFailed: BLOB_STORE_UNSUITABLE if it overwrites, STORAGE_FAILED if it refuses or cannot be reached.
        """
        if isinstance(self._store, LocalStore):
            return
        path = uuid.uuid4().hex
        self.put(_PROBE, path, b"1", if_absent=True)
        try:
            overwritten = self.put(_PROBE, path, b"2", if_absent=True) or self.get(_PROBE, path, 1) != b"1"
        finally:
            self.delete(_PROBE, path)
        if overwritten:
            raise OperationFailed(
                Reason.BLOB_STORE_UNSUITABLE, "the blob store overwrites objects that were to be created if absent"
            )

    def put(self, bucket: str, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Writes an object whole. With `if_absent`, False and nothing written if it exists; of two racers one wins."""
        key = _key(bucket, path)
        try:
            obstore.put(
                self._store,
                key,
                data,
                mode="create" if if_absent else "overwrite",
                use_multipart=False,
                attributes=self._attributes(data[:3]),
            )
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise _failed("write", key, error) from error
        return True

    async def put_stream(self, bucket: str, path: str, chunks: AsyncIterable[bytes], limit: int) -> int:
        """Writes an object from chunks, at most `limit` bytes in all; returns its size.

        Nothing is visible until the last chunk is written; nothing is left if the chunks raise (their exception
        passes through), the caller is canceled, or the limit is passed: that raises BlobTooLarge(BLOB_TOO_LARGE).
        """
        key = _key(bucket, path)
        counted = _Counted(chunks, limit, key)
        if self._folder is not None:
            try:
                await write_staged(self._folder / key, counted, patience=_ABORT_SECONDS)
            except OSError as error:
                if counted.failure is error:
                    raise
                raise _failed("write", key, error) from error
            return counted.size
        first = await anext(counted, b"")
        put = obstore.put_async(
            self._store,
            key,
            _chain(first, counted),
            attributes=self._attributes(first[:3]),
            chunk_size=_PART_BYTES,
            max_concurrency=2,
        )
        writing = asyncio.ensure_future(put)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # A write that is dropped, not ended, leaves the parts that the store has already.
            counted.end()
            await asyncio.wait([writing], timeout=_ABORT_SECONDS)
            if writing.done() and not writing.cancelled():
                writing.exception()
            raise
        except (BaseError, OSError) as error:
            if counted.failure is error:
                raise
            raise _failed("write", key, error) from error
        return counted.size

    def get(self, bucket: str, path: str, limit: int) -> bytes:
        """Reads an object of at most `limit` bytes; raises BlobMissing(NOT_FOUND) or BlobTooLarge(BLOB_TOO_LARGE)."""
        key = _key(bucket, path)
        with _reading(key):
            if self._folder is None:
                return bytes(self._fetch(key, limit))
            with _open_file(self._folder, key, limit) as (file, _):
                return file.readall()

    def get_into(self, scratch: Scratch, bucket: str, path: str, limit: int) -> memoryview:
        """As `get`; what it returns holds until another object is read into `scratch`.

        An object store's answer has memory of its own.
        """
        key = _key(bucket, path)
        with _reading(key):
            if self._folder is None:
                return memoryview(self._fetch(key, limit))
            with _open_file(self._folder, key, limit) as (file, size):
                view, at = scratch.take(size), 0
                while at < size and (count := file.readinto(view[at:])):
                    at += count
                return view[:at]

    def _fetch(self, key: str, limit: int) -> "Bytes":
        result = obstore.get(self._store, key)
        if result.meta["size"] > limit:
            raise _too_large(key, limit)
        return result.bytes()

    async def open_stream(self, bucket: str, path: str, *, chunk_bytes: int = CHUNK_BYTES) -> BlobStream:
        """Opens an object for reading in chunks of about `chunk_bytes`; raises BlobMissing(NOT_FOUND)."""
        key = _key(bucket, path)
        with _reading(key):
            result = await obstore.get_async(self._store, key)
            stream = result.stream(min_chunk_size=chunk_bytes)
            first = bytes(await anext(stream, b""))
        return BlobStream(result.meta["size"], content_encoding(first), _chain(first, stream))

    def size(self, bucket: str, path: str) -> int:
        """An object's size in bytes; raises BlobMissing(NOT_FOUND)."""
        key = _key(bucket, path)
        with _reading(key):
            return int(obstore.head(self._store, key)["size"])

    def exists(self, bucket: str, path: str) -> bool:
        """Whether there is such an object, complete."""
        try:
            self.size(bucket, path)
        except BlobMissing:
            return False
        return True

    def list(self, bucket: str, prefix: str, *, limit: int = 100_000) -> list[str]:
        """The paths under the folder `prefix`, at any depth, sorted; `""` is the whole bucket.

        Raises BlobTooLarge(BLOB_TOO_LARGE) if there are more than `limit`.
        """
        key = _key(bucket, prefix) if prefix else _bucket(bucket)
        found: list[str] = []
        try:
            for page in obstore.list(self._store, key):
                found += [meta["path"][len(bucket) + 1 :] for meta in page]
                if len(found) > limit:
                    raise BlobTooLarge(Reason.BLOB_TOO_LARGE, f"folder {key} has more than {limit} objects")
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise _failed("list", key, error) from error
        return sorted(found)

    def delete(self, bucket: str, path: str) -> bool:
        """Deletes an object; False if it did not exist (object stores that do not say so answer True)."""
        key = _key(bucket, path)
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise _failed("delete", key, error) from error
        return True

    @property
    def put_headers(self) -> dict[str, str]:
        """Headers without which a PUT by a signed URL is refused."""
        return {"x-ms-blob-type": "BlockBlob"} if isinstance(self._store, AzureStore) else {}

    def signed_url(self, method: str, bucket: str, path: str, life: float) -> str:
        """An absolute URL of the store's own by which anyone may GET or PUT one object for `life` seconds.

        Raises OperationFailed(SETTINGS_INVALID) for a store whose URLs devices cannot use (spec/server.md 1.1).

        Formal guarantees: those of the store's own signatures: the URL is good for this method and object until it
        expires. Headers of a PUT are not signed, so nothing may rest on them: encodings are recognised by content.
        """
        key = _key(bucket, path)
        if isinstance(self._store, LocalStore):
            raise OperationFailed(Reason.SETTINGS_INVALID, "a directory has no signed URLs of its own")
        verb: Literal["GET", "PUT"] = "GET" if method == "GET" else "PUT"
        try:
            url = obstore.sign(cast("_Signer", self._store), verb, key, timedelta(seconds=life))
        except (BaseError, OSError, ValueError) as error:
            raise _failed("sign a URL of", key, error) from None
        if not url.startswith(("https://", "http://localhost:")):
            raise OperationFailed(
                Reason.SETTINGS_INVALID, "devices accept https:// and http://localhost:<port> only, from stores too"
            )
        return url

    def delete_folder(self, bucket: str, prefix: str, *, limit: int = DELETE_LIMIT) -> int:
        """Deletes up to `limit` objects under the folder `prefix`, at any depth; returns how many: 0 when all are gone.

        For folders that nobody writes to any more. Of a local directory the emptied folders go too.
        """
        key = _key(bucket, prefix)
        paths: list[str] = []
        try:
            for page in obstore.list(self._store, key, chunk_size=limit):
                paths += [meta["path"] for meta in page]
                if len(paths) >= limit:
                    break
            for path in paths[:limit] if isinstance(self._store, LocalStore) else ():
                # One by one: another remover may have been here first.
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, path)
            if paths and not isinstance(self._store, LocalStore):
                obstore.delete(self._store, paths[:limit])
        except FileNotFoundError:
            paths = []
        except (BaseError, OSError) as error:
            raise _failed("delete", key, error) from error
        if self._folder is not None and len(paths) < limit:
            _remove_empty(self._folder / key)
        return len(paths[:limit])

    def _attributes(self, first: bytes) -> dict[str, str] | None:
        encoding = content_encoding(first)
        return {"Content-Encoding": encoding} if self._keeps_attributes and encoding else None


def content_encoding(first: bytes) -> str | None:
    """What an object's first three bytes say about its encoding: "gzip" (RFC 1952, deflate) or None."""
    return "gzip" if first[:3] == b"\x1f\x8b\x08" else None


class _Counted:
    """Passes chunks on until their sum exceeds the limit, and remembers what ended them early."""

    def __init__(self, chunks: AsyncIterable[bytes], limit: int, key: str) -> None:
        self._chunks = aiter(chunks)
        self._limit = limit
        self._key = key
        self._waiting: asyncio.Task[Any] | None = None
        self._ended = False
        self.size = 0
        self.failure: BaseException | None = None

    def end(self) -> None:
        """Breaks off: whoever waits for a chunk, or asks for one later, gets an exception."""
        self._ended = True
        if self._waiting is not None:
            self._waiting.cancel()

    def __aiter__(self) -> "_Counted":
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise asyncio.CancelledError
        self._waiting = asyncio.current_task()
        try:
            chunk = await anext(self._chunks)
            self.size += len(chunk)
            if self.size > self._limit:
                raise _too_large(self._key, self._limit)
        except StopAsyncIteration:
            raise
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._waiting = None
        return chunk


async def _chain(first: bytes, rest: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for chunk in rest:
        if chunk:
            yield bytes(chunk)


@contextlib.contextmanager
def _reading(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise _missing(key) from None
    except (BaseError, OSError) as error:
        raise _failed("read", key, error) from error


@contextlib.contextmanager
def _open_file(folder: Path, key: str, limit: int) -> Iterator[tuple[FileIO, int]]:
    """An object's file and its size. So its bytes are copied once, out of the page cache; the library copies more."""
    with FileIO(folder / key) as file:
        # Nobody writes to an object that is there, so its size stays what it is.
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise _too_large(key, limit)
        yield file, size


def _remove_empty(folder: Path) -> None:
    for place, _, _ in os.walk(folder, topdown=False):
        # What is not empty, or gone already, stays as it is.
        with contextlib.suppress(OSError):
            Path(place).rmdir()


def _bucket(bucket: str) -> str:
    if not _safe(bucket):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the bucket's name is not safe")
    return bucket


def _key(bucket: str, path: str) -> str:
    _bucket(bucket)
    if len(path) > PATH_LIMIT or not all(_safe(segment) for segment in path.split("/")):
        raise RequestRejected(Reason.MALFORMED_REQUEST, "the object's path is not safe")
    return f"{bucket}/{path}"


def _safe(segment: str) -> bool:
    return segment not in (".", "..") and _SEGMENT.fullmatch(segment) is not None


def _missing(key: str) -> BlobMissing:
    return BlobMissing(Reason.NOT_FOUND, f"there is no object {key}")


def _too_large(key: str, limit: int) -> BlobTooLarge:
    return BlobTooLarge(Reason.BLOB_TOO_LARGE, f"object {key} is larger than {limit} bytes")


def _failed(verb: str, key: str, error: Exception) -> OperationFailed:
    # The store's own words may hold a signed URL or an absolute path.
    return OperationFailed(Reason.STORAGE_FAILED, f"the store could not {verb} {key}: {type(error).__name__}")
